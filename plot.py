"""Draws the curves of training runs from their logs: loss, CIDEr, learning rate, captions/s.

pip install -r requirements-plot.txt
python plot.py out/*/log.jsonl                                  # writes curves.png
python plot.py out/a/log.jsonl out/b/log.jsonl --out=ab.png
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, read_flags, run


@dataclass(frozen=True)
class PlotConfig:
    """Settings of `python plot.py`."""

    logs: tuple[str, ...]  # of train.py, one a run; --logs= may be left out
    out: str = "curves.png"  # the picture: .png .svg .pdf


PANELS = {  # title -> (key in the log, line style, what is said of the line)
    "loss": (("val_loss", "-", "val"), ("loss", ":", "train"), ("shuffled_loss", "--", "shuffled")),
    "CIDEr": (("CIDEr", "-", ""),),
    "learning rate": (("lr", "-", ""),),
    "captions/s": (("captions_per_s", "-", ""),),
}


def read(path: str) -> list[dict]:
    """The rows of a log.jsonl; a last line that a stopped run left torn is dropped. Raises
    UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} not found: train.py writes it") from None
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            if n == len(lines):
                break
            raise UserError(f"{path}:{n}: not a line of train.py's log") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no line yet")
    return rows


def curve(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of a figure, which only some rows have."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def names(paths: list[str]) -> list[str]:
    """What tells the logs apart: their folders, without what these begin with alike."""
    folders = [str(Path(path).resolve().parent) for path in paths]
    if len(set(folders)) < len(paths):
        return list(paths)
    common = os.path.commonpath([str(Path(folder).parent) for folder in folders])
    return [os.path.relpath(folder, common) for folder in folders]


def draw(runs: dict[str, list[dict]]):
    """A matplotlib figure of some runs, {name: rows}: a colour a run, a panel a figure."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -r requirements-plot.txt") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
    for title, panel in panels.items():
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("step", color="gray")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        for i, rows in enumerate(runs.values()):
            for key, style, _ in PANELS[title]:
                steps, values = curve(rows, key)
                if steps:
                    mark = "." if len(steps) == 1 else None
                    panel.plot(steps, values, style, color=f"C{i % 10}", lw=1.4, marker=mark)
    styles = [Line2D([], [], color="gray", ls=s, label=what) for _, s, what in PANELS["loss"]]
    panels["loss"].legend(handles=styles, frameon=False, fontsize=9)
    colours = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(runs)]
    figure.legend(handles=colours, loc="outside upper left", frameon=False, ncols=5)
    return figure


def main(cfg: PlotConfig) -> None:
    if Path(cfg.out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"out={cfg.out}: expected a name that ends in .png, .svg or .pdf")
    runs = dict(zip(names(list(cfg.logs)), map(read, cfg.logs), strict=True))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(cfg.out, dpi=130)
    print(cfg.out)


if __name__ == "__main__":
    argv = sys.argv[1:]
    paths = [] if "-h" in argv else read_flags(PlotConfig, argv)[0]
    argv = [f"--logs={arg}" if arg in paths else arg for arg in argv]
    run(main, configure(PlotConfig, argv, __doc__, files=False))
