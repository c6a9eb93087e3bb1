"""What goes wrong around a run: full disks, read-only folders, signals, and any arguments at all."""

import contextlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import ROOT, SMALL, finish, flags, log_of, losses, one_line, start, wait_for_steps

import checkpoint
import data
import train
from configurator import Config
from data import replacing

# ---------------------------------------------------------------------------------------------
# Any arguments: success, or one clear line

WORDS = ["", "0", "1", "-1", "2", "3", "7", "0.5", "1e-3", "1e999", "nan", "inf", "9" * 30, "x",
         "true", "no", "none", "auto", "cpu", "mps", "cuda:99", "float16", "bfloat16", "grid",
         "--", "-", "=", "--=", "--help ", "a b", "é\n", "\x1b[2J", "\0", "\udcff", "x" * 300,
         "4294967295", "'", '"', "{split}", "*", "~"]  # fmt: skip
PATHS = ["dir", "file", "binary", "dir/none", "file/none", "none.pt", "none.json", "loop", "loop/x",
         "/dev/null", "data/tiny", "data/tiny/meta.json", "ckpt.pt", "last.pt", "predictions.json",
         "log.jsonl", "captions.csv", "rows.npy", "names.txt", "deep.json", "good.py", "bad.yaml",
         "made.py", "made.yaml", "new/out.json", "out.svg"]  # fmt: skip
LIMITS = {  # script -> flags that come last and keep a run tiny, whatever was drawn
    "train.py": "--max_iters=2 --eval_images=2 --compile=false --track=none --n_layer=1",
    "prepare.py": "--shapes_train=2 --shapes_eval=1 --workers=0 --downloads= --clip=dir",
    "sample.py": "--track=none --max_len=5",
    "shapes.py": "--families=4 --steps=1 --batch=2 --probe=false",
    "bench.py": "--ckpt=none.pt",
}
USUAL = {  # script -> a command that works
    "train.py": flags(eval_interval=1, n_embd=8, block_size=24),
    "prepare.py": "--dataset=mine --source=csv --captions=captions.csv --embeddings=rows.npy "
    "--embedding_names=names.txt --vocab_size=60 --device=cpu",
    "sample.py": "--ckpt=ckpt.pt --split=val --data=data/tiny --out_json=p.json --device=cpu",
    "metrics.py": "predictions.json data/tiny/val.json",
    "gallery.py": "predictions.json --out=page.html",
    "plot.py": "log.jsonl --out=curves.svg",
    "shapes.py": "--seed=3",
    "bench.py": "decode --quick",
}
SHARES = {"train.py": 250, "prepare.py": 200, "sample.py": 200, "metrics.py": 130,
          "gallery.py": 100, "plot.py": 60, "shapes.py": 30, "bench.py": 30}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny dataset, checkpoints, and one of each file that a script reads."""
    from conftest import tiny_dataset

    here = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(here)
    tiny_dataset(Path("data/tiny"))
    train.main(Config(**SMALL | dict(max_iters=2, eval_interval=2, n_embd=8, out_dir=".")))
    images, references = data.Split(Path("data/tiny"), "val").references()
    write = {
        "predictions.json": json.dumps([{"image_id": i["id"], "caption": r[0]}
                                        for i, r in zip(images, references, strict=True)]),
        "captions.csv": "image,caption,split\na.png,a dog,train\nb.png,a cat,train\nc.png,x,val\n",
        "names.txt": "a.png\nb.png\nc.png\n", "file": "text", "deep.json": "[" * 100_000,
        "good.py": "seed = 3\nn_head = 1", "bad.yaml": "seed: [",
    }  # fmt: skip
    for name, content in write.items():
        Path(name).write_text(content)
    np.save("rows.npy", np.eye(3, dtype=np.float32))
    Path("binary").write_bytes(bytes(range(256)))
    Path("dir").mkdir()
    Path("loop").symlink_to("loop")
    os.chdir(before)
    return here


def arguments(chance: random.Random, script: str) -> list[str]:
    """A working command with some of it dropped, replaced, doubled, or new."""
    usual = USUAL[script]
    args = usual.split() if isinstance(usual, str) else list(usual)
    source = (ROOT / script).read_text() + (ROOT / "configurator.py").read_text()
    names = re.findall(r"^    (\w+): \w+.*= .*#", source, re.M)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        value = chance.choice(chance.choice((WORDS, PATHS)))
        flag = chance.choice(names)
        if chance.random() < 0.1:
            flag = flag[:-1] + chance.choice("xé= ")
        new = chance.choice(([f"--{flag}={value}"], [f"--{flag}", value], [f"--{flag}"], [value]))
        at = chance.randrange(len(args) + 1)
        if args and chance.random() < 0.3:
            args[at : at + 1] = chance.choice(([], new))
        elif args and chance.random() < 0.4 and "=" in args[at - 1]:
            args[at - 1] = f"{args[at - 1].partition('=')[0]}={value}"
        else:
            args[at:at] = new
    return args + LIMITS.get(script, "").split()


def made_config(chance: random.Random) -> str:
    """The text of a config file, right or wrong."""
    names, mark = ["seed", "n_head", "dropout", "captions", "bias", "n_emdb"], chance.choice("=:")
    rows = [f"{chance.choice(names)} {mark} {chance.choice(WORDS)}" for _ in range(3)]
    return "\n".join(rows[: chance.randrange(4)]).encode("utf-8", "replace").decode()


BAR = re.compile(r"[^\r\n]*\r[^\n]*?\]?(\n|$)")  # progress bars, which share stderr


def outcome(script: str, args: list[str], capfd) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a script run in this very process."""
    capfd.readouterr()
    status, before = 0, (sys.argv, Path.cwd())
    sys.argv = [str(ROOT / script), *args]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):  # as the interpreter does it
            print(status, file=sys.stderr)
            status = 1
    except BaseException:  # noqa: BLE001 - it is what a user would see
        traceback.print_exc()
        status = -1
    finally:
        sys.argv = before[0]
    out, err = capfd.readouterr()
    return status or 0, out, err


def test_any_arguments_end_in_success_or_one_clear_line(trained, tmp_path, monkeypatch, capfd):
    """1,000 commands, each a working one that was damaged, for all scripts in turn."""
    monkeypatch.setenv("PATH", "")  # no Java: METEOR takes seconds
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    chance, ended, wrong = random.Random(0), {}, []
    for script, share in SHARES.items():
        began = time.time()
        for _ in range(int(share * float(os.environ.get("SHARE", 1)))):
            here = tmp_path / "a" / "b" / "here"  # deep, for what is written to `..`
            shutil.rmtree(tmp_path / "a", ignore_errors=True)
            shutil.copytree(trained, here, symlinks=True)
            monkeypatch.chdir(here)
            Path("made.py").write_text(made_config(chance))
            Path("made.yaml").write_text(made_config(chance))
            args = arguments(chance, script)
            status, out, err = outcome(script, args, capfd)
            ended.setdefault(script, []).append(status)
            lines = BAR.sub("", err).splitlines()
            good = status in (0, 1, 2) and "Traceback" not in err
            if status and good:
                listed = lines and "listed above" in lines[-1]  # prepare.py lists all problems
                good = (len(lines) == 1 or listed) and lines[-1].strip() and lines[-1].isprintable()
            if not good:
                wrong.append(f"{script} {args}: {status}\n{err[-1500:]}")
        with capfd.disabled():
            print(script, f"{time.time() - began:.1f} s", {s: ended[script].count(s) for s in set(ended[script])})
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
        signal.signal(number, handler)
    Path("/tmp/faults/wrong.txt").write_text("\n=====\n".join(wrong))
    assert not wrong, f"{len(wrong)}: {wrong[0]}"
