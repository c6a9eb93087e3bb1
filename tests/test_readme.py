"""The README's commands, run as written, small, in a copy of the repository."""

import json
import os
import re
import shlex
import shutil
import sys

import pytest
from helpers import ROOT, finish, many, spawn, tiny_clip

README = (ROOT / "README.md").read_text()
SMALL = {  # added to the commands, so that they end in seconds
    "prepare.py": ["--shapes_train=64", "--shapes_eval=16"],
    "train.py": ["--max_iters=20", "--eval_interval=20", "--eval_images=8", "--device=cpu"],
    "sample.py": ["--device=cpu"],
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"<!-- tested -->\n```sh\n(.*?)```", README, re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_commands_run_as_written(tmp_path):
    pytest.importorskip("transformers", reason="images need requirements-clip.txt")
    pytest.importorskip("matplotlib", reason="plot.py needs requirements-plot.txt")
    for path in (*ROOT.glob("*.py"), ROOT / "config", ROOT / "assets"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    many(tmp_path, 20)  # the user's own data, and a CLIP that lies in a folder
    tiny_clip(tmp_path / "clip")
    assert len(commands()) >= 8
    outputs = {}
    for python, script, *rest in commands():
        assert python == "python"
        command = [sys.executable, script, *rest, *SMALL.get(script, [])]
        command += ["--clip=./clip"] if script == "prepare.py" and "--dataset=mine" in rest else []
        java = "metrics.py" in script  # METEOR takes ten seconds, so that once is enough
        env = os.environ if java else os.environ | {"PATH": ""}
        outputs[script, *rest] = finish(spawn(command, cwd=tmp_path, env=env))
    scores = json.loads((tmp_path / "out/shapes/test/predictions.json").read_text())
    assert len(scores) == 16
    assert any("00000.png: " in text for text in outputs.values())
    assert (tmp_path / "out/shapes/curves.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "out/mine/val/predictions.json").read_text())) == 4


def test_every_script_and_setting_it_names_exists():
    for name in set(re.findall(r"\b(\w+\.py)\b", README)):
        assert (
            (ROOT / name).is_file()
            or (ROOT / "tests" / name).is_file()
            or list(ROOT.glob(f"config/{name}"))
        ), name
    import bench_prepare
    import bench_scale

    import bench
    from configurator import Config, kinds_of
    from sample import SampleConfig

    settings = (Config, SampleConfig, bench.TrainBench, bench.DecodeBench, bench_prepare.Bench,
                bench_scale.ScaleConfig)  # fmt: skip
    known = {name for kind in settings for name in kinds_of(kind)}
    known |= set("nproc_per_node nnodes rdzv_backend rdzv_endpoint max_restarts out help".split())
    assert not set(re.findall(r"--(\w+)", README)) - known
