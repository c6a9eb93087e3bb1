"""Write a checkpoint as a folder that can be shared: safetensors, the tokenizer, and a card.

    python -m parts.export out/coco/ckpt.pt --to=FOLDER           # for sample.py --ckpt FOLDER
    python -m parts.export out/coco/ckpt.pt --to=FOLDER --gpt2    # for transformers alone

Run it in the repository's folder. With --gpt2, the decoder is a GPT-2 that transformers opens,
prefix.safetensors is the mapper, and the card, README.md, has the code that captions an image with
them; an encoder that is a folder is copied. Needs the extras: pip install -r requirements-clip.txt
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configurator import Config, configure, from_dict
from data import Meta
from decode import default_max_len, load_captioner
from model import ClipLM
from parts.common import UserError, extras, or_shipped, run, sha256, write_text
from parts.encoder import OUTPUTS, TOWERS
from parts.gpt2 import as_gpt2, save_tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `python -m parts.export`."""

    ckpt: str  # a checkpoint that train.py wrote
    to: str  # the folder to write, new or empty
    gpt2: bool = False  # for transformers: a GPT-2 and the mapper


def main(cfg: ExportConfig) -> None:
    extras()
    from safetensors.torch import save

    model, tokenizer, content = load_captioner(cfg.ckpt)
    meta = from_dict(Meta, content["meta"], f"{cfg.ckpt}: meta")
    if cfg.gpt2 and (meta.features != "pooled" or meta.encoder_kind not in OUTPUTS):
        raise UserError(f"{cfg.ckpt}: --gpt2 needs pooled embeddings of CLIP or SigLIP")
    folder = Path(cfg.to)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder")
    longest = default_max_len(model.cfg, meta.longest_caption)
    if cfg.gpt2:
        write_gpt2(folder, model, tokenizer, longest)
        (folder / "prefix.safetensors").write_bytes(save(model.mapper.state_dict()))
        encoder = Path(or_shipped(meta.encoder))
        if encoder.is_dir():
            shutil.copytree(encoder, folder / "encoder")
            meta = replace(meta, encoder="./encoder")
        usage = gpt2_usage(model, meta)
    else:
        weights = model.state_dict()
        del weights["lm_head.weight"]  # it is the token embeddings'
        (folder / "model.safetensors").write_bytes(save(weights))
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        names = ("format", "model_config", "meta", "config", "step", "scores", "metrics")
        kept = {name: content.get(name) for name in names}
        kept["sha256"] = {path.name: sha256(path) for path in folder.iterdir()}
        write_text(folder / "config.json", json.dumps(kept, indent=1))
        images = "--image photo.jpg" if meta.encoder else "--split val"
        usage = f"```sh\npython sample.py --ckpt {folder.name} {images}\n```"
    write_text(folder / "README.md", card(model, meta, content, usage, longest) + "\n")
    print(f"wrote {folder}/")


def write_gpt2(folder: Path, model: ClipLM, tokenizer, longest: int) -> None:
    """Write decoder and tokenizer as transformers reads them, with the settings by which its
    `generate` finds our greedy captions."""
    from transformers import GenerationConfig

    gpt2 = as_gpt2(model)
    gpt2.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad,
        suppress_tokens=sorted({tokenizer.bos, tokenizer.pad, tokenizer.unk}),
        min_new_tokens=1, max_new_tokens=longest,
    )  # fmt: skip
    gpt2.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


# ---------------------------------------------------------------------------------------------
# The card


def template(name: str) -> str:
    return Path(or_shipped(f"assets/{name}")).read_text(encoding="utf-8").strip()


def gpt2_usage(model: ClipLM, meta: Meta) -> str:
    """Return the code that captions photo.jpg with transformers alone."""
    layers = ", ".join(f"torch.nn.{layer}" for layer in model.mapper.children())
    mapper = f"torch.nn.Sequential({layers})" if layers else f"torch.nn.{model.mapper}"
    scaled = f"x / x.norm() * {meta.embedding_dim} ** 0.5" if meta.normalize else "x"
    return template("card_gpt2.md").format(
        encoder=meta.encoder, tower=TOWERS[meta.encoder_kind], output=OUTPUTS[meta.encoder_kind],
        scaled=scaled, **asdict(model.cfg) | {"mapper": mapper},
    )  # fmt: skip


def card(model: ClipLM, meta: Meta, content: dict, usage: str, longest: int) -> str:
    """Return the text of README.md."""
    config = content["config"]
    validation = meta.splits["val"]["images"]
    data = [f"{split} {n['images']} images, {n['captions']} captions"
            for split, n in meta.splits.items()]  # fmt: skip
    settings = [f"{name} = {value!r}" for name, value in config.items()
                if value != getattr(Config, name, None)]  # fmt: skip
    scores = [f"{name} {value:.4f}" for name, value in content["scores"].items()]
    return template("card.md").format(
        **asdict(model.cfg) | asdict(meta) | {"encoder": meta.encoder or "another program"},
        P=model.cfg.prefix_length, usage=usage, data="; ".join(data), longest=longest,
        settings="\n".join(settings), scores="\n".join(scores), step=content["step"],
        captioned=min(config["eval_images"] or validation, validation), validation=validation,
        metrics=content.get("metrics") or "unknown",
    )  # fmt: skip


if __name__ == "__main__":
    run(lambda: main(configure(ExportConfig, sys.argv[1:], __doc__, positional="ckpt")))
