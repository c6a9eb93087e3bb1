"""Checkpoints: written whole, loaded without running anything, checked before they are used.

ckpt.pt  to share: weights, model settings, tokenizer, the dataset's meta.json, config, scores.
last.pt  to go on from: that plus optimizer, gradient scaler, average, random states, best score.
"""

import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError, from_dict
from data import Tokenizer, replacing
from model import ClipLM, ModelConfig

FORMAT = 1


def pack(model: ClipLM, tokenizer: Tokenizer, meta: dict, config: dict, **rest) -> dict:
    """The content of ckpt.pt; `rest` is added to it."""
    return {
        "format": FORMAT,
        "model": model.state_dict(),
        "model_config": asdict(model.cfg),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
        "meta": meta,
        "config": config,
        **rest,
    }


def save(path: Path, content: dict) -> None:
    """Writes a checkpoint; the one before stays until the new one is whole."""
    with replacing(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch, closing the archive, covers up what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load(path: Path | str) -> dict:
    """The content of a checkpoint, on the CPU.

    Every record's CRC is checked, for PyTorch's reader does not, and `weights_only` keeps a
    foreign file from running code. Raises UserError for a file that is not whole, or not ours.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a checkpoint in it, such as {path}/ckpt.pt")
    if not path.is_file():
        raise UserError(
            f"{path} not found: train.py writes it, run `python train.py config/<name>.py`"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise UserError(f"{path} is damaged (in {broken}): use another copy")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than weights and settings: not loaded") from None
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} could not be read as a checkpoint: {reason}") from None
    wanted = {"model": dict, "model_config": dict, "tokenizer": torch.Tensor, "meta": dict,
              "config": dict}  # fmt: skip
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a nanoCaption checkpoint of format {FORMAT}")
    for key, kind in wanted.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} has no usable `{key}`: not a nanoCaption checkpoint")
    return content


def build(content: dict, path: Path | str) -> tuple[ClipLM, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a loaded checkpoint.

    Raises UserError where the parts do not fit each other.
    """
    tokenizer = Tokenizer(content["tokenizer"].numpy().tobytes(), f"the tokenizer in {path}")
    cfg = from_dict(ModelConfig, content["model_config"], f"{path}: model_config")
    if len(tokenizer) != cfg.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} ids, the model {cfg.vocab_size}"
        )
    model = ClipLM(cfg)
    fill(model, content["model"], path)
    for p in model.parameters():
        if p.dim() == 2 and p.size(0) > p.size(1):  # by columns, a CPU decodes faster (LOG.md)
            p.data = p.data.T.contiguous().T
    return model.eval(), tokenizer


def fill(model: ClipLM, weights: dict, path: Path | str) -> None:
    """Loads weights into the model, all of them and no others."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: the weights do not fit the settings beside them: {reason}"
        ) from None
