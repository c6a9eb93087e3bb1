# make demo    from nothing to captions, on the built-in dataset
# make test    lint, then every test

PYTHON ?= python3
BIN := .venv/bin
RUN := $(CURDIR)/$(BIN)/python

demo: .venv/clip
	$(RUN) prepare.py config/shapes.py
	$(RUN) train.py config/shapes.py
	$(RUN) sample.py --ckpt out/shapes/ckpt.pt --split novel --method beam --out out/shapes/novel
	$(RUN) sample.py --ckpt out/shapes/ckpt.pt --split test --method beam --out out/shapes/test

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) -m pytest -q

.venv/clip: requirements.txt requirements-clip.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-clip.txt
	touch $@

.venv/dev: requirements.txt requirements-clip.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test
