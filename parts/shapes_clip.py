"""What trained the tiny CLIP in assets/.

    python -m parts.shapes_clip --train_clip

LOG.md says which settings made the CLIP in assets/, and how long each fact takes to be learned.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import json
import math
import random
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import configure
from parts import shapes
from parts.common import UserError, append, run, write_text
from parts.shapes import Scene, Spot

FAMILY = 8  # scenes: a base scene, and copies or variants of it that change one property


@dataclass(frozen=True)
class ShapesConfig:
    """Settings of `python -m parts.shapes_clip`."""

    train_clip: bool = False  # train the tiny CLIP and write it to `out`
    out: str = "assets/shapes-clip"  # the folder, in transformers' format
    start: str = ""  # folder of a CLIP to continue from; empty: a new one
    families: int = 20000  # of eight scenes to render
    batch: int = 32  # families per step, so that a batch holds eight times as many pairs
    steps: int = 5000
    learning_rate: float = 1.5e-3
    warmup: int = 300
    seed: int = 1


# ---------------------------------------------------------------------------------------------
# The model


def open_clip(cfg: ShapesConfig, scenes: list[Scene], rng: random.Random):
    """Return the CLIP to train, its tokenizer and its image processor: those of `cfg.start`, or an
    untrained CLIP of 1.0 million parameters. The latter two are saved in `cfg.out`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = Path(cfg.out)
    if cfg.start:
        shutil.copytree(cfg.start, folder, dirs_exist_ok=True)
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        return model, tokenizer, CLIPImageProcessor.from_pretrained(folder)
    # CLIP's tokenizer is a BPE whose words end in </w>; with this few words, each becomes a token.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=special,
                                  end_of_word_suffix="</w>", show_progress=False)  # fmt: skip
    texts = [text for scene in scenes[::7] for text in shapes.write_captions(scene, rng)]
    bpe.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    tokenizer.save_pretrained(folder)
    square = {"height": 48, "width": 48}
    processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=square)
    processor.save_pretrained(folder)
    vision = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, image_size=48,
                  num_attention_heads=4, patch_size=8, projection_dim=128)  # fmt: skip
    text = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=32, projection_dim=128, vocab_size=len(tokenizer),
                pad_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    config = CLIPConfig(projection_dim=128, vision_config=vision, text_config=text)
    model = CLIPModel._from_config(config, attn_implementation="eager")
    # Position embeddings start as large as the patches'. From transformers' small random numbers,
    # the class token never learned to read them, so that CLIP learned no relations.
    embedding = model.vision_model.embeddings.position_embedding.weight.data[1:]
    index = torch.cartesian_prod(torch.arange(6), torch.arange(6))  # (36, 2)
    angles = (index + 0.5) / 6 * math.pi
    waves = angles[:, :, None] * torch.arange(1, 33) / 4  # (36, 2, 32)
    embedding.copy_(0.4 * torch.cat((waves.sin(), waves.cos()), -1).flatten(1))
    return model, tokenizer, processor


# ---------------------------------------------------------------------------------------------
# The data


def make_families(n: int, rng: random.Random) -> list[Scene]:
    """Return n families of eight scenes, end to end. Each scene differs from the first of its
    family in at most one change."""
    scenes: list[Scene] = []
    for _ in range(n):
        base = shapes.make_scene(rng)
        while rng.random() < 0.6 and not base.relation:  # the hardest fact is rare: oversample it
            base = shapes.make_scene(rng)
        is_single = len(base.objects()) == 1
        same = 4 if is_single else 1  # the same scene, its object elsewhere
        scenes += [base] * same
        scenes += [shapes.make_variant(base, rng) for _ in range(FAMILY - same)]
    return scenes


def clip_caption(
    scene: Scene, spots: list[Spot], unsaid: set[str], rng: random.Random
) -> tuple[str, tuple]:
    """Return a caption for CLIP to learn from, and what it states, as a key.

    Unlike `shapes.write_caption`, it says where a single object is: from relations of two objects
    alone, CLIP did not learn to look at positions. And as captions on the web do, it leaves things
    out: those in `unsaid` ("background", "size", "colour"). A caption of shapes alone makes shape a
    direction of its own, not a property of each colour.
    """
    blank = dict.fromkeys(unsaid, "")
    background = blank.pop("background", scene.background)
    groups = tuple(replace(group, **blank) for group in scene.groups)
    partial = replace(scene, background=background, groups=groups)
    text = shapes.write_caption(partial, rng)
    side = None  # of the image on which a single object lies
    if len(spots) == 1:
        x, y, _ = spots[0]
        offsets = {"below": y - 0.5, "above": 0.5 - y, "right of": x - 0.5, "left of": 0.5 - x}
        side = max(offsets, key=offsets.get)
        text = f"{shapes.noun_phrase(groups[0], rng)} {shapes.SIDES[side]}"
        if background:
            text += f" on a {background} background"
    return text, (side, *shapes.scene_facts(partial))


def augment(pixels: np.ndarray, rng: random.Random) -> torch.Tensor:
    """Return pixels (B, side, side, 3) as (B, 3, side, side) in 0..1.05. Shift all images alike,
    and scale each image's channels by .95 to 1.05."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    side = x.size(-1)
    top, left = rng.randint(0, 4), rng.randint(0, 4)
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[..., top : top + side, left : left + side]
    return x * torch.empty(len(x), 3, 1, 1).uniform_(0.95, 1.05)


# ---------------------------------------------------------------------------------------------
# Training


def contrast(logits: torch.Tensor, keys: list[tuple]) -> tuple[torch.Tensor, ...]:
    """Return the contrastive loss of images and texts with logits (B, B), the least it can be, and
    the share of images whose most likely text is right.

    Pairs with equal keys count as each other's positives.
    """
    label = torch.tensor([keys.index(key) for key in keys])
    same = (label[:, None] == label[None, :]).float()  # (B, B)
    target = same / same.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    is_right = same.gather(1, logits.argmax(1, keepdim=True))
    return loss, same.sum(1).log().mean(), is_right.mean()


def train_clip(cfg: ShapesConfig) -> None:
    """Train the tiny CLIP by the contrastive loss of Radford et al. (2021) and save it.

    A batch holds whole families of scenes that differ in one fact. Without them, colour and size
    suffice to tell the scenes of a batch apart, and shape is learned late or never. Every image
    has two captions: one states everything, the other leaves things out (see clip_caption).
    """
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(cfg.seed)
    rng = random.Random(f"clip/{cfg.seed}")
    scenes = make_families(cfg.families, rng)
    model, tokenizer, processor = open_clip(cfg, scenes, rng)
    spots = [shapes.place_objects(scene, rng) for scene in scenes]
    side = processor.crop_size["height"]
    pixels = np.empty((len(scenes), side, side, 3), np.uint8)
    for i in tqdm(range(len(scenes)), desc="rendering", unit="image"):
        image = shapes.render(scenes[i], rng, spots=spots[i])
        pixels[i] = np.asarray(image.resize((side, side), resample=3))
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    params = dict(model.named_parameters())
    decay = [p for name, p in params.items() if p.dim() >= 2 and "position" not in name]
    rest = [p for name, p in params.items() if p.dim() < 2 or "position" in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, cfg.warmup, cfg.steps)
    out = Path(cfg.out)
    began = time.time()
    order: list[int] = []
    write_text(out / "train_log.jsonl", "")
    bar = tqdm(range(1, cfg.steps + 1), desc="training", unit="step")
    for step in bar:
        if len(order) < cfg.batch:
            order = rng.sample(range(cfg.families), cfg.families)
        families = [order.pop() for _ in range(cfg.batch)]
        batch = [FAMILY * family + j for family in families for j in range(FAMILY)]
        x = (augment(pixels[batch], rng) - mean) / std  # (B, 3, side, side)
        with torch.autocast("cpu", torch.bfloat16):
            images = model.visual_projection(model.vision_model(x).pooler_output)
        images = F.normalize(images.float(), dim=-1)  # (B, D)
        unsaid = {name for name in ("background", "size", "colour") if rng.random() < 0.5}
        total = 0.0
        for left_out in (unsaid, set()):
            pairs = [clip_caption(scenes[i], spots[i], left_out, rng) for i in batch]
            inputs = tokenizer([text for text, _ in pairs], padding=True, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16):
                texts = model.text_projection(model.text_model(**inputs).pooler_output)
            texts = F.normalize(texts.float(), dim=-1)  # (B, D)
            logits = model.logit_scale.exp() * images @ texts.T  # (B, B)
            loss, floor, accuracy = contrast(logits, [key for _, key in pairs])
            total = total + loss
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 0 or step == cfg.steps:
            row = {"step": step, "loss": loss.item(), "floor": floor.item(),
                   "accuracy": accuracy.item(), "scale": model.logit_scale.exp().item(),
                   "minutes": (time.time() - began) / 60}  # fmt: skip
            bar.set_postfix(loss=row["loss"] - row["floor"], accuracy=row["accuracy"])
            line = json.dumps({name: round(x, 4) for name, x in row.items()})
            append(out / "train_log.jsonl", line + "\n")
    model.half().save_pretrained(out)


def main(cfg: ShapesConfig) -> None:
    if not cfg.train_clip:
        raise UserError("nothing to do: give --train_clip (--help lists all settings)")
    train_clip(cfg)


if __name__ == "__main__":
    run(lambda: main(configure(ShapesConfig, sys.argv[1:], __doc__, files=False)))
