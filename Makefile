# make demo    install, then prepare, train and caption the built-in dataset; ends with a gallery
# make test    install, lint, then run every test

PYTHON ?= python3
BIN := .venv/bin
RUN := $(CURDIR)/$(BIN)/python

demo: .venv/demo
	$(RUN) prepare.py config/shapes.py
	$(RUN) train.py config/shapes.py
	$(RUN) plot.py out/shapes/log.jsonl --out=out/shapes/curves.png
	$(RUN) sample.py --ckpt out/shapes/ckpt.pt --image data/shapes/images/test/00000.png
	$(RUN) sample.py --ckpt out/shapes/ckpt.pt --split novel --method beam
	$(RUN) sample.py --ckpt out/shapes/ckpt.pt --split test --method beam --gallery --attention

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) -m pytest -q

.venv/demo: requirements.txt requirements-clip.txt requirements-plot.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-clip.txt -r requirements-plot.txt
	touch $@

.venv/dev: $(wildcard requirements*.txt)
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test
