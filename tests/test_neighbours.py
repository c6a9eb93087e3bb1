"""Borrowed captions: the oracle is brute force, or known figures."""

import json

import numpy as np
import pytest
import torch
from helpers import ROOT

import metrics
from parts import neighbours
from parts.neighbours import Neighbours

FLICKR8K = ROOT.parent / "shared" / "flickr8k"

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
