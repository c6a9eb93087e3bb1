"""Curves: each panel's lines are the log's own numbers."""

import json

import pytest
from helpers import outcome

import plot
from configurator import UserError
from parts.common import read_log


def log(path, steps=30, every=10):
    """Write a log like train.py's with a torn last line. Return its path as text."""
    path.parent.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 3 / step, "lr": 1e-3, "captions_per_s": 100.0 + step})
        if step % every == 0:
            rows.append({"step": step, "val_loss": 4 / step, "shuffled_loss": 5.0, "CIDEr": 0.1,
                         "samples": ["a dog"]})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "lo')
    return str(path)


def test_a_panel_has_a_line_for_each_run_and_a_png_is_written(tmp_path, capfd):
    pytest.importorskip("matplotlib", reason="needs pip install -r requirements-plot.txt")
    logs = (log(tmp_path / "a" / "log.jsonl"), log(tmp_path / "b" / "log.jsonl"))
    figure = plot.draw(dict(zip(plot.run_names(logs), map(read_log, logs), strict=True)))
    lines = {panel.get_title("left"): len(panel.lines) for panel in figure.axes}
    assert lines == {"loss": 6, "CIDEr": 2, "learning rate": 2, "captions/s": 2}
    validation = figure.axes[0].lines[0]
    assert list(validation.get_xdata()) == [10, 20, 30]
    assert list(validation.get_ydata()) == [4 / 10, 4 / 20, 4 / 30]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]

    out = tmp_path / "new" / "curves.png"
    assert outcome("plot.py", [*logs, f"--out={out}"], capfd) == (0, f"{out}\n", "")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_by_what_differs_in_their_paths():
    assert plot.run_names(["out/a/log.jsonl", "out/b/log.jsonl"]) == ["a", "b"]
    assert plot.run_names(["x/a/log.jsonl", "y/a/log.jsonl"]) == ["x/a", "y/a"]
    assert plot.run_names(["out/a/log.jsonl"]) == ["a"]
    assert plot.run_names(["a/1.jsonl", "a/2.jsonl"]) == ["a/1.jsonl", "a/2.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", "3", "[1]", '{"loss": 1}', "\0\0\0"])
def test_only_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert [row["step"] for row in read_log(path)] == [1, 2]
    path.write_text(f'{{"step": 1}}\n{torn}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="log.jsonl:2: not a line"):
        read_log(path)


def test_a_missing_log_an_empty_log_and_an_unknown_format_are_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    cfg = plot.PlotConfig(logs=(str(path),))
    with pytest.raises(UserError, match="not found"):
        plot.main(cfg)
    path.touch()
    with pytest.raises(UserError, match="no line yet"):
        plot.main(cfg)
    with pytest.raises(UserError, match="ends in .png"):
        plot.main(plot.PlotConfig(logs=("log.jsonl",), out="curves.jpeg2"))
