"""Borrowed captions, re-ranking and CLIPScore: the oracle is brute force, or known figures."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, outcome

import metrics
import prepare
import sample
import train
from configurator import Config, ConfigError
from data import Split
from parts import neighbours, shapes
from parts.common import UserError
from parts.encoder import Encoder
from parts.neighbours import ImageText, Neighbours
from sample import SampleConfig

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
    lender = Neighbours(training, 9)
    x, y = queries.astype(float).mean(1), training.astype(float).mean(1)
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in y] for a in x])
    expected = (-cosine).argsort(1)[:, :9]
    assert lender(torch.tensor(queries)) == expected.tolist()
    lender = Neighbours(training, 99)  # more than there are
    assert sorted(lender(torch.tensor(queries))[0]) == list(range(40))


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
    lender = Neighbours(embeddings[rows["train"]], 5)
    best = []
    for images in lender(torch.tensor(embeddings[rows["val"]])):
        own, tokens = ([c for i in images for c in given[i]] for given in (lent, strings))
        best.append(own[cider.agreement(tokens).argmax()])
    corpus, _ = metrics.score(dict(zip(rows["val"], best, strict=True)), references)
    assert corpus["CIDEr"] == pytest.approx(0.351, abs=0.002)


# ---------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture
def trained(here, no_java):
    train.main(Config(**SMALL | dict(max_iters=30, eval_interval=30)))
    return SampleConfig(ckpt="out/tiny/ckpt.pt", split="val", device="cpu")


def predictions_of(cfg: SampleConfig) -> list[dict]:
    sample.main(cfg)
    return json.loads(Path("out/tiny/val/predictions.json").read_text())


def test_the_floor_is_written_and_scored_like_a_models_captions(trained, capfd):
    args = ["--ckpt=out/tiny/ckpt.pt", "--split=val", "--method=nearest", "--neighbours=3"]
    _, out, _ = outcome("sample.py", [*args, "--device=cpu", "--gallery"], capfd)
    scores = json.loads(out.splitlines()[-1])
    assert scores["diversity"]["novel"] == 0
    predictions = json.loads(Path("out/tiny/val/predictions.json").read_text())
    table = list(csv.reader(Path("out/tiny/val/predictions.csv").read_text().splitlines()))
    assert [row[2] for row in table[1:]] == [p["caption"] for p in predictions]
    assert scores["CIDEr"] == pytest.approx(np.mean([p["scores"]["cider"] for p in predictions]))
    assert Path("out/tiny/val/gallery.html").is_file()
    training, val = Split("data/tiny", "train"), Split("data/tiny", "val")
    _, captions = training.references()
    cosine = torch.nn.functional.cosine_similarity(
        torch.tensor(val.embeddings[:, None, 0]).float(),
        torch.tensor(training.embeddings[None, :, 0]).float(), dim=-1,
    )  # fmt: skip
    for row, p in zip(cosine, predictions, strict=True):
        assert p["caption"] in [c for i in row.topk(3).indices for c in captions[i]]


def test_a_random_caption_of_the_neighbours_is_the_floors_floor(trained):
    """FIELD's table begins with random captions: of any image, and of the nearest one."""
    training = Split("data/tiny", "train")
    _, captions = training.references()
    cfg = replace(trained, method="nearest", pick="random")
    nearest = replace(cfg, neighbours=1)
    best = [p["caption"] for p in predictions_of(replace(nearest, pick="consensus"))]
    drawn = [[p["caption"] for p in predictions_of(replace(nearest, seed=s))] for s in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    for one, other in zip(drawn[0], best, strict=True):
        assert any(one in own and other in own for own in captions)
    anywhere = {p["caption"] for p in predictions_of(replace(cfg, neighbours=10**6))}
    assert len(anywhere - {*drawn[0], *best}) > 1
    assert anywhere <= {caption for own in captions for caption in own}


@pytest.mark.parametrize("method", ["beam", "sample"])
@pytest.mark.parametrize("rerank", ["consensus", "neighbours"])
def test_reranking_puts_the_captions_that_agree_best_first(trained, method, rerank):
    cfg = replace(trained, method=method, n_best=5)
    before = predictions_of(cfg)
    after = predictions_of(replace(cfg, rerank=rerank))
    by_logprob = predictions_of(replace(cfg, rerank=rerank, rerank_weight=1e6))
    training, val = Split("data/tiny", "train"), Split("data/tiny", "val")
    _, captions = training.references()
    strings = metrics.token_strings(captions)
    cider = metrics.CiderD(strings, tokenize=str.split)
    lenders = Neighbours(training.embeddings, 20)(torch.tensor(val.embeddings))
    lent = [[string for i in images for string in strings[i]] for images in lenders]
    for old, new, likely, borrowed in zip(before, after, by_logprob, lent, strict=True):
        assert sorted(map(str, old["n_best"])) == sorted(map(str, new["n_best"]))
        assert new["caption"] == new["n_best"][0]["caption"]
        (own,) = metrics.token_strings([[n["caption"] for n in new["n_best"]]])
        values = cider.agreement(own, borrowed if rerank == "neighbours" else None)
        assert (np.diff(values) <= 1e-9).all()
        logprobs = [n["logprob"] for n in likely["n_best"]]
        assert logprobs == sorted(logprobs, reverse=True)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(split="train", method="nearest"), "^split: captions are borrowed from `train`: "),
        (dict(rerank="consensus"), "rerank: does nothing without --n_best=2 or more"),
        (dict(rerank_weight=1.0), "rerank_weight: does nothing without --rerank"),
        (dict(neighbours=3), "neighbours: does nothing without"),
        (dict(pick="random"), "pick: does nothing without --method=nearest"),
        (dict(method="nearest", neighbours=1001), "neighbours: expected"),
        (dict(method="nearest", prompt="a"), "^method: nearest takes no prompt and no att"),
        (dict(method="nearest", n_best=2), "n_best: expected at most 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        SampleConfig(**dict(ckpt="ckpt.pt", split="val") | settings)


def test_captions_of_own_embeddings_are_not_judged_by_clip(trained):
    beams = replace(trained, method="beam", n_best=2)
    for cfg in (replace(trained, clip_score=True), replace(beams, rerank="clip")):
        with pytest.raises(UserError, match="that no CLIP made"):
            sample.main(cfg)
    with pytest.raises(UserError, match="METEOR and --java count words"):
        sample.main(replace(trained, java=True, tokens="characters"))


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
    judge = ImageText(sample.Meta(**META | {"encoder": SHAPES_CLIP}), "", "cpu")
    x = judge.images(judge.encoder(images), [])
    texts = judge.texts(captions)
    true, other = (
        [metrics.clip_score(x[i], texts[i - shift][0], texts[i][1:]) for i in range(60)]
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
    grid = sample.Meta(**META | {"encoder": SHAPES_CLIP, "features": "grid"})
    judge = ImageText(grid, "", "cpu")
    x = judge.images(torch.zeros(1, 5, 128), [str(tmp_path / "0.png")])
    expected = Encoder(SHAPES_CLIP)([images[0]])[:, 0].float().numpy()
    np.testing.assert_allclose(x, expected / np.linalg.norm(expected), atol=1e-6)
    with pytest.raises(UserError, match="CLIP needs the image files .*: set --images"):
        judge.images(torch.zeros(1, 5, 128), [""])


def test_clip_scores_and_reranks_the_captions_of_sample(
    scenes, tmp_path, monkeypatch, capsys, no_java
):
    monkeypatch.chdir(tmp_path)
    images, captions = scenes
    Path("photos").mkdir()
    for split, numbers in {"train": range(40), "val": range(40, 60)}.items():
        for i in numbers:
            images[i].save(f"photos/{i}.png")
        rows = [f'{i}.png,"{caption}"' for i in numbers for caption in captions[i]]
        Path(f"{split}.csv").write_text("\n".join(["image,caption", *rows]))
    small = SMALL | dict(max_iters=60, eval_interval=60)
    prepare.main(
        Config(dataset="tiny", source="csv", captions="{split}.csv", images="photos",
               clip=SHAPES_CLIP, vocab_size=150, workers=0)
    )  # fmt: skip
    train.main(Config(**small | dict(block_size=64)))
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", split="val", method="sample", n_best=8)
    cfg = replace(cfg, clip_score=True)
    plain = sample.main(replace(cfg, out_json="plain.json"))
    ranked = sample.main(replace(cfg, out_json="ranked.json", rerank="clip"))
    assert ranked["CLIPScore"] > plain["CLIPScore"] + 0.1
    for p in json.loads(Path("ranked.json").read_text()):
        assert p["scores"].keys() == {"bleu", "rouge_l", "cider", "CLIPScore", "RefCLIPScore"}
    embeddings = torch.tensor(np.load("data/tiny/val_embeddings.npy"))[:, 0].double()
    encoder = Encoder(SHAPES_CLIP, text=True)
    for p, image in zip(json.loads(Path("plain.json").read_text()), embeddings, strict=True):
        text = encoder.encode_text([f"A photo depicts {p['caption']}"])[0].double()
        cosine = torch.cosine_similarity(image, text, 0).item()
        assert p["scores"]["CLIPScore"] == pytest.approx(2.5 * max(0, cosine), abs=1e-5)
    signature = sample.Captioner(cfg).signature()  # an interrupted run's captions were judged by
    assert signature["clip"] == Encoder(SHAPES_CLIP).digest()  # the same CLIP, or begin anew
    files = replace(cfg, split="", image=("photos/41.png",), out_json="files.json")
    line = sample.main(files)
    (p,) = json.loads(Path("files.json").read_text())
    assert p["scores"].keys() == {"CLIPScore"}
    assert line == p["scores"]  # computed before, but shown nowhere
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["CLIPScore"] == line["CLIPScore"]
    assert Path("files.csv").read_text().endswith(",,,,\n")


# ---------------------------------------------------------------------------------------------
# A script without spaces


def test_chinese_captions_from_prepare_to_scores(tmp_path, monkeypatch, capsys, no_java):
    """Evaluation in training counts characters too: by words, every checkpoint had a CIDEr of 0."""
    monkeypatch.chdir(tmp_path)
    animals, colours, acts = (
        ["狗", "猫", "马", "鸟"],
        ["红", "黑", "白"],
        ["在草地上奔跑", "在睡觉", "在吃东西"],
    )
    scenes = [(a, c, v) for a in animals for c in colours for v in acts]
    rows = {"train": [], "val": []}
    embeddings = np.zeros((len(scenes), 10), np.float16)
    for i, (animal, colour, act) in enumerate(scenes):
        for j, (words, word) in enumerate(((animals, animal), (colours, colour), (acts, act))):
            embeddings[i, [0, 4, 7][j] + words.index(word)] = 1
        split = "val" if i % 6 == 0 else "train"
        rows[split] += [
            f"{i}.png,一只{colour}色的{animal}{act}。",
            f"{i}.png,{colour}{animal}{act}",
        ]
    for split, lines in rows.items():
        Path(f"{split}.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    np.save("e.npy", embeddings)
    Path("names.txt").write_text("\n".join(f"{i}.png" for i in range(len(scenes))))
    prepare.main(
        Config(dataset="tiny", source="csv", captions="{split}.csv", embeddings="e.npy",
               embedding_names="names.txt", vocab_size=80)
    )  # fmt: skip
    assert train.main(Config(**SMALL | dict(max_iters=80, eval_interval=80)))["CIDEr"] > 0.5
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", split="val", device="cpu")
    assert sample.main(replace(cfg, tokens="characters"))["CIDEr"] > 0.5
    assert "without spaces" not in capsys.readouterr().out
    assert sample.main(cfg)["CIDEr"] < 0.5
    assert "without spaces" in capsys.readouterr().out
