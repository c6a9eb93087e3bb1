"""The built-in dataset: small scenes whose facts are known, and the training of its tiny CLIP.

    python prepare.py config/shapes.py              # renders the scenes, encodes and tokenizes them
    python shapes.py --train_clip                   # trains a tiny CLIP as the one in assets/
    python shapes.py --probe                        # what its embeddings know, by linear probes

A scene is one or two groups of like objects (one to three objects in all) on a plain background:
"two small red circles and a large blue cross on a black background". Every caption states every
fact, in words and an order that vary, so a caption can be checked fact by fact. Four colour-shape
pairs (`NOVEL`) occur in no training image, neither the captioner's nor CLIP's.
"""

import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError, configure, run
from data import write_text

# ---------------------------------------------------------------------------------------------
# Scenes

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 150, 30),
    "yellow": (245, 225, 50),
    "green": (50, 165, 70),
    "blue": (50, 95, 225),
    "purple": (150, 60, 185),
    "pink": (250, 140, 185),
    "brown": (130, 80, 40),
}
BACKGROUNDS = {"black": (15, 15, 15), "gray": (128, 128, 128), "white": (242, 242, 242)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": (0.11, 0.135), "large": (0.175, 0.205)}  # radius, as a share of the image's side
NOVEL = {("red", "cross"), ("yellow", "square"), ("green", "ring"), ("blue", "triangle")}


@dataclass(frozen=True)
class Group:
    """`count` like objects."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two groups; `relation` says where the first stands to the second, if each is one."""

    background: str
    groups: tuple[Group, ...]
    relation: str | None = None

    def is_valid(self, novel: bool = False) -> bool:
        """Whether the rules of the dataset hold; `novel`: the first pair is a held-out one."""
        first, last = self.groups[0], self.groups[-1]
        pairs = [(g.colour, g.shape) in NOVEL for g in self.groups]
        return (
            pairs == [novel] + [False] * (len(pairs) - 1)
            and sum(g.count for g in self.groups) <= 3
            and (first is last or (first.shape != last.shape and first.colour != last.colour))
            and (self.relation is None) == (first is last or first.count + last.count > 2)
        )


def make_scene(rng: random.Random, novel: bool = False) -> Scene:
    """A random scene; with `novel`, its first group is one of the held-out colour-shape pairs."""
    while True:
        groups = [
            Group(rng.choices((1, 2, 3), (4, 2, 1))[0], rng.choice(list(SIZES)),
                  rng.choice(list(COLOURS)), rng.choice(SHAPES))
            for _ in range(rng.choice((1, 2, 2)))
        ]  # fmt: skip
        if novel:
            colour, shape = rng.choice(sorted(NOVEL))
            groups[0] = replace(groups[0], colour=colour, shape=shape)
        single = len(groups) == 2 and groups[0].count == groups[1].count == 1
        relation = rng.choice(list(OPPOSITE)) if single else None
        scene = Scene(rng.choice(list(BACKGROUNDS)), tuple(groups), relation)
        if scene.is_valid(novel):
            return scene


def make_variant(scene: Scene, rng: random.Random) -> Scene:
    """`scene` with one fact changed: the hard negatives from which CLIP learns every attribute."""
    while True:
        kinds = ["background", "size"] + ["colour", "count"] * 2 + ["shape"] * 4
        kinds += ["exchange"] * 4 if len(scene.groups) == 2 else []
        kinds += ["relation"] * 6 if scene.relation else []
        what = rng.choice(kinds)
        groups = list(scene.groups)
        i = rng.randrange(len(groups))
        if what == "background":
            variant = replace(scene, background=rng.choice(list(BACKGROUNDS)))
        elif what == "relation":
            variant = replace(scene, relation=rng.choice(list(OPPOSITE)))
        elif what == "exchange":  # the same words, but whose are they?
            kind = rng.choice(("colour", "colour", "size", "count"))
            values = [getattr(g, kind) for g in reversed(groups)]
            groups = [replace(g, **{kind: v}) for g, v in zip(groups, values, strict=True)]
            variant = replace(scene, groups=tuple(groups))
        else:
            values = {"size": list(SIZES), "colour": list(COLOURS), "shape": SHAPES,
                      "count": (1, 2, 3)}[what]  # fmt: skip
            groups[i] = replace(groups[i], **{what: rng.choice(values)})
            variant = replace(scene, groups=tuple(groups))
        if variant != scene and variant.is_valid():
            return variant


# ---------------------------------------------------------------------------------------------
# Pictures


def polygon(shape: str, x: float, y: float, r: float, angle: float) -> list[tuple[float, float]]:
    """The corners of a shape of radius `r` around (x, y), turned by `angle` radians."""
    if shape == "square":
        corners = [(k * 90 + 45, 1.15) for k in range(4)]
    elif shape == "triangle":
        corners = [(k * 120 - 90, 1.2) for k in range(3)]
    else:  # a cross: an arm is .7 r wide and r long
        near, far = math.degrees(math.atan2(0.35, 1)), math.hypot(0.35, 1)
        corners = []
        for k in range(4):
            corners += [(k * 90 - near, far), (k * 90 + near, far), (k * 90 + 45, 0.35 * 2**0.5)]
    return [
        (
            x + r * s * math.cos(math.radians(a) + angle),
            y + r * s * math.sin(math.radians(a) + angle),
        )
        for a, s in corners
    ]


def place(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each object in units of the image's side, apart from each other."""
    sizes = [g.size for g in scene.groups for _ in range(g.count)]
    while True:
        spots = []
        for size in sizes:
            r = rng.uniform(*SIZES[size])
            spots.append((rng.uniform(1.2 * r, 1 - 1.2 * r), rng.uniform(1.2 * r, 1 - 1.2 * r), r))
        if any(
            math.hypot(x - u, y - v) < 1.2 * (r + s)
            for i, (x, y, r) in enumerate(spots)
            for u, v, s in spots[:i]
        ):
            continue
        if scene.relation:
            (x, y, _), (u, v, _) = spots
            across, down = x - u, y - v
            if scene.relation in ("above", "below"):
                across, down = down, across
            before = scene.relation in ("left of", "above")
            if (across < 0) != before or abs(across) < 1.7 * abs(down):
                continue
        return spots


def render(scene: Scene, rng: random.Random, side: int = 96, spots: list | None = None):
    """The scene as a PIL RGB image, `side` x `side` pixels, its objects at `spots` (see place)."""
    from PIL import Image, ImageDraw

    def shade(rgb, spread):
        return tuple(max(0, min(255, c + rng.randint(-spread, spread))) for c in rgb)

    big = side * 2  # drawn at twice the size and averaged down, so that edges are smooth
    background = shade(BACKGROUNDS[scene.background], 10)
    image = Image.new("RGB", (big, big), background)
    draw = ImageDraw.Draw(image)
    shapes = [(g.shape, g.colour) for g in scene.groups for _ in range(g.count)]
    for (shape, colour), (x, y, r) in zip(shapes, spots or place(scene, rng), strict=True):
        x, y, r, fill = x * big, y * big, r * big, shade(COLOURS[colour], 20)
        if shape in ("circle", "ring"):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            if shape == "ring":
                h = 0.58 * r
                draw.ellipse((x - h, y - h, x + h, y + h), fill=background)
        else:
            draw.polygon(polygon(shape, x, y, r, rng.uniform(-0.12, 0.12)), fill=fill)
    return image.reduce(2)


# ---------------------------------------------------------------------------------------------
# Captions, and the facts they state

WORDS = {  # how each value may be said; the first is the plain one
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
PLACES = {  # or by where each of the two stands
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "a pair of": 2, "three": 3, "a trio of": 3}


def phrase(group: Group, rng: random.Random) -> str:
    """A noun phrase for the group, such as "a pair of tiny red crosses"."""
    size = group.size and rng.choice(WORDS[group.size])
    count = rng.choice({1: ("a", "a", "one"), 2: ("two", "two", "a pair of"),
                        3: ("three", "three", "a trio of")}[group.count])  # fmt: skip
    plural = "" if group.count == 1 else "es" if group.shape.endswith("s") else "s"
    return " ".join(filter(None, (count, size, group.colour, group.shape + plural)))


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption that states every fact of the scene."""
    groups = list(scene.groups)
    relation = scene.relation
    if rng.random() < 0.5:  # the same thing said from the other side
        groups, relation = groups[::-1], relation and OPPOSITE[relation]
    phrases = [phrase(g, rng) for g in groups]
    verb = "is" if groups[0].count == 1 else "are"
    if relation and rng.random() < 0.5:
        here, there = PLACES[relation]
        joined = f"{phrases[0]} {here} and {phrases[1]} {there}"
    elif relation:
        joined = f"{phrases[0]} {rng.choice(WORDS[relation])} {phrases[1]}"
    else:
        joined = rng.choice((" and ", " and ", " with ")).join(phrases)
    ground = scene.background
    if not ground:
        return joined
    return rng.choice((
        f"{joined} on a {ground} background",
        f"{joined} on a {ground} background",
        f"{joined} against a {ground} backdrop",
        f"a picture of {joined} on a {ground} background",
        f"there {verb} {joined} on a {ground} background",
        f"a {ground} picture with {joined}",
        f"on a {ground} background there {verb} {joined}",
    ))  # fmt: skip


def captions(scene: Scene, rng: random.Random, n: int = 5) -> list[str]:
    """`n` different captions of the scene."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[caption(scene, rng)] = None
    return list(found)


def facts(scene: Scene) -> list[str]:
    """What is true of the scene, such as "circle: red", "circle: 2" or "circle left of ring"."""
    found = [f"background: {scene.background}"]
    for g in scene.groups:
        found += [f"{g.shape}: {g.colour}", f"{g.shape}: {g.size}", f"{g.shape}: {g.count}"]
    if scene.relation:
        found.append(relation_fact(scene.groups[0].shape, scene.relation, scene.groups[1].shape))
    return sorted(found)


def relation_fact(first: str, relation: str, second: str) -> str:
    """Right of and below are said as left of and above, the other way round."""
    if relation in ("right of", "below"):
        first, relation, second = second, OPPOSITE[relation], first
    return f"{first} {relation} {second}"


SAID = {word: value for value, words in WORDS.items() for word in words}
SAID |= {here: value for value, (here, _) in PLACES.items()}


def either(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


NOUN_PHRASE = re.compile(
    rf"\b(?:({either(COUNTS)}) )?(?:({either(w for s in SIZES for w in WORDS[s])}) )?"
    rf"(?:({either(COLOURS)}) )?({either(SHAPES)})(?:e?s)?\b"
)
RELATION = re.compile(rf"\b({either(w for w, r in SAID.items() if r in OPPOSITE)})\b")
BACKGROUND = re.compile(rf"\b({either(BACKGROUNDS)})\b")


def stated(text: str) -> set[str]:
    """The facts that a caption states, in the form of `facts`; any text may be given."""
    text = " ".join(re.sub(r"[^a-z ]", " ", text.lower()).split())
    found = {f"background: {b}" for b in BACKGROUND.findall(text)}
    nouns = list(NOUN_PHRASE.finditer(text))
    for noun in nouns:
        count, size, colour, shape = noun.groups()
        found |= {f"{shape}: {colour}"} if colour else set()
        found |= {f"{shape}: {SAID[size]}"} if size else set()
        found |= {f"{shape}: {COUNTS[count]}"} if count else set()
    for first, second in zip(nouns, nouns[1:], strict=False):
        said = RELATION.search(text, first.end(), second.start())
        if said:
            found.add(relation_fact(first[4], SAID[said[1]], second[4]))
    return found


def score_facts(hypotheses: list[str], truths: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1, in 0..1, of the facts that captions state, over all images."""
    said = [stated(h) for h in hypotheses]
    right = sum(len(s & set(t)) for s, t in zip(said, truths, strict=True))
    precision = right / max(1, sum(map(len, said)))
    recall = right / max(1, sum(map(len, truths)))
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


# ---------------------------------------------------------------------------------------------
# The dataset


def build(images: Path, counts: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """Renders `counts[split]` scenes of each split as PNG files below `images`.

    Scene i of a split depends on (seed, split, i) alone. The split `novel` shows held-out pairs.

    Returns, for each split, a list of {"file_name", "captions", "facts"}.
    """
    splits: dict[str, list[dict]] = {}
    for split, n in counts.items():
        (images / split).mkdir(parents=True, exist_ok=True)
        splits[split] = []
        for i in tqdm(range(n), desc=f"rendering {split}", unit="image"):
            rng = random.Random(f"{seed}/{split}/{i}")
            scene = make_scene(rng, novel=split == "novel")
            name = f"{split}/{i:05d}.png"
            render(scene, rng).save(images / name)
            splits[split].append(
                {"file_name": name, "captions": captions(scene, rng), "facts": facts(scene)}
            )
    return splits


# ---------------------------------------------------------------------------------------------
# The tiny CLIP


@dataclass(frozen=True)
class ShapesConfig:
    """Settings of `python shapes.py`."""

    train_clip: bool = False  # train the tiny CLIP and write it to `out`
    probe: bool = False  # fit linear probes to the embeddings of the CLIP in `out`
    out: str = "assets/shapes-clip"  # the folder, in transformers' format
    start: str = ""  # folder of a CLIP to go on from; empty: a new one
    families: int = 20000  # scenes rendered, each with seven variants that differ in one fact
    batch: int = 32  # families per step, so that a batch holds eight times as many pairs
    steps: int = 5000
    learning_rate: float = 1.5e-3
    warmup: int = 300
    seed: int = 1
    threads: int = 0  # CPU threads (0: torch's choice)


def new_clip(folder: Path, texts: list[str]):
    """An untrained CLIP of 1.0 million parameters, its tokenizer and its image processor."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    # CLIP's tokenizer is a BPE whose words end in </w>; with this few words, each becomes a token.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=special,
                                  end_of_word_suffix="</w>", show_progress=False)  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        projection_dim=128,
        vision_config=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                           num_attention_heads=4, image_size=48, patch_size=8, projection_dim=128),
        text_config=dict(hidden_size=96, intermediate_size=288, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=32, projection_dim=128,
                         vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id, **ids),
    )  # fmt: skip
    model = CLIPModel._from_config(config, attn_implementation="eager")
    # Places start as large as what the patches hold. From transformers' small random numbers the
    # class token never learned to read them, and with them no relation of two objects.
    embedding = model.vision_model.embeddings.position_embedding.weight.data[1:]
    at = (torch.cartesian_prod(torch.arange(6), torch.arange(6)) + 0.5) / 6 * math.pi  # (36, 2)
    waves = at[:, :, None] * torch.arange(1, 33) / 4  # (36, 2, 32)
    embedding.copy_(0.4 * torch.cat((waves.sin(), waves.cos()), -1).flatten(1))
    return model, tokenizer, processor


def whereabouts(spots: list) -> str | None:
    """Where a single object stands, as a relation to the middle; None for several."""
    if len(spots) > 1:
        return None
    across, down = spots[0][0] - 0.5, spots[0][1] - 0.5
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def clip_caption(
    scene: Scene, spots: list, unsaid: set[str], rng: random.Random
) -> tuple[str, tuple]:
    """A caption for CLIP to learn from, and what it states, as a key.

    Unlike `caption`'s, it says where a single object stands (from relations of two alone CLIP did
    not learn to look at places), and like the captions of the web it leaves things out: the kinds
    in `unsaid` ("background", "size", "colour", "place"). A caption of shapes alone makes shape a
    direction of its own, not a property of each colour.
    """
    quiet = {kind: "" for kind in ("size", "colour") if kind in unsaid}
    groups = tuple(replace(g, **quiet) for g in scene.groups)
    ground = "" if "background" in unsaid else scene.background
    relation, here = scene.relation, whereabouts(spots)
    if "place" in unsaid:
        relation = here = None
    said = Scene(ground, groups, relation)
    text = caption(said, rng)
    if here:
        text = f"{phrase(groups[0], rng)} {PLACES[here][0]}" + (
            ground and f" on a {ground} background"
        )
    return text, (here, *facts(said))


def contrast(logits, keys: list[tuple]):
    """The contrastive loss of images and texts, logits (B, B); equal keys are positives.

    Returns the loss, the least it can be, and the share of images whose likeliest text is right.
    """
    number: dict[tuple, int] = {}
    kind = torch.tensor([number.setdefault(key, len(number)) for key in keys])
    same = (kind[:, None] == kind[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    right = same.gather(1, logits.argmax(1, keepdim=True))
    return loss, same.sum(1).log().mean(), right.mean()


def train_clip(cfg: ShapesConfig) -> None:
    """Trains the tiny CLIP by the contrastive loss of Radford et al. (2021) and saves it.

    A batch holds families of eight scenes that differ in one fact, and scenes with the same facts
    count as each other's positives. Without such families colour and size suffice to tell the
    scenes of a batch apart, and shape is learned late or never. Every image has two captions: one
    states everything, the other leaves kinds of facts out (see clip_caption). LOG.md tells how
    long each thing takes to be learned.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
        get_cosine_schedule_with_warmup,
    )

    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    rng = random.Random(f"clip/{cfg.seed}")
    scenes: list[Scene] = []
    for _ in range(cfg.families):
        base = make_scene(rng)
        while rng.random() < 0.6 and not base.relation:  # the hardest fact, and a rare one
            base = make_scene(rng)
        single = sum(g.count for g in base.groups) == 1
        moved = 3 * single  # the same scene, its object elsewhere
        scenes += [base] * (1 + moved) + [make_variant(base, rng) for _ in range(7 - moved)]
    out = Path(cfg.out)
    if cfg.start:
        shutil.copytree(cfg.start, out, dirs_exist_ok=True)
        model = CLIPModel.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
        tokenizer = CLIPTokenizer.from_pretrained(out)
        processor = CLIPImageProcessor.from_pretrained(out)
    else:
        texts = [c for s in scenes[::7] for c in captions(s, rng)]
        model, tokenizer, processor = new_clip(out, texts)
        tokenizer.save_pretrained(out)
        processor.save_pretrained(out)

    side = processor.crop_size["height"]
    spots = [place(s, rng) for s in scenes]
    images = (render(s, rng, spots=at) for s, at in zip(scenes, spots, strict=True))
    images = tqdm(images, desc="rendering", total=len(scenes), unit="image")
    pixels = np.stack([np.asarray(image.resize((side, side), resample=3)) for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))

    params = dict(model.named_parameters())
    decay = [p for n, p in params.items() if p.dim() >= 2 and "position" not in n]
    rest = [p for n, p in params.items() if p.dim() < 2 or "position" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=cfg.learning_rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, cfg.warmup, cfg.steps)
    began, order = time.time(), []
    with open(out / "train_log.jsonl", "w") as log:
        bar = tqdm(range(1, cfg.steps + 1), desc="training", unit="step")
        for step in bar:
            if len(order) < cfg.batch:
                order = rng.sample(range(cfg.families), cfg.families)
            families = [order.pop() for _ in range(cfg.batch)]
            chosen = [8 * f + j for f in families for j in range(8)]
            x = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2) / 255  # (B, 3, 48, 48)
            dy, dx = rng.randint(0, 4), rng.randint(0, 4)
            x = F.pad(x, (2, 2, 2, 2), mode="replicate")[..., dy : dy + side, dx : dx + side]
            x = x * torch.empty(len(x), 3, 1, 1).uniform_(0.95, 1.05)
            with torch.autocast("cpu", torch.bfloat16):
                images = model.vision_model(pixel_values=(x - mean) / std).pooler_output
                images = F.normalize(model.visual_projection(images).float(), dim=-1)  # (B, D)
            terse = {k for k in ("background", "size", "colour") if rng.random() < 0.5}
            loss = 0.0
            for unsaid in (terse, set()):
                said = [clip_caption(scenes[i], spots[i], unsaid, rng) for i in chosen]
                texts = tokenizer([text for text, _ in said], padding=True, return_tensors="pt")
                with torch.autocast("cpu", torch.bfloat16):
                    words = model.text_projection(model.text_model(**texts).pooler_output)
                words = F.normalize(words.float(), dim=-1)
                logits = model.logit_scale.exp() * images @ words.T  # (B, B)
                whole, floor, accuracy = contrast(logits, [key for _, key in said])
                loss = loss + whole
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            if step % 100 == 0 or step == cfg.steps:
                row = {"step": step, "loss": whole.item(), "floor": floor.item(),
                       "accuracy": accuracy.item(), "scale": model.logit_scale.exp().item(),
                       "minutes": (time.time() - began) / 60}  # fmt: skip
                bar.set_postfix(loss=row["loss"] - row["floor"], accuracy=row["accuracy"])
                log.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
                log.flush()
            if step % 1000 == 0 or step == cfg.steps:
                save_half(model, out)


def save_half(model, folder: Path) -> None:
    """Saves the model in half precision; the copy in training stays as it is."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# What the embeddings know


def labels(scene: Scene) -> dict[str, str | int]:
    """What is asked of an embedding: one group's attributes; of two, who is where and in what
    colour (said of the group whose shape comes first in the alphabet)."""
    first, *others = sorted(scene.groups, key=lambda g: g.shape)
    asked: dict = {"background": scene.background}
    if not others:
        asked |= {k: getattr(first, k) for k in ("shape", "colour", "size", "count")}
    else:
        asked["colour of two"] = first.colour
    if scene.relation:
        swap = first is not scene.groups[0]
        asked["relation"] = OPPOSITE[scene.relation] if swap else scene.relation
    return asked


def probe(cfg: ShapesConfig) -> dict[str, dict[str, float]]:
    """Accuracy, in 0..1, of linear classifiers (logistic regression) on the frozen embeddings of
    new scenes, pooled and grid: {question: {"pooled", "pooled novel", "grid", "grid novel"}}."""
    from encoder import Encoder

    found: dict[str, dict[str, float]] = {}
    for features in ("pooled", "grid"):
        encoder, x, asked = Encoder(cfg.out, features), {}, {}
        for kind, n in (("train", 6000), ("test", 2000), ("novel", 2000)):
            rngs = [random.Random(f"probe/{kind}/{i}") for i in range(n)]
            scenes = [make_scene(rng, novel=kind == "novel") for rng in rngs]
            images = [render(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
            parts = [encoder(images[i : i + 250]) for i in range(0, n, 250)]
            x[kind] = torch.cat(parts).flatten(1).float()  # (n, P * D)
            asked[kind] = [labels(scene) for scene in scenes]
        mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
        for name in ("background", "shape", "colour", "size", "count", "relation", "colour of two"):
            classes = sorted({a[name] for a in asked["train"] if name in a}, key=str)
            z, y = {}, {}
            for kind, every in asked.items():
                rows = [i for i, a in enumerate(every) if name in a]
                z[kind] = (x[kind][rows] - mean) / std
                y[kind] = torch.tensor([classes.index(every[i][name]) for i in rows])
            torch.manual_seed(0)
            layer = torch.nn.Linear(x["train"].size(1), len(classes))
            optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=0.1)
            for _ in range(300):
                optimizer.zero_grad()
                F.cross_entropy(layer(z["train"]), y["train"]).backward()
                optimizer.step()
            for kind, label in (("test", features), ("novel", f"{features} novel")):
                right = (layer(z[kind]).argmax(1) == y[kind]).float().mean().item()
                found.setdefault(name, {})[label] = round(right, 3)
    for name, scores in found.items():
        print(f"{name}: " + ", ".join(f"{label} {score:.3f}" for label, score in scores.items()))
    return found


# ---------------------------------------------------------------------------------------------
# The commands


def main(cfg: ShapesConfig) -> None:
    if not (cfg.train_clip or cfg.probe):
        raise UserError("say what to do: --train_clip or --probe; --help tells more")
    if cfg.train_clip:
        train_clip(cfg)
    if cfg.probe:
        write_text(Path(cfg.out) / "probes.json", json.dumps(probe(cfg), indent=1))


if __name__ == "__main__":
    run(main, configure(ShapesConfig, sys.argv[1:], __doc__, files=False))
