"""Draw the curves of training runs from their logs: loss, CIDEr, learning rate, captions/s.

pip install -r requirements-plot.txt
python plot.py out/*/log.jsonl                             # writes curves.png
python plot.py out/a/log.jsonl out/b/log.jsonl --out=ab.png
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import configure
from parts.common import UserError, extras, read_log, run


@dataclass(frozen=True)
class PlotConfig:
    """Settings of `python plot.py`."""

    logs: tuple[str, ...]  # written by train.py, one per run; --logs= may be left out
    out: str = "curves.png"  # the picture: .png .svg .pdf


PANELS = {  # title -> (key in the log, line style, label) of each line
    "loss": (("val_loss", "-", "val"), ("loss", ":", "train"), ("shuffled_loss", "--", "shuffled")),
    "CIDEr": (("CIDEr", "-", ""),),
    "learning rate": (("lr", "-", ""),),
    "captions/s": (("captions_per_s", "-", ""),),
}


def run_names(paths: tuple[str, ...]) -> list[str]:
    """Return what tells the logs apart: their folders, minus the common prefix."""
    folders = [str(Path(path).resolve().parent) for path in paths]
    if len(set(folders)) < len(paths):
        return list(paths)
    common = os.path.commonpath([str(Path(folder).parent) for folder in folders])
    return [os.path.relpath(folder, common) for folder in folders]


def draw(runs: dict[str, list[dict]]):
    """Return a matplotlib figure of {name: rows of a log}: a colour per run, a panel per metric.

    Raise UserError if matplotlib is not installed.
    """
    extras("matplotlib", file="requirements-plot.txt")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
    for title, panel in panels.items():
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("step", color="gray")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        for i, rows in enumerate(runs.values()):
            for key, style, _ in PANELS[title]:
                steps = [row["step"] for row in rows if key in row]
                values = [row[key] for row in rows if key in row]
                marker = "." if len(steps) == 1 else None
                panel.plot(steps, values, style, color=f"C{i % 10}", lw=1.4, marker=marker)
    styles = [Line2D([], [], color="gray", ls=ls, label=label) for _, ls, label in PANELS["loss"]]
    panels["loss"].legend(handles=styles, frameon=False, fontsize=9)
    colors = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(runs)]
    figure.legend(handles=colors, loc="outside upper left", frameon=False, ncols=5)
    return figure


def main(cfg: PlotConfig) -> None:
    if Path(cfg.out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"out={cfg.out}: give a name that ends in .png, .svg or .pdf")
    runs = {}
    for name, path in zip(run_names(cfg.logs), cfg.logs, strict=True):
        runs[name] = read_log(path)
        if not runs[name]:
            raise UserError(f"{path} holds no line yet: wait for the first step, or leave it out")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(cfg.out, dpi=130)
    print(cfg.out)


if __name__ == "__main__":
    run(lambda: main(configure(PlotConfig, sys.argv[1:], __doc__, files=False, positional="logs")))
