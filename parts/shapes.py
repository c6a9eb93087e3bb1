"""The built-in dataset: small scenes whose facts are known, so that captions can be checked.

    python prepare.py config/shapes.py              # renders, encodes and tokenizes it
    python -m parts.shapes_clip --help              # how the tiny CLIP in assets/ was trained

A scene is one or two groups of identical objects, three objects at most, on a plain background:
"two small red circles and a large blue cross on a black background". Every caption states every
fact; its words and their order vary. Four colour-shape pairs (`NOVEL`) occur in no training image,
neither the captioner's nor CLIP's.
"""

import cmath
import io
import itertools
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

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
COUNTS = (1, 2, 3)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
VALUES = {"background": list(BACKGROUNDS), "relation": list(OPPOSITE), "size": list(SIZES),
          "colour": list(COLOURS), "shape": SHAPES, "count": COUNTS}  # fmt: skip
NOVEL = {("red", "cross"), ("yellow", "square"), ("green", "ring"), ("blue", "triangle")}


@dataclass(frozen=True)
class Group:
    """`count` objects of the same size, colour and shape."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two groups. If each is a single object, `relation` says where the first one is, as
    seen from the second."""

    background: str
    groups: tuple[Group, ...]
    relation: str | None = None

    def objects(self) -> list[Group]:
        """Return each object's group."""
        return [group for group in self.groups for _ in range(group.count)]

    def is_valid(self, novel: bool = False) -> bool:
        """Whether the scene keeps the dataset's rules; `novel`: its first pair is held out."""
        n = len(self.groups)
        is_pair = [group.count for group in self.groups] == [1, 1]
        return (
            [(g.colour, g.shape) in NOVEL for g in self.groups] == [novel, False][:n]
            and len(self.objects()) <= 3
            and len({g.shape for g in self.groups}) == len({g.colour for g in self.groups}) == n
            and is_pair == (self.relation is not None)
        )


def make_scene(rng: random.Random, novel: bool = False) -> Scene:
    """Return a random scene; with `novel`, its first group is a held-out colour-shape pair."""
    while True:
        groups = []
        for _ in range(rng.choice((1, 2, 2))):
            count = rng.choices(COUNTS, (4, 2, 1))[0]
            rest = [rng.choice(VALUES[name]) for name in ("size", "colour", "shape")]
            groups.append(Group(count, *rest))
        if novel:
            colour, shape = rng.choice(sorted(NOVEL))
            groups[0] = replace(groups[0], colour=colour, shape=shape)
        relation = None
        if [g.count for g in groups] == [1, 1]:
            relation = rng.choice(list(OPPOSITE))
        scene = Scene(rng.choice(list(BACKGROUNDS)), tuple(groups), relation)
        if scene.is_valid(novel):
            return scene


def make_variant(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one fact changed: a hard negative, from which CLIP learns that fact."""
    changes = ["background", "size"] + ["colour", "count"] * 2 + ["shape"] * 4
    if len(scene.groups) == 2:
        changes += ["swap"] * 4
    if scene.relation:
        changes += ["relation"] * 6
    while True:
        change = rng.choice(changes)
        groups = list(scene.groups)
        i = rng.randrange(len(groups))
        of_scene = {}
        if change == "swap":  # the same words, but each is said of the other group
            name = rng.choice(("colour", "colour", "size", "count"))
            first, second = (getattr(group, name) for group in groups)
            groups = [replace(groups[0], **{name: second}), replace(groups[1], **{name: first})]
        elif change in ("background", "relation"):
            of_scene[change] = rng.choice(VALUES[change])
        else:
            groups[i] = replace(groups[i], **{change: rng.choice(VALUES[change])})
        variant = replace(scene, groups=tuple(groups), **of_scene)
        if variant != scene and variant.is_valid():
            return variant


# ---------------------------------------------------------------------------------------------
# Pictures

SIDE = 96  # pixels of an image's side
DIRECTIONS = {"left of": -1, "right of": 1, "above": -1j, "below": 1j, None: 0}  # x + iy
OUTLINES = {  # corners for radius 1, as x + iy; an arm of the cross is .7 wide and 1 long
    "square": [cmath.rect(1.15, math.pi * i / 4) for i in (1, 3, 5, 7)],
    "triangle": [cmath.rect(1.2, math.pi * i / 6) for i in (-3, 1, 5)],
    "cross": [1j**i * corner for i in range(4) for corner in (1 - 0.35j, 1 + 0.35j, 0.35 + 0.35j)],
}
Spot = tuple[float, float, float]  # x, y and radius of an object, as shares of the image's side


def place_objects(scene: Scene, rng: random.Random) -> list[Spot]:
    """Return a spot for each object, apart from each other and as the relation has it."""
    while True:
        spots: list[Spot] = []
        for group in scene.objects():
            r = rng.uniform(*SIZES[group.size])
            x = rng.uniform(1.2 * r, 1 - 1.2 * r)
            y = rng.uniform(1.2 * r, 1 - 1.2 * r)
            spots.append((x, y, r))
        pairs = itertools.combinations(spots, 2)
        if all(is_clear(*pair, scene.relation) for pair in pairs):
            return spots


def is_clear(first: Spot, second: Spot, relation: str | None) -> bool:
    """Whether two objects are apart, and the first clearly in the relation to the second."""
    offset = complex(first[0] - second[0], first[1] - second[1])
    is_apart = abs(offset) >= 1.2 * (first[2] + second[2])
    along = offset * DIRECTIONS[relation].conjugate()  # its real part lies in the direction
    return is_apart and along.real >= 1.7 * abs(along.imag)


def render(scene: Scene, rng: random.Random, spots: list[Spot] | None = None):
    """Return the scene as a PIL RGB image of SIDE x SIDE pixels, its objects at `spots`."""
    from PIL import Image, ImageDraw

    def shade(rgb, spread):
        return tuple(max(0, min(255, c + rng.randint(-spread, spread))) for c in rgb)

    scale = 2 * SIDE  # drawn at twice the size and averaged down, so that edges are smooth
    background = shade(BACKGROUNDS[scene.background], 10)
    image = Image.new("RGB", (scale, scale), background)
    draw = ImageDraw.Draw(image)
    spots = spots or place_objects(scene, rng)
    for group, spot in zip(scene.objects(), spots, strict=True):
        x, y, r = (scale * number for number in spot)
        fill = shade(COLOURS[group.colour], 20)
        if group.shape in ("circle", "ring"):
            draw.circle((x, y), r, fill)
        else:
            turned = cmath.rect(r, rng.uniform(-0.12, 0.12))
            outline = [complex(x, y) + turned * corner for corner in OUTLINES[group.shape]]
            draw.polygon([(corner.real, corner.imag) for corner in outline], fill)
        if group.shape == "ring":
            draw.circle((x, y), 0.58 * r, background)
    return image.reduce(2)


# ---------------------------------------------------------------------------------------------
# Captions

WORDS = {  # how each value may be said
    1: ("a", "a", "one"),
    2: ("two", "two", "a pair of"),
    3: ("three", "three", "a trio of"),
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
SIDES = {  # where the first object is; the second is on the opposite side
    "left of": "on the left",
    "right of": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}
# How often the first object is named first: mostly if it is on the left or at the top. If captions
# named either first equally often, the right word would depend on image and order together. The
# decoder did not learn that in the demo's time.
FIRST = {None: 0.5, "left of": 0.8, "above": 0.8, "right of": 0.2, "below": 0.2}


def noun_phrase(group: Group, rng: random.Random) -> str:
    """Return a noun phrase for the group, such as "a pair of tiny red crosses"."""
    size = ""
    if group.size:
        size = rng.choice(WORDS[group.size])
    count = rng.choice(WORDS[group.count])
    noun = group.shape
    if group.count > 1:
        noun += "es" if noun.endswith("s") else "s"
    return " ".join(filter(None, (count, size, group.colour, noun)))


def write_caption(scene: Scene, rng: random.Random) -> str:
    """Return one caption that states every fact of the scene. An empty size, colour or background
    is left out."""
    groups = list(scene.groups)
    relation = scene.relation
    if rng.random() > FIRST[relation]:  # the same relation, as seen from the other object
        groups.reverse()
        relation = OPPOSITE.get(relation)
    phrases = [noun_phrase(group, rng) for group in groups]
    if relation and rng.random() < 0.5:
        text = f"{phrases[0]} {SIDES[relation]} and {phrases[1]} {SIDES[OPPOSITE[relation]]}"
    elif relation:
        text = f"{phrases[0]} {rng.choice(WORDS[relation])} {phrases[1]}"
    else:
        text = rng.choice((" and ", " and ", " with ")).join(phrases)
    background = scene.background
    if not background:
        return text
    verb = "is" if groups[0].count == 1 else "are"
    sentences = (
        f"{text} on a {background} background",
        f"{text} on a {background} background",
        f"{text} against a {background} backdrop",
        f"a picture of {text} on a {background} background",
        f"there {verb} {text} on a {background} background",
        f"a {background} picture with {text}",
        f"on a {background} background there {verb} {text}",
    )
    return rng.choice(sentences)


def write_captions(scene: Scene, rng: random.Random, n: int = 5) -> list[str]:
    """Return `n` different captions of the scene."""
    captions: dict[str, None] = {}
    while len(captions) < n:
        captions[write_caption(scene, rng)] = None
    return list(captions)


# ---------------------------------------------------------------------------------------------
# Facts: those of a scene, and those that a caption states


def scene_facts(scene: Scene) -> list[str]:
    """Return what is true of the scene: "circle: red", "circle: 2", "circle left of ring", ..."""
    facts = [f"background: {scene.background}"]
    for g in scene.groups:
        facts += [f"{g.shape}: {g.colour}", f"{g.shape}: {g.size}", f"{g.shape}: {g.count}"]
    if scene.relation:
        first, second = scene.groups
        facts.append(relation_fact(first.shape, scene.relation, second.shape))
    return sorted(facts)


def relation_fact(first: str, relation: str, second: str) -> str:
    """Return a relation as a fact; right of and below become left of and above, reversed."""
    if relation in ("right of", "below"):
        return f"{second} {OPPOSITE[relation]} {first}"
    return f"{first} {relation} {second}"


MEANING = {word: value for value, words in WORDS.items() for word in words} | {"an": 1}
MEANING |= {side: relation for relation, side in SIDES.items()}
MEANING |= {word: word for word in (*COLOURS, *SHAPES, *BACKGROUNDS)}


def words_for(values) -> str:
    """Return a regular expression for the words that mean one of the values, longest first."""
    words = [word for word, value in MEANING.items() if value in values]
    return "|".join(sorted(words, key=len, reverse=True))


NOUN_PHRASE = re.compile(
    rf"\b(?:({words_for(COUNTS)}) )?(?:({words_for(SIZES)}) )?"
    rf"(?:({words_for(COLOURS)}) )?({words_for(SHAPES)})(?:e?s)?\b"
)
RELATION = re.compile(rf"\b({words_for(OPPOSITE)})\b")
BACKGROUND = re.compile(rf"\b({words_for(BACKGROUNDS)})\b")


def stated_facts(text: str) -> set[str]:
    """Return the facts that a caption states, in the form of `scene_facts`. Any text will do."""
    text = " ".join(re.sub(r"[^a-z ]", " ", text.lower()).split())
    facts = {f"background: {background}" for background in BACKGROUND.findall(text)}
    nouns = list(NOUN_PHRASE.finditer(text))
    for noun in nouns:
        *words, shape = noun.groups()  # count, size and colour, each None if left out
        facts |= {f"{shape}: {MEANING[word]}" for word in words if word}
    for first, second in zip(nouns, nouns[1:], strict=False):
        relation = RELATION.search(text, first.end(), second.start())
        if relation:
            facts.add(relation_fact(first[4], MEANING[relation[1]], second[4]))
    return facts


KIND_OF = {str(value): kind for kind, values in VALUES.items() for value in values}


def of_kind(facts: set[str], kind: str) -> set[str]:
    """Return the facts of one kind. `shape` is that a shape is there, which its other facts say."""
    pairs = [(fact, *fact.split(": ")) for fact in facts if ": " in fact]
    if kind == "relation":
        return facts - {fact for fact, _, _ in pairs}
    if kind == "shape":
        return {subject for _, subject, _ in pairs if subject in SHAPES}
    return {fact for fact, _, value in pairs if KIND_OF[value] == kind}


def score_facts(captions: list[str], truths: list[list[str]]) -> dict[str, float | dict]:
    """Return precision, recall and F1, in 0..1, of the facts that captions state, over all images,
    and `by_kind` the F1 of each kind of fact that occurs; `truths` holds the facts of each
    caption's scene."""
    stated = [stated_facts(caption) for caption in captions]
    true = [set(truth) for truth in truths]
    scores: dict[str, float | dict] = precision_recall(stated, true)
    scores["by_kind"] = {}
    for kind in VALUES:
        own = [of_kind(facts, kind) for facts in stated]
        others = [of_kind(facts, kind) for facts in true]
        if any(own + others):
            scores["by_kind"][kind] = precision_recall(own, others)["f1"]
    return scores


def precision_recall(stated: list[set[str]], true: list[set[str]]) -> dict[str, float]:
    """Return precision, recall and F1, in 0..1, of stated facts, over all images."""
    correct = sum(len(own & facts) for own, facts in zip(stated, true, strict=True))
    precision = correct / max(1, sum(map(len, stated)))
    recall = correct / max(1, sum(map(len, true)))
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


# ---------------------------------------------------------------------------------------------
# The dataset


def build(images: Path, counts: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """Render `counts[split]` scenes of each split as PNG files below the folder `images`, and
    return each split's list of {"file_name", "captions", "facts"}.

    Scene i of a split depends on (seed, split, i) alone. The split `novel` shows held-out pairs.
    """
    splits: dict[str, list[dict]] = {}
    for split, n in counts.items():
        (images / split).mkdir(parents=True, exist_ok=True)
        splits[split] = []
        for i in tqdm(range(n), desc=f"rendering {split}", unit="image"):
            rng = random.Random(f"{seed}/{split}/{i}")
            scene = make_scene(rng, novel=split == "novel")
            name = f"{split}/{i:05d}.png"
            image = io.BytesIO()
            render(scene, rng).save(image, "png")
            # An unchanged file keeps its time stamp, so that its embedding stays valid.
            if not (images / name).is_file() or (images / name).read_bytes() != image.getvalue():
                (images / name).write_bytes(image.getvalue())
            captions = write_captions(scene, rng)
            facts = scene_facts(scene)
            splits[split].append({"file_name": name, "captions": captions, "facts": facts})
    return splits
