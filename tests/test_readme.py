"""The README: its commands run as written, what it names exists, and its sentences are short."""

import json
import os
import re
import shlex
import shutil
import sys
from typing import get_type_hints

import pytest
from helpers import ROOT, finish, many, spawn, tiny_clip

PATH = ROOT / "README.md"
README = PATH.read_text()
LONGEST = 25  # words in a sentence
SMALLER = {  # flags added to the commands, so that they end in seconds
    "prepare.py": ["--shapes_train=64", "--shapes_eval=16"],
    "train.py": ["--max_iters=12", "--batch_size=8", "--eval_images=8", "--device=cpu"],
    "sample.py": ["--device=cpu"],
}


def commands_to_test() -> list[list[str]]:
    """Return the command lines of the blocks that are marked as tested, split into words."""
    blocks = re.findall(r"<!-- tested -->\n```sh\n(.*?)```", README, re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_commands_run_as_written(tmp_path):
    """In a copy of the repository, with smaller settings added."""
    pytest.importorskip("transformers", reason="images need requirements-clip.txt")
    pytest.importorskip("matplotlib", reason="plot.py needs requirements-plot.txt")
    for path in (*ROOT.glob("*.py"), ROOT / "parts", ROOT / "config", ROOT / "assets"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    many(tmp_path, 20)  # the user's own data, and a CLIP in a folder
    tiny_clip(tmp_path / "clip")
    commands = commands_to_test()
    assert len(commands) >= 8
    outputs = {}
    for python, script, *rest in commands:
        assert python == "python"
        command = [sys.executable, script, *rest, *SMALLER.get(script, [])]
        if script == "prepare.py" and "--dataset=mine" in rest:
            command.append("--clip=./clip")
        needs_java = script == "metrics.py"  # METEOR takes ten seconds, so that once is enough
        env = os.environ if needs_java else os.environ | {"PATH": ""}
        outputs[script, *rest] = finish(spawn(command, cwd=tmp_path, env=env))
    predictions = json.loads((tmp_path / "out/shapes/test/predictions.json").read_text())
    assert len(predictions) == 16
    assert any("00000.png: " in text for text in outputs.values())
    assert (tmp_path / "out/shapes/curves.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "out/mine/val/predictions.json").read_text())) == 4


def test_every_script_and_setting_it_names_exists():
    folders = (ROOT, ROOT / "parts", ROOT / "tests", ROOT / "config")
    named = set(re.findall(r"\b(\w+\.py)\b", README))
    for name in named:
        assert any((folder / name).is_file() for folder in folders), name
    modules = {path.name for folder in folders[:2] for path in folder.glob("*.py")}
    assert modules - {"__init__.py"} <= named, "missing from the reading order"

    import bench_prepare
    import bench_scale

    import bench
    import bench_gpu
    from configurator import Config
    from metrics import MetricsConfig
    from parts.export import ExportConfig
    from parts.shapes_clip import ShapesConfig
    from sample import SampleConfig

    settings = (Config, SampleConfig, ExportConfig, ShapesConfig, bench.TrainBench,
                bench.DecodeBench, bench_gpu.GpuBench, bench_prepare.Bench,
                bench_scale.ScaleConfig, MetricsConfig)  # fmt: skip
    known = {name for kind in settings for name in get_type_hints(kind)}
    known |= set("nproc_per_node nnodes rdzv_backend rdzv_endpoint max_restarts out help".split())
    assert not set(re.findall(r"--(\w+)", README)) - known


def sentences(markdown: str) -> list[list[str]]:
    """Return the words of each sentence outside code blocks, tables, headings and images.

    A sentence ends at . ! ? : or ; before a space, and with its paragraph or list item. Inline
    code counts as one word.
    """
    prose = re.sub(r"<!--.*?-->|^```.*?^```", "\n", markdown, flags=re.S | re.M)
    prose = re.sub(r"^(\||#).*$|!\[.*?\]\(.*?\)", "", prose, flags=re.M)
    prose = re.sub(r"`[^`]*`", "code", prose)
    pieces = re.split(r"\n\s*\n|\n(?=- )|(?<=[.!?:;])[*)\"]*\s", prose)
    words = [[word for word in piece.split() if re.search(r"\w", word)] for piece in pieces]
    return [sentence for sentence in words if sentence]


def test_its_sentences_are_short():
    example = "# A heading\n\nOne two. *Three* `four five`: six\n\n| a | b |\n\n- seven\n- eight"
    split = [["One", "two."], ["*Three*", "code:"], ["six"], ["seven"], ["eight"]]
    assert sentences(example) == split
    long = [" ".join(words) for words in sentences(README) if len(words) > LONGEST]
    assert not long, f"{PATH}: split the sentences of more than {LONGEST} words: {long}"
