"""Checkpoints: written whole, loaded without running anything, checked before they are used.

ckpt.pt  to share: weights, model settings, tokenizer, the dataset's meta.json, config, scores.
last.pt  to resume from: that plus optimizer, gradient scaler, average, random states, Progress.
model.safetensors  the weights of a ckpt.pt that parts/export.py wrote, with the rest next to it.
"""

import itertools
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from parts.common import UserError, extras, read_json, replacing, sha256

FORMAT = 1
KINDS = {"model": dict, "model_config": dict, "meta": dict, "config": dict,
         "tokenizer": torch.Tensor}  # fmt: skip


@dataclass
class Progress:
    """Where a run is: saved in last.pt and resumed whole."""

    step: int = 0  # steps taken
    evaluated_at: int = 0  # step of the last evaluation
    scores: dict = field(default_factory=dict)  # of that evaluation
    best: tuple[float, float] = (-1.0, 0.0)  # CIDEr and -val_loss of ckpt.pt's

    def record(self, scores: dict) -> bool:
        """Note an evaluation of this step. Return whether it beats the best so far: by CIDEr, then
        by loss."""
        self.evaluated_at = self.step
        self.scores = scores
        candidate = (scores["CIDEr"], -scores["val_loss"])
        is_best = candidate > self.best
        if is_best:
            self.best = candidate
        return is_best

    def as_dict(self) -> dict:
        """Return the entries of last.pt, under the names that format 1 gave them."""
        names = {"scored": self.evaluated_at, "highest": self.best}
        return {"step": self.step, "scores": self.scores} | names

    @classmethod
    def from_dict(cls, content: dict) -> "Progress":
        best = tuple(content["highest"])
        return cls(content["step"], content["scored"], content["scores"], best)


# ---------------------------------------------------------------------------------------------


def pack(model: nn.Module, tokenizer, meta, config: dict, **rest) -> dict:
    """Return the content of ckpt.pt: a ClipLM, its Tokenizer, its dataset's Meta, and the rest."""
    return {
        "format": FORMAT,
        "model": model.state_dict(),
        "model_config": asdict(model.cfg),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
        "meta": asdict(meta),
        "config": config,
        **rest,
    }


def save(path: Path, content: dict) -> None:
    """Write a checkpoint; the previous one stays until the new one is whole."""
    with replacing(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch.save hides the OSError behind its own
            raise error.__context__ or error from None


def load(path: Path | str) -> dict:
    """Return the content of a checkpoint, on the CPU.

    Every record's CRC is checked, which PyTorch's reader does not do, and `weights_only` keeps a
    foreign file from running code. Raises UserError for a file that is damaged, or not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found or a folder: give a file of train.py, such as ckpt.pt")
    try:
        if path.suffix == ".safetensors":
            content = load_exported(path)
        else:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise UserError(f"{path} is damaged (in {broken}): use another copy")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than weights and settings: not loaded") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError, KeyError,
            TypeError, AttributeError, OSError) as error:  # fmt: skip
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from None
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    if not is_ours or not all(isinstance(content.get(name), kind) for name, kind in KINDS.items()):
        raise UserError(f"{path} is not a nanoCaption checkpoint of format {FORMAT}")
    return content


def load_exported(path: Path) -> dict:
    """Return the content of a checkpoint that parts/export.py wrote, from its weights' path and
    the files next to it."""
    extras("safetensors")
    from safetensors.torch import load_file

    content = read_json(path.with_name("config.json"))
    if "sha256" not in content:
        raise UserError(f"{path} is for transformers: give one that was exported without --gpt2")
    for name, digest in content["sha256"].items():
        if sha256(path.with_name(name)) != digest:
            raise UserError(f"{path.with_name(name)} is damaged: use another copy")
    weights = load_file(path)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one tensor, saved once
    tokenizer = bytearray(path.with_name("tokenizer.model").read_bytes())
    return content | {"model": weights, "tokenizer": torch.frombuffer(tokenizer, dtype=torch.uint8)}


def fill(model: nn.Module, weights: dict, path: Path | str) -> None:
    """Load weights into the model, all of them and no others. Raise UserError if they differ."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: its weights do not fit its settings: {reason}") from None


def changed_settings(before: dict, now: dict, ignored: tuple[str, ...]) -> list[str]:
    """Return a line for each setting that differs, except the ignored ones."""
    return [
        f"{name} was {value}, is {now.get(name)}"
        for name, value in before.items()
        if name not in ignored and now.get(name) != value
    ]


def move_earlier_run(folder: Path) -> None:
    """Move the checkpoints and log of an earlier run in `folder`, which is not resumed, to
    `folder`/previous, or previous-2 and so on if there are earlier ones."""
    names = [name for name in ("ckpt.pt", "last.pt", "log.jsonl") if (folder / name).exists()]
    if not names:
        return
    previous = folder / "previous"
    numbers = itertools.count(2)
    while previous.exists():
        previous = folder / f"previous-{next(numbers)}"
    previous.mkdir()
    for name in names:
        os.replace(folder / name, previous / name)
    print(f"{folder} holds an earlier run: moved its files to {previous}")
