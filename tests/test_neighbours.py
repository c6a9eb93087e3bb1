"""Borrowed captions and CLIPScore: the oracle is brute force, or known figures."""

import json
import random

import numpy as np
import pytest
import torch
from helpers import ROOT

import metrics
from data import Meta
from parts import neighbours, shapes
from parts.common import UserError
from parts.encoder import Encoder
from parts.neighbours import ImageText, Neighbours

FLICKR8K = ROOT.parent / "shared" / "flickr8k"
SHAPES_CLIP = str(ROOT / "assets" / "shapes-clip")

# ---------------------------------------------------------------------------------------------
# Neighbours


@pytest.mark.parametrize("positions", [1, 3])
def test_neighbours_are_those_of_brute_force(monkeypatch, positions):
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    rng = np.random.default_rng(0)
    training = rng.standard_normal((40, positions, 5)).astype(np.float16)
    queries = rng.standard_normal((6, positions, 5)).astype(np.float16)
    captions, strings = [[f"Caption {i}"] for i in range(40)], [[f"{i}"] for i in range(40)]
    lender = Neighbours(training, captions, strings, 9)
    x, y = queries.astype(float).mean(1), training.astype(float).mean(1)
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in y] for a in x])
    expected = (-cosine).argsort(1)[:, :9]
    for numbers, borrowed in zip(expected, lender.borrow(torch.tensor(queries)), strict=True):
        assert borrowed == ([f"Caption {i}" for i in numbers], [f"{i}" for i in numbers])
    lender = Neighbours(training, captions, strings, 99)  # more than there are
    assert len(lender.borrow(torch.tensor(queries))[0][0]) == 40


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs shared/flickr8k")
def test_the_floor_of_flickr8k():
    """Other code measured the same CIDEr of consensus among five neighbours."""
    data = json.loads((FLICKR8K / "dataset_flickr8k.json").read_text())["images"]
    captions = {image["filename"]: [s["raw"] for s in image["sentences"]] for image in data}
    splits = {image["filename"]: image["split"] for image in data}
    names = (FLICKR8K / "filenames.txt").read_text().split()
    embeddings = np.load(FLICKR8K / "embeddings.npy", mmap_mode="r")[:, None]
    rows = {s: [i for i, n in enumerate(names) if splits[n] == s] for s in ("train", "val")}
    lent = [captions[names[i]] for i in rows["train"]]
    strings = metrics.token_strings(lent)
    cider = metrics.CiderD(strings, tokenize=str.split)
    references = {i: captions[names[i]] for i in rows["val"]}
    lender = Neighbours(embeddings[rows["train"]], lent, strings, 5)
    borrowed = lender.borrow(torch.tensor(embeddings[rows["val"]]))
    best = [own[cider.agreement(tokens).argmax()] for own, tokens in borrowed]
    corpus, _ = metrics.score(dict(zip(rows["val"], best, strict=True)), references)
    assert corpus["CIDEr"] == pytest.approx(0.351, abs=0.002)


# ---------------------------------------------------------------------------------------------
# CLIP


@pytest.fixture(scope="module")
def scenes():
    """Built-in scenes: their images and captions."""
    pytest.importorskip("transformers", reason="needs requirements-clip.txt")
    rng = random.Random(0)
    made = [shapes.make_scene(rng) for _ in range(60)]
    return [shapes.render(scene, rng) for scene in made], [
        list(shapes.write_captions(scene, rng)) for scene in made
    ]


def test_true_captions_score_above_those_of_other_scenes(scenes):
    """By the tiny CLIP: CLIPScore about 1.8 and .2, RefCLIPScore about 1.25 and .17."""
    images, captions = scenes
    judge = ImageText(Meta(**META | {"encoder": SHAPES_CLIP}), "", "cpu")
    x = judge.images(judge.encoder(images), [])
    texts = judge.texts([own[0] for own in captions])
    references = [judge.texts(own[1:]) for own in captions]
    true, other = (
        [metrics.clip_score(x[i], texts[i - shift], references[i]) for i in range(60)]
        for shift in (0, 1)
    )
    for name, margin in (("CLIPScore", 1), ("RefCLIPScore", 0.8)):
        assert np.mean([s[name] for s in true]) > np.mean([s[name] for s in other]) + margin


META = dict(
    dataset="d", source="csv", captions="", images="", encoder="", features="pooled", grid=0,
    n_positions=1, embedding_dim=128, normalize=True, lowercase=False, vocab_size=64, splits={},
)  # fmt: skip


def test_images_of_a_grid_are_read_again(scenes, tmp_path):
    """A grid's embeddings are not what CLIP compares with texts; those of the files are."""
    images, _ = scenes
    images[0].save(tmp_path / "0.png")
    grid = Meta(**META | {"encoder": SHAPES_CLIP, "features": "grid"})
    judge = ImageText(grid, "", "cpu")
    x = judge.images(torch.zeros(1, 5, 128), [str(tmp_path / "0.png")])
    expected = Encoder(SHAPES_CLIP)([images[0]])[:, 0].float().numpy()
    np.testing.assert_allclose(x, expected / np.linalg.norm(expected), atol=1e-6)
    with pytest.raises(UserError, match="CLIP needs the image files .*: set --images"):
        judge.images(torch.zeros(1, 5, 128), [""])
