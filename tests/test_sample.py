"""sample.py: from checkpoint to files and scores; interrupted, it ends with the same files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    finish,
    log_of,
    mistake,
    one_line,
    picture,
    start,
    tiny_clip,
    tiny_dataset,
    wait,
)

import metrics
import prepare
import sample
import train
from configurator import Config
from data import Meta, Split, files_of
from parts.common import UserError, owning
from sample import SampleConfig


@pytest.fixture
def trained(here):
    train.main(Config(**SMALL | dict(max_iters=60, eval_interval=60)))
    return here


def ask(*args: str, java: bool = False) -> subprocess.Popen:
    """Start sample.py. Without `java` it finds none: METEOR would take ten seconds."""
    env = os.environ if java else os.environ | {"PATH": ""}
    return start("sample.py", "--ckpt=out/tiny/ckpt.pt", "--device=cpu", *args, env=env)


def run(*args: str, java: bool = False) -> str:
    return finish(ask(*args, java=java))


def test_a_split_becomes_json_csv_and_scores(trained):
    output = run("--split=val", "--method=beam", "--n_best=3", "--out_csv=table.csv", java=True)
    scores = json.loads(output.splitlines()[-1])
    predictions = json.loads(Path("out/tiny/val/predictions.json").read_text())
    images, references = Split(trained / "data/tiny", "val").references()
    assert [p["image_id"] for p in predictions] == [i["id"] for i in images]  # in input order
    table = list(csv.reader(Path("table.csv").read_text().splitlines()))
    assert table[0] == "image_id file_name caption references bleu rouge_l cider".split()
    assert [row[2] for row in table[1:]] == [p["caption"] for p in predictions]
    corpus, each = metrics.score(
        {p["image_id"]: p["caption"] for p in predictions},
        {i["id"]: r for i, r in zip(images, references, strict=True)},
    )
    for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert scores[name] == corpus[name]
    assert (scores["METEOR"] is None) == (metrics.java_missing() is not None)
    assert float(table[1][6]) == pytest.approx(each[24]["CIDEr"], abs=1e-4)
    assert all(len(p["n_best"]) == 3 and p["n_best"][0]["caption"] == p["caption"]
               for p in predictions)  # fmt: skip
    best = [n["logprob"] for n in predictions[0]["n_best"]]
    assert best == sorted(best, reverse=True)
    said = finish(start("metrics.py", "out/tiny/val/predictions.json", "data/tiny/val.json"))
    assert json.loads(said.splitlines()[-1])["CIDEr"] == pytest.approx(scores["CIDEr"], abs=1e-9)


def test_interrupted_it_goes_on_and_ends_with_the_same_files(trained):
    args = ["--split=train", "--method=sample", "--batch_size=2", "--max_len=20"]
    run(*args, "--out_json=whole/p.json")
    process = ask(*args, "--out_json=parts/p.json")
    partial = Path("parts/p.json.partial.jsonl")
    while process.poll() is None and not (partial.exists() and partial.read_text().count("\n") > 4):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    wait(process)
    if not Path("parts/p.json").exists():  # it was quicker than the kill only on a fast machine
        with open(partial, "a") as file:
            file.write('{"image_id": 9, "capt')  # as a kill within a write leaves it
        assert "resuming after" in run(*args, "--out_json=parts/p.json")
    for name in ("p.json", "p.csv"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    assert not partial.exists()


def test_two_galleries_of_a_folder_have_a_page_each(trained, no_java):
    """Both were called gallery.html, and the first was lost."""
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", gallery=True, device="cpu")
    for out in ("", "g/1.json", "g/predictions.json", "g/gallery.json"):
        sample.main(replace(cfg, out_json=out))
    pages = sorted(p.name for p in Path("g").glob("*.html"))
    assert pages == ["1.html", "gallery.html", "predictions.html"]
    assert Path("out/tiny/val/gallery.html").is_file()
    with owning(Path("g/1.html.lock"), "another"), pytest.raises(UserError, match="another"):
        sample.main(replace(cfg, out_json="g/1.json"))


def test_other_settings_do_not_go_on_from_anothers_captions(trained):
    sample.Results(Path("p.json"), {"seed": 1}).add([{"image_id": 1}])
    assert sample.Results(Path("p.json"), {"seed": 1}).entries == [{"image_id": 1}]
    assert sample.Results(Path("p.json"), {"seed": 2}).entries == []


def test_what_another_is_writing_is_left_alone(trained):
    """Two runs appended their captions to one file, and each deleted the other's."""
    partial = Path("out/tiny/val/predictions.json.partial.jsonl")
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", device="cpu")
    with owning(Path("out/tiny/val/predictions.json.lock"), ""):
        partial.write_text("another's")
        refusal = "^another sample.py is writing out/tiny/val/predictions.json: wait until it ends$"
        with pytest.raises(UserError, match=refusal):
            sample.main(cfg)
        assert partial.read_text() == "another's"
    with owning(Path("table.csv.lock"), ""), pytest.raises(UserError, match="writing table.csv"):
        sample.main(replace(cfg, out_csv="table.csv"))
    with pytest.raises(UserError, match="no split `nope`"):
        sample.main(replace(cfg, split="nope"))
    assert not Path("out/tiny/nope").exists()


def test_the_checkpoint_alone_is_enough(trained, no_java, capsys):
    """As in the original system: it captions and scores val, wherever the dataset was put."""
    shutil.move("data/tiny", "sets")
    train.main(Config(**SMALL | dict(data="sets", max_iters=2)))
    scores = sample.main(SampleConfig(ckpt="out/tiny/ckpt.pt"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"split": "val", "images": 8, **scores}
    assert Path("out/tiny/val/predictions.csv").is_file()


def test_another_dataset_is_scored_only_if_asked(trained, no_java, capsys):
    """A dataset was made anew under the same name, with training images among its val images."""
    shutil.rmtree("data/tiny")
    tiny_dataset(trained / "data/tiny", images=25)
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", device="cpu")
    named = "was trained on another dataset: .*val_embeddings.npy.* differ: add --other_dataset"
    with pytest.raises(UserError, match=named):
        sample.main(cfg)
    scores = sample.main(replace(cfg, other_dataset=True))
    assert scores["CIDEr"] >= 0
    assert scores["diversity"]["novel"] is None  # it counted captions that this training never saw


def test_a_split_that_is_added_later_makes_no_other_dataset(trained, no_java):
    """With a test split prepared after training, the checkpoint was "trained on another dataset":
    the split could not be scored as its own, and the run could not be resumed."""
    folder = Path("data/tiny")
    for file in files_of("val")[1:]:
        shutil.copy(folder / file, folder / file.replace("val", "test"))
    meta = Meta.read(folder)
    replace(meta, splits=meta.splits | {"test": meta.splits["val"]}).write(folder)
    scores = sample.main(SampleConfig(ckpt="out/tiny/ckpt.pt", split="test", device="cpu"))
    assert scores["diversity"]["novel"] is not None
    train.main(Config(**SMALL | dict(resume=True, max_iters=14)))


def test_long_captions_are_whole_or_counted(here, no_java, capsys):
    """They were cut at 40 tokens, here and in train.py's evaluations, without a word."""
    for split in ("train", "val"):
        names = json.loads(Path(f"data/tiny/{split}.json").read_text())["images"]
        rows = [f"{image['file_name']},{'dog cat ' * 30}" for image in names]
        Path(f"{split}.csv").write_text("\n".join(["image,caption", *rows]))
        np.save(f"{split}.npy", Split(Path("data/tiny"), split).embeddings[:])
    np.save("rows.npy", np.concatenate([np.load("train.npy"), np.load("val.npy")])[:, 0])
    Path("names.txt").write_text("\n".join(f"{i}.png" for i in range(32)))
    prepare.main(Config(dataset="long", source="csv", captions="{split}.csv", vocab_size=12,
                        embeddings="rows.npy", embedding_names="names.txt"))  # fmt: skip
    longest = Split("data/long", "val").meta.longest_caption
    assert longest > 60
    train.main(
        Config(**SMALL | dict(dataset="long", block_size=256, max_iters=60, eval_interval=60))
    )
    assert log_of("out/long")[-1]["ended"] == 1
    cfg = SampleConfig(ckpt="out/long/ckpt.pt", device="cpu")
    capsys.readouterr()
    assert sample.main(cfg)["Bleu_4"] > 0.99
    assert "were cut" not in capsys.readouterr().out
    sample.main(replace(cfg, max_len=50))
    said = "\n8 of 8 captions were cut before their end: raise --max_len\n"
    assert said in capsys.readouterr().out


def test_attention_maps_are_what_the_model_computes(trained):
    """Rows of the softmax: with the share that goes to the caption itself they sum to one."""
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", split="val", device="cpu")
    captioner = sample.Captioner(cfg)
    model, tokenizer = captioner.model, captioner.tokenizer
    split = Split(trained / "data/tiny", "val")
    embeddings, ids = torch.tensor(split.embeddings[:2]), [[5, 6, 7], [8]]
    maps = captioner.attention(embeddings, ids)
    assert [len(m) for m in maps] == [3, 1] and all(len(row) == 2 for m in maps for row in m)
    assert all(0 < sum(row) < 1 for m in maps for row in m)
    layer = model.transformer.h[-1].attn  # the first token sees the prefix and bos alone
    seen: list = []
    hook = layer.c_attn.register_forward_hook(lambda _, args, out: seen.append(out))
    prefix = model.prefill(embeddings[:1])
    model.step(torch.tensor([tokenizer.bos]), 0, prefix)
    hook.remove()
    q = seen[-1][0, 0].view(3, 2, 16)[0]
    k = torch.cat((prefix[-1][0][0], seen[-1][0, 0].view(3, 2, 16)[1][:, None]), 1)
    weights = torch.einsum("hd,htd->ht", q, k).div(4).softmax(-1).mean(0)
    assert torch.allclose(weights[:2], torch.tensor(maps[0][0]), atol=1e-4)


def test_attention_of_a_caption_that_fills_the_block(trained):
    """It was read one position beyond the last, where there is none."""
    run("--split=val", "--max_len=30", "--min_len=30", "--attention")  # 2 + 30 = block_size
    predictions = json.loads(Path("out/tiny/val/predictions.json").read_text())
    assert all(len(p["attention"]) == len(p["tokens"]) == 30 for p in predictions)


@pytest.mark.parametrize("settings", [{}, {"method": "beam", "beams": 3}, {"method": "sample"}])
def test_each_token_has_its_own_logprob_behind_a_prompt(trained, no_java, settings):
    """Those behind a prompt stood at its tokens, in predictions.json and in the gallery."""
    own = dict(ckpt="out/tiny/ckpt.pt", device="cpu", out_json="p.json", prompt="dog runs")
    sample.main(SampleConfig(**own, **settings))
    captioner = sample.Captioner(SampleConfig(**own))
    embeddings = captioner.split("val").embedding(np.arange(8))
    for embedding, p in zip(embeddings, json.loads(Path("p.json").read_text()), strict=True):
        assert p["tokens"][:2] == ["\u2581dog", "\u2581runs"] and p["logprobs"][:2] == [0, 0]
        ids = captioner.tokenizer.sp.piece_to_id(p["tokens"])
        tokens = torch.tensor([[captioner.tokenizer.bos, *ids]])
        places = torch.arange(tokens.size(1))
        row = (tokens, torch.ones_like(tokens), places[None], places)
        logp = captioner.model(embedding[None], *row).log_softmax(-1)
        wanted = logp[range(2, len(ids)), ids[2:]].tolist()
        assert p["logprobs"][2 : len(ids)] == pytest.approx(wanted, abs=2e-3)
        assert len(p["logprobs"]) == len(ids) + ("cut" not in p)


@pytest.mark.parametrize(
    "args, says",
    [
        (
            ["--split=val", "--method=magic"],
            "--method: expected one of greedy sample beam",
        ),
        (["--split=val", "--method=beam", "--beams=0"], "--beams: expected 1 <= beams"),
        (["--split=val", "--method=sample", "--top_p=0"], "--top_p: expected a number above 0"),
        (
            ["--split=val", "--method=sample", "--temperature=-1"],
            "--temperature: expected 0 <=",
        ),
        (["--split=val", "--prompt=" + "dog " * 50], "prompt has"),
        (["--split=nope"], "no split `nope`; it has: train, val"),
        (["--split=val", "--image=x.png"], "give either --split"),
        (["--image", "x.png"], "x.png"),
        (["--split=val", "--ckpt=none.pt"], "none.pt not found"),
        (["--split=val", "--max_len=999"], "max_len=999 exceeds"),
    ],
)
def test_mistakes_are_one_line(trained, capfd, args, says):
    args = ["--ckpt=out/tiny/ckpt.pt", "--device=cpu", *args]
    assert says in mistake("sample.py", args, capfd)


NOTHING = "does nothing without"
IDLE = [  # what would have been ignored, or found out after all work
    (dict(length_penalty=1.0), "length_penalty: does nothing without --method=beam"),
    (dict(top_k=5), "top_k: does nothing without --method=sample"),
    (dict(split="", image=("x",), java=True), f"java: {NOTHING} --split"),
    (dict(split="", image=("x",), attention=True), f"attention: {NOTHING} --gallery or"),
    (dict(track="mlflow"), f"track: {NOTHING} --gallery"),
    (
        dict(prompt="a \u732b"),
        "the prompt `a \u732b` contains characters the tokenizer has never seen",
    ),
    (dict(ckpt="out/tiny"), "out/tiny not found or a folder: give a file of train.py"),
    (dict(out_json="out"), "out is a folder: give the name of a file"),
    (dict(out_csv="new/"), "new/ is a folder: give the name of a file"),
    (dict(out_json=".."), ".. is a folder: give the name of a file"),
    (dict(out_json="x.csv"), "out_json and out_csv are both x.csv: give two names"),
    (dict(out_json="x", out_csv="./x"), "out_json and out_csv are both ./x: give two names"),
]


@pytest.mark.parametrize("settings, says", IDLE)
def test_nothing_is_ignored_or_found_out_too_late(trained, settings, says):
    with pytest.raises(UserError, match=re.escape(says)):
        sample.main(SampleConfig(**dict(ckpt="out/tiny/ckpt.pt", split="val") | settings))


@pytest.mark.parametrize(
    "settings, file",
    [
        (dict(out_json="val.json"), "val.csv"),
        (dict(out_json="p.json", out_csv="val.csv"), "val.csv"),
        (dict(out_json="out/tiny/log.jsonl"), "out/tiny/log.jsonl"),
        (dict(out_json="data/tiny/val.json"), "data/tiny/val.json"),
        (dict(out_json="index.json", gallery=True), "index.html"),
    ],
)
def test_a_file_of_someone_else_is_not_replaced(trained, settings, file):
    """`--out_json=val.json` replaced the user's own captions in val.csv, which nobody had named.
    The log of a run that still trained, or a split's references, went the same way."""
    Path("val.csv").write_text("image,caption\n1.png,a dog\n")
    Path("index.html").write_text("<!doctype html>\n<html>my page")
    before = Path(file).read_bytes()
    with pytest.raises(UserError, match=f"^{file} is not sample.py's: move it"):
        sample.main(SampleConfig(ckpt="out/tiny/ckpt.pt", device="cpu", **settings))
    assert Path(file).read_bytes() == before


def test_torchrun_is_refused(trained, monkeypatch):
    """Two processes wrote the same file at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, not under torchrun"):
        sample.main(SampleConfig(ckpt="out/tiny/ckpt.pt", split="val"))


def test_java_that_is_not_there_is_told_before_work(trained, monkeypatch):
    """Found by a thousand random commands: it was a traceback, when all captions were made."""
    monkeypatch.setenv("PATH", "")
    assert "METEOR and --java need java" in one_line(ask("--split=val", "--java"))
    assert not Path("out/tiny/val").exists()


def test_a_dataset_of_another_width_is_refused(trained):
    tiny_dataset(trained / "data/wide", width=20)
    with pytest.raises(UserError, match="embedding_dim 20, not 16"):
        sample.main(SampleConfig(ckpt="out/tiny/ckpt.pt", split="val", data="data/wide"))


# ---------------------------------------------------------------------------------------------
# Image files


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A captioner of 40 pictures through a tiny CLIP; its folder."""
    here = tmp_path_factory.mktemp("seen")
    tiny_clip(here / "clip")
    (here / "photos").mkdir()
    rows = {"train": range(40), "val": range(40, 48)}
    for split, numbers in rows.items():
        for i in numbers:
            picture(40 + i, 60 - i, i).save(here / f"photos/{i:02d}.png")
        lines = [f"{i:02d}.png,picture {i} of {chr(97 + i % 26)}" for i in numbers]
        (here / f"{split}.csv").write_text("\n".join(["image,caption", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        told = dict(dataset="tiny", clip="./clip", vocab_size=64, workers=0)
        prepare.main(Config(source="csv", captions="{split}.csv", images="photos", **told))
        train.main(Config(**SMALL | dict(max_iters=60, eval_interval=60)))
    return here


def test_images_are_captioned_as_those_of_a_split(seen, monkeypatch, capsys, no_java):
    """The encoder that the checkpoint names, from files, gives what the dataset's rows give."""
    monkeypatch.chdir(seen)
    files = tuple(f"photos/{i}.png" for i in range(40, 48))
    cfg = SampleConfig(ckpt="out/tiny/ckpt.pt", image=files, method="beam", batch_size=3)
    sample.main(replace(cfg, image=(), split="val", out_json="split.json"))
    sample.main(replace(cfg, out_json="image.json"))
    out = capsys.readouterr().out
    ours, theirs = (json.loads(Path(f"{n}.json").read_text()) for n in ("image", "split"))
    for p, q in zip(ours, theirs, strict=True):
        assert p["caption"] == q["caption"] and p["path"] == q["path"]
        assert f"{p['path']}: {p['caption']}\n" in out
    shutil.move("clip", "moved")
    with pytest.raises(UserError, match="clip=./clip: no such folder"):
        sample.main(cfg)
    sample.main(replace(cfg, clip="moved"))
    assert capsys.readouterr().out.count(".png: ") == 8
    shutil.move("moved", "clip")


def test_a_folder_of_any_images(seen, tmp_path, monkeypatch, capsys):
    """Images of other suffixes were left out without a word, and a/1.png and b/1.png had one name
    in the table."""
    monkeypatch.chdir(tmp_path)
    for name in ("p/a/1.png", "p/b/1.png", "p/c.jfif", "p/noext"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        picture(30, 40).save(name, "JPEG" if name.startswith("p/c") else "PNG")
    Path("p/x.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    Path("p/notes.txt").write_text("no image")
    cfg = SampleConfig(ckpt=str(seen / "out/tiny/ckpt.pt"), image=("p",), out_csv="p.csv",
                       clip=str(seen / "clip"), out_json="p.json")  # fmt: skip
    with pytest.raises(UserError, match="1 of 5 images could not be read"):
        sample.main(cfg)
    skipped = [s for s in capsys.readouterr().err.splitlines() if s.startswith("skipped")]
    assert skipped[0].startswith("skipped p/x.HEIC: no image in a known format")
    assert skipped[1:] == ["skipped p/notes.txt: text/plain"]

    def names() -> list[str]:
        return [row["file_name"] for row in csv.DictReader(Path("p.csv").read_text().splitlines())]

    assert names() == ["a/1.png", "b/1.png", "c.jfif", "noext"]
    sample.main(replace(cfg, image=("p/a", "p/b")))
    assert names() == ["p/a/1.png", "p/b/1.png"]
    sample.main(replace(cfg, image=("p/a/1.png",)))
    assert names() == ["p/a/1.png"]


def test_captions_of_an_image_that_was_replaced_are_not_resumed(seen, tmp_path, monkeypatch):
    """It had the name, but not the content, of the one that an interrupted run had captioned."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(seen / "photos", "photos")
    cfg = SampleConfig(ckpt=str(seen / "out/tiny/ckpt.pt"), image=("photos",),
                       clip=str(seen / "clip"))  # fmt: skip
    captioner = sample.Captioner(cfg)
    before = sample.FileSource(cfg, captioner).signature()
    assert sample.FileSource(cfg, captioner).signature() == before
    picture(31, 20, 7).save("photos/03.png")
    assert sample.FileSource(cfg, captioner).signature() != before


def test_images_that_cannot_be_read_are_told_and_a_rerun_goes_on(seen, monkeypatch, tmp_path):
    """Skipped files were not counted once: a rerun captioned some images a second time."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(seen / "photos", "photos")
    for name in ("01", "02", "09", "13"):
        Path(folder, f"{name}.png").write_bytes(b"no image")
    cfg = SampleConfig(ckpt=str(seen / "out/tiny/ckpt.pt"), image=("photos",), batch_size=4,
                       clip=str(seen / "clip"), method="sample", workers=2)  # fmt: skip
    written = []
    for out, kill in (("whole.json", None), ("parts.json", 5), ("parts.json", None)):
        calls = iter(range(99))

        def stops(*args, real=sample.generate, kill=kill, calls=calls):
            if next(calls) == kill:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(sample, "generate", stops)
            error = KeyboardInterrupt if kill else UserError
            with pytest.raises(error, match=None if kill else "4 of 48 images could not be read"):
                sample.main(replace(cfg, out_json=out))
        written.append(kill or Path(out).read_text())
    assert written[2] == written[0]
    assert [p["image_id"] for p in json.loads(written[0])] == [*{*range(48)} - {1, 2, 9, 13}]


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_another_encoder_is_refused_with_both_named(seen, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(seen)
    tiny_clip(tmp_path, kind, projection=20)
    width = {"siglip": "32", "clip": "20"}[kind]
    with pytest.raises(UserError) as error:
        sample.main(SampleConfig(ckpt="out/tiny/ckpt.pt", image=("photos",), clip=str(tmp_path)))
    assert f"{tmp_path} gives pooled embeddings of 1 x {width} ({kind})" in str(error.value)
    assert "out/tiny/ckpt.pt needs 1 x 24 (clip), from ./clip" in str(error.value)
