"""From source files to a dataset directory: every format, bad input, kills, ranks, downloads."""

import csv
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import socket
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    PATIENCE,
    ROOT,
    finish,
    made,
    many,
    one_line,
    photos,
    picture,
    stacks,
    start,
    tiny_clip,
    wait,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import download
import encoder as encoder_module
import prepare
import sources
from configurator import Config, ConfigError, UserError
from data import Split
from encoder import Encoder, read_image

# ---------------------------------------------------------------------------------------------
# A tiny CLIP, photos, and what is true of them


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_clip(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


PHOTOS = {
    "train": {"a b.png": ["A dog, asleep.", "a \"dog\" lies"], "è/ü.png": ["Zwei Hühner"],
              "c.png": ["one two three"], "d.png": ["four five"], "e.png": ["=1+1"]},
    "val": {"f.png": ["five seven"], "g.png": ["a dog asleep", "ten"]},
}  # fmt: skip


def every_photo(folder: Path) -> None:
    photos(folder, [name for split in PHOTOS.values() for name in split])


# ---------------------------------------------------------------------------------------------
# Each source, from file to caption


def as_csv(folder: Path) -> dict:
    for split, images in PHOTOS.items():
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", "remark"])
            for name, captions in images.items():
                writer.writerows([name, f" {c}\n", "\0" if c == "ten" else ""] for c in captions)
    return {"captions": "{split}.csv", "images": "photos"}


def as_one_csv(folder: Path) -> dict:
    rows = [(n, c, s, f"no. {n}") for s in PHOTOS for n, texts in PHOTOS[s].items() for c in texts]
    with open(folder / "all.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", "split", "id"), *rows])
    return {"captions": "all.csv", "images": "photos"}


def as_jsonl(folder: Path) -> dict:
    with open(folder / "all.jsonl", "w", encoding="utf-8") as file:
        for split, images in PHOTOS.items():
            for name, captions in images.items():
                entry = {"image": name, "captions": captions, "split": split, "id": f"no. {name}"}
                print(json.dumps(entry), file=file)
    return {"captions": "all.jsonl", "images": "photos"}


def as_flickr(folder: Path, comma: str = ",", header: str = "image,caption") -> dict:
    """Flickr8k's captions.txt."""
    for split, images in PHOTOS.items():
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            print(header, file=file)
            for name, captions in images.items():
                for i, c in enumerate(captions):
                    quoted = '"' + c.replace('"', '""') + '"'
                    c = quoted if '"' in c and "," in comma else c
                    print(name, *[i] * ("number" in header), c, sep=comma, file=file)
    return {"source": "flickr", "captions": "{split}.txt", "images": "photos"}


def as_flickr_numbers(folder: Path) -> dict:
    """Flickr30k's captions.txt."""
    return as_flickr(folder, ",", "image_name,comment_number,comment")


def as_flickr_bars(folder: Path) -> dict:
    """Flickr30k's results.csv."""
    return as_flickr(folder, "| ", "image_name| comment_number| comment")


def as_flickr_tokens(folder: Path) -> dict:
    for split, images in PHOTOS.items():
        lines = [f"{n}#{i}\t{c}" for n, texts in images.items() for i, c in enumerate(texts)]
        (folder / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {"source": "flickr", "captions": "{split}.txt", "images": "photos"}


def as_coco(folder: Path) -> dict:
    for split, images in PHOTOS.items():
        first = 1000 * (split == "val") + 7
        content = {"images": [], "annotations": []}
        for i, (name, captions) in enumerate(images.items()):
            content["images"].append({"id": first + i, "file_name": name})
            for j, c in enumerate(captions):
                annotation = {"image_id": first + i, "id": 10 * (first + i) + j, "caption": c}
                content["annotations"].insert(0, annotation)
        content["annotations"].reverse()
        (folder / f"captions_{split}2014.json").write_text(json.dumps(content))
        shutil.copytree(folder / "photos", folder / f"{split}2014")
    return {"source": "coco", "captions": "captions_{split}2014.json", "images": "{split}2014"}


def as_karpathy(folder: Path) -> dict:
    images, number = [], 0
    for split, names in PHOTOS.items():
        for i, (name, captions) in enumerate(names.items()):
            of, _, last = name.rpartition("/")
            sentences = [
                {"raw": c + "\n", "sentid": 5 * number + j} for j, c in enumerate(captions)
            ]
            told = "restval" if split == "train" and i > 2 else split
            images.append({"filepath": of, "filename": last, "cocoid": 100 + number,
                           "split": told, "sentences": sentences})  # fmt: skip
            number += 1
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return {"source": "karpathy", "captions": "dataset.json", "images": "photos"}


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    tar.addfile(member, io.BytesIO(data))


def as_shards(folder: Path) -> dict:
    """Of one caption an image, in two shards a split, of keys that begin anew in each split."""
    for split, images in PHOTOS.items():
        (folder / "shards" / split).mkdir(parents=True)
        for i, (name, captions) in enumerate(images.items()):
            with tarfile.open(folder / "shards" / split / f"{i % 2:05d}.tar", "a") as tar:
                key = f"{i % 2:05d}{i:04d}"
                add(tar, f"{key}.png", (folder / "photos" / name).read_bytes())
                if i:
                    add(tar, f"{key}.txt", captions[0].encode())
                add(tar, f"{key}.json", json.dumps({"caption": captions[0], "key": key}).encode())
    return {"source": "shards", "captions": "shards/{split}"}


SOURCES = [as_csv, as_one_csv, as_jsonl, as_flickr, as_flickr_numbers, as_flickr_bars,
           as_flickr_tokens, as_coco, as_karpathy, as_shards]  # fmt: skip


@pytest.mark.parametrize("build", SOURCES)
def test_a_source_from_file_to_caption(here, clip, build):
    every_photo(here / "photos")
    told = {"source": build.__name__.rpartition("_")[2]} | build(here)
    prepare.main(Config(dataset="mine", clip=clip, encode_batch=2, workers=0, **told))
    reference = Encoder(clip)
    seen_ids = set()
    for split, expected in PHOTOS.items():
        opened = Split("data/mine", split)
        images, captions = opened.references()
        if build is as_shards:
            order = [*range(0, len(expected), 2), *range(1, len(expected), 2)]  # by shard
            names = [list(expected)[i] for i in order]
            assert captions == [expected[n][:1] for n in names]
            assert [i["id"] for i in images] == [f"{i % 2:05d}{i:04d}" for i in order]
            files = [here / "photos" / n for n in names]
        else:
            assert {i["file_name"]: c for i, c in zip(images, captions, strict=True)} == expected
            files = [here / "photos" / i["file_name"] for i in images]
            seen_ids |= {i["id"] for i in images}
        for row, file in enumerate(files):
            x = reference([read_image(file)])[0].float()
            y = opened.embedding(np.array([row]))[0].float()
            torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
            begin, end = opened.rows[row], opened.rows[row + 1]
            text = opened.tokenizer.decode(opened.tokens[begin:end].tolist())
            assert text == " ".join(captions[row])  # bos is left out, a word's start is a space
    if build in (as_one_csv, as_jsonl):
        assert seen_ids == {f"no. {n}" for split in PHOTOS.values() for n in split}
    if build is as_karpathy:
        assert seen_ids == set(range(100, 107))
    if build is as_coco:
        assert seen_ids == {7, 8, 9, 10, 11, 1007, 1008}
        annotations = json.loads(Path("data/mine/val.json").read_text())["annotations"]
        assert [a["id"] for a in annotations] == [10070, 10080, 10081]
    assert not Path("data/mine/encoding").exists() and not Path("data/mine/skipped.csv").exists()


def test_val_images_are_moved_from_train_and_keep_their_folder(here, clip):
    every_photo(here / "photos" / "train")
    with open("train.csv", "w", encoding="utf-8") as file:
        print("image,caption", *(f"{n},x {i}" for i, n in enumerate(PHOTOS["train"])),
              sep="\n", file=file)  # fmt: skip
    cfg = Config(dataset="mine", source="csv", captions="{split}.csv", images="photos/{split}",
                 clip=clip, val_images=2, workers=0)  # fmt: skip
    prepare.main(cfg)
    names = [[i["file_name"] for i in Split("data/mine", s).references()[0]] for s in PHOTOS]
    assert [len(n) for n in names] == [3, 2] and set(sum(names, [])) == set(PHOTOS["train"])
    before = made()
    prepare.main(cfg)
    assert made() == before  # the choice depends on the seed alone
    with pytest.raises(UserError, match="no images in split `val`, only in train: --val_images=N"):
        prepare.main(Config(**{**vars(cfg), "val_images": 0}))
    with pytest.raises(UserError, match="val_images=5, but there are 5 images in all"):
        prepare.main(Config(**{**vars(cfg), "val_images": 5}))


def test_the_users_own_tokens_and_tokenizer(here, clip, capsys):
    every_photo(here / "photos")
    texts = [c for split in PHOTOS.values() for captions in split.values() for c in captions]
    own = prepare.train_tokenizer(texts, 60)
    Path("own.model").write_bytes(own.model)
    for split, images in PHOTOS.items():
        with open(f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", "tokens"])
            for name, captions in images.items():  # not the ids that `encode` would give
                writer.writerows([name, c, f"[{own.bos}, 9, 8, 7]"] for c in captions)
    told = dict(dataset="mine", source="csv", captions="{split}.csv", images="photos", clip=clip,
                workers=0)  # fmt: skip
    with pytest.raises(UserError, match="train.csv:2: tokens need --tokenizer=FILE"):
        prepare.main(Config(**told))
    prepare.main(Config(tokenizer="own.model", **told))
    opened = Split("data/mine", "train")
    assert opened.tokenizer.model == own.model
    assert opened.tokens.tolist() == [own.bos, 9, 8, 7] * 6
    Path("val.csv").write_text("image,caption,tokens\nf.png,x,5 99\ng.png,x,7 8\n")
    with pytest.raises(UserError, match="{split}.csv: 1 problem"):
        prepare.main(Config(tokenizer="own.model", **told))
    assert "none of them pad, bos or eos): 1\n  val.csv:2: ['5 99']" in capsys.readouterr().err
    Path("val.csv").write_text("image,caption\nf.png,x\n")
    with pytest.raises(UserError, match="{split}.csv: 1 problem"):
        prepare.main(Config(tokenizer="own.model", **told))
    assert "tokens for some captions only: 1\n  val.csv:2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# What is wrong is listed, and nothing is touched


def problems_of(capsys, **settings) -> tuple[str, str]:
    """What `sources.read` lists, and its error."""
    with pytest.raises(UserError) as error:
        sources.read(Config(**({"dataset": "mine", "images": "photos"} | settings)))
    return capsys.readouterr().err, str(error.value)


CSV = "image,caption\nf.png,fine\n"
BAD_CSV = {
    "f.png,\n": ["bad caption (empty): 1", "x.csv:3"],
    "f.png,   \n": ["bad caption (empty)", "x.csv:3"],
    "f.png,\u200b\n": ["bad caption (empty)", "x.csv:3"],
    'f.png,"a\nb"\nf.png,"a\0b"\n': ["bad caption (a control character", "x.csv:5"],
    "f.png,\x1b[31mred\n": ["bad caption (a control character", "x.csv:3"],
    f"f.png,{'x' * 3000}\n": ["bad caption (more than 2000 characters)", "x.csv:3"],
    f"f.png,{'x' * 1_000_000}\nf.png,\n": ["malformed CSV", "x.csv:3", "x.csv:4"],
    "f.png,one,two\n": ["wrong number of cells", "x.csv:3: 3 for 2 columns"],
    'f.png,"open\n': ["malformed CSV", "x.csv:3"],
    'f.png,"a"b\n': ["malformed CSV", "x.csv:3"],
    "none.png,x\n": ["no such image", "x.csv:3: photos/none.png"],
    ",x\n": ["bad file name (empty)", "x.csv:3"],
    "\x00,x\n": ["bad file name (a control character", "x.csv:3"],
    "../secret.png,x\n": ["file name outside the images folder", "x.csv:3: ../secret.png"],
    "a/../../secret.png,x\n": ["file name outside the images folder", "x.csv:3"],
    "/etc/passwd,x\n": ["file name outside the images folder", "x.csv:3: /etc/passwd"],
}


@pytest.mark.parametrize("rows", BAD_CSV)
def test_a_bad_csv_row_is_named(here, capsys, rows):
    photos(here / "photos", ["f.png"])
    photos(here, ["secret.png"])
    Path("x.csv").write_bytes((CSV + rows).encode())
    listed, error = problems_of(capsys, source="csv", captions="x.csv")
    for expected in BAD_CSV[rows]:
        assert expected in listed
    assert "x.csv: " in error and "listed above; nothing was written" in error
    assert "\x1b" not in listed and "\0" not in listed
    assert not Path("data").exists()


def test_bytes_that_are_not_utf8_are_named(here, capsys):
    photos(here / "photos", ["f.png"])
    Path("x.csv").write_bytes(CSV.encode() + b"f.png,caf\xe9\n")
    assert "  x.csv:3" in problems_of(capsys, source="csv", captions="x.csv")[0]


@pytest.mark.parametrize("text", ["", "picture,caption\na,b\n", "\n\n", "image\nf.png\n"])
def test_a_csv_without_header_or_rows(here, capsys, text):
    Path("x.csv").write_text(text)
    _, error = problems_of(capsys, source="csv", captions="x.csv")
    assert "x.csv" in error and ("expected a header" in error or "no images" in error)


def test_twenty_of_each_kind_are_listed_and_all_are_counted(here, capsys):
    photos(here / "photos", ["f.png"])
    rows = [f"none{i}.png,x" for i in range(50)] + ["f.png,"] * 30
    Path("x.csv").write_text("image,caption\n" + "\n".join(rows))
    listed, error = problems_of(capsys, source="csv", captions="x.csv")
    assert "no such image: 50" in listed and "and 30 more" in listed
    assert "bad caption (empty): 30" in listed and "and 10 more" in listed
    assert listed.count("x.csv:") == 40
    assert "x.csv: 80 problems" in error


def test_splits_and_ids(here, capsys):
    photos(here / "photos", ["f.png", "g.png"])
    lines = [
        {"image": "f.png", "caption": "x", "id": 1, "split": "train"},
        {"image": "f.png", "caption": "x", "id": 2, "split": "train"},
        {"image": "f.png", "caption": "x", "id": 1, "split": "val"},
        {"image": "g.png", "caption": "x", "id": 1, "split": "train"},
        {"image": "g.png", "caption": 5, "split": "../../x"},
        {"image": ["g.png"], "captions": [], "split": "val"},
        {"image": "g.png", "captions": ["x", None], "split": "val", "id": 1.5},
        ["no object"],
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{broken\n\n"
    Path("x.jsonl").write_text(text)
    listed, _ = problems_of(capsys, source="jsonl", captions="x.jsonl")
    for expected in (
        "image with two ids: 1\n  x.jsonl:2", "image in two splits: 2\n  x.jsonl:3",
        "id of two images: 2\n  x.jsonl:3", "  x.jsonl:4",
        "bad split name: 1\n  x.jsonl:5: ../../x",
        "bad caption (not text): 1\n  x.jsonl:5", "bad caption (none): 1\n  x.jsonl:6",
        "bad file name (not text): 1\n  x.jsonl:6", "bad caption (missing): 1\n  x.jsonl:7",
        "bad id: 1\n  x.jsonl:7: 1.5", "not a JSON object: 1\n  x.jsonl:8",
        "not JSON: 1\n  x.jsonl:9",
    ):  # fmt: skip
        assert expected in listed


def test_a_line_of_flickr30k_without_its_bar_is_named(here, capsys):
    """The file that is passed around has one such line, of 2199200615.jpg."""
    photos(here / "photos", ["f.png"])
    lines = ["image_name| comment_number| comment", "f.png| 0| A dog .", "f.png| 4   A dog ."]
    Path("x.csv").write_text("\n".join(lines))
    listed, _ = problems_of(capsys, source="flickr", captions="x.csv")
    assert listed == "neither a tab nor 3 columns: 1\n  x.csv:3: f.png| 4   A dog .\n"


def test_coco_and_karpathy_entries_are_named(here, capsys):
    photos(here / "photos", ["f.png", "g.png"])
    image = {"id": 1, "file_name": "f.png"}
    content = {"images": [image, image, {"id": [], "file_name": "g.png"}, 5],
               "annotations": [{"image_id": 1, "id": 3, "caption": "x"}, {"caption": "x"},
                               {"image_id": 9, "id": 3, "caption": "x"}]}  # fmt: skip
    Path("x.json").write_text(json.dumps(content))
    listed, _ = problems_of(capsys, source="coco", captions="x.json")
    for expected in (
        "annotation without an image_id: 1\n  x.json: annotations[1]",
        "image listed twice: 1\n  x.json: images[1]", "bad caption (none): 2",
        "bad id: 1\n  x.json: images[2]", "not a JSON object: 1\n  x.json: images[3]: 5",
        "captions of an image that is not listed: 1\n  x.json: image_id 9",
    ):  # fmt: skip
        assert expected in listed
    entry = {"filename": "f.png", "split": "train", "imgid": 0, "sentences": [{"raw": "x"}]}
    content = {"images": [entry, entry, {**entry, "sentences": 3}, {**entry, "filename": "../x"}]}
    Path("x.json").write_text(json.dumps(content))
    listed, _ = problems_of(capsys, source="karpathy", captions="x.json")
    for expected in ("image listed twice: 1\n  x.json: images[1]",
                     "no list of `sentences`: 1\n  x.json: images[2]",
                     "outside the images folder: 1\n  x.json: images[3]"):  # fmt: skip
        assert expected in listed
    for text in ("[]", '{"images": 3}', "{", "[" * 10_000, '"\xff"'):
        Path("x.json").write_bytes(text.encode("latin-1"))
        for source in ("coco", "karpathy"):
            assert "x.json" in problems_of(capsys, source=source, captions="x.json")[1]


def test_hostile_tars(here, capsys):
    """Nothing is unpacked; links and names that leave the tar are named, as is a cut one."""
    photos(here, ["f.png"])
    data = (here / "f.png").read_bytes()
    Path("t").mkdir()
    with tarfile.open("t/0.tar", "w") as tar:
        add(tar, "../../escape.png", data)
        add(tar, "/etc/escape.png", data)
        add(tar, "0.png", data)
        add(tar, "0.txt", b"x" * (2 << 20))
        add(tar, "1.txt", b"alone")
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with tarfile.open("t/1.tar", "w") as tar:
        add(tar, "3.png", data)
        add(tar, "3.json", b"{")
        add(tar, "4.txt", b"\xff")
        add(tar, "4.png", data)
    whole = Path("t/1.tar").read_bytes()
    Path("t/2.tar").write_bytes(whole[: 512 + len(data) // 2])
    Path("t/3.tar").write_bytes(b"no tar" * 1000)
    before = {p for p in here.rglob("*")}
    listed, _ = problems_of(capsys, source="shards", captions="t")
    for expected in (
        "file name outside the tar: 2\n  t/0.tar: member 0: ../../escape.png",
        "t/0.tar: member 1: /etc/escape.png", "text of more than 1 MiB: 1\n  t/0.tar: member 3",
        "captions without an image: 1\n  t/0.tar: member 4",
        "neither a plain file nor a folder: 1\n  t/0.tar: member 5: 2.png",
        "not JSON: 1\n  t/1.tar: member 1",
        "broken tar: 2\n  t/2.tar", "  t/3.tar",
    ):  # fmt: skip
        assert expected in listed
    assert {p for p in here.rglob("*")} == before


def shard_of(path: str, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return Path(path).read_bytes()


def test_no_sample_of_a_cut_or_damaged_tar_is_lost_without_a_word(here, capsys):
    """tarfile takes a header that is cut or damaged, and what follows an end mark, for the end."""
    whole = shard_of("s.tar", {f"{i}.{k}": b"x" * 600 for i in range(9) for k in ("png", "txt")})
    damaged, sixth = bytearray(whole), 5 * 2 * 1536
    damaged[sixth + 8] ^= 1
    for data in (damaged, whole[:sixth], whole[: sixth + 100], whole + whole):
        Path("s.tar").write_bytes(data)
        listed, _ = problems_of(capsys, source="shards", captions="s.tar")
        assert "tar that is cut, damaged, or two in one: 1\n  s.tar: no end mark at byte" in listed
    Path("s.tar").write_bytes(whole[: sixth + 512 + 100])  # within a text, which is read at once
    assert "broken tar: 1\n  s.tar: un" in problems_of(capsys, source="shards", captions="s.tar")[0]
    Path("s.tar").write_bytes(gzip.compress(whole))
    listed, _ = problems_of(capsys, source="shards", captions="s.tar")
    assert "s.tar: compressed: gunzip it first" in listed


def test_keys_of_a_tar_may_have_dots_and_folders(here, capsys):
    names = ("dog.v2", "x/0", "y/0", "./z")
    shard_of("s.tar", {f"{n}.{k}": n.encode() for n in names for k in ("PNG", "txt")})
    problems = sources.Problems()
    cfg = Config(source="shards", captions="s.tar")
    rows = list(sources.read_shards(cfg, problems))
    assert [(row.id, row.captions) for row in rows] == [
        ("dog.v2", ["dog.v2"]), ("x/0", ["x/0"]), ("y/0", ["y/0"]), ("z", ["./z"])
    ]  # fmt: skip
    with tarfile.open("s.tar", "a") as tar:
        add(tar, "x/0.txt", b"another")
    listed, _ = problems_of(capsys, source="shards", captions="s.tar")
    assert "two members of one key and kind: 1\n  s.tar: member 8: x/0.txt" in listed


def test_one_file_by_two_names_is_one_image(here, capsys):
    """`./a.png` in val was another image than `a.png` in train; folders of each split do differ."""
    photos(here / "photos", ["a.png", "train/1.png", "val/1.png"])
    Path("x.csv").write_text("image,caption,split\na.png,x,train\n./a.png,x,val\n")
    listed, _ = problems_of(capsys, source="csv", captions="x.csv")
    assert "image in two splits: 1\n  x.csv:3: ./a.png" in listed
    Path("x.csv").write_text("image,caption,split\n1.png,x,train\n1.png,y,val\n")
    cfg = Config(source="csv", captions="x.csv", images="photos/{split}")
    assert {s: r[0]["captions"] for s, r in sources.read(cfg).items()} == {
        "train": ["x"], "val": ["y"]
    }  # fmt: skip


def test_nothing_is_dropped_where_a_source_says_a_thing_twice_or_for_some_only(here, capsys):
    photos(here / "photos", ["a.png", "b.png"])
    Path("x.csv").write_text("image,caption,caption\na.png,one,two\n")
    _, error = problems_of(capsys, source="csv", captions="x.csv")
    assert error == "x.csv:1: two columns are called caption"
    Path("x.jsonl").write_text('{"image": "a.png", "caption": "one", "captions": ["two"]}')
    listed, _ = problems_of(capsys, source="jsonl", captions="x.jsonl")
    assert "both `caption` and `captions`: 1\n  x.jsonl:1" in listed
    sentences = {"a": {"raw": "x"}, "b": {"raw": "y", "sentid": 0}}
    images = [{"filename": f"{n}.png", "split": "train", "imgid": n, "sentences": [sentence]}
              for n, sentence in sentences.items()]  # fmt: skip
    Path("k.json").write_text(json.dumps({"images": images}))
    listed, _ = problems_of(capsys, source="karpathy", captions="k.json")
    assert "caption ids for some images only: 1\n  k.json: images[1]" in listed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photos(folder, ["f.png", "g.png"])
    return folder


@given(st.lists(st.tuples(st.text(min_size=1), st.sampled_from(["f.png", "g.png"])), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_csv_and_jsonl_or_is_refused(folder, rows):
    with open(folder / "x.csv", "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([("image", "caption"), *((n, c) for c, n in rows)])
    lines = [json.dumps({"image": name, "caption": caption}) for caption, name in rows]
    (folder / "x.jsonl").write_text("\n".join(lines))
    expected = {}
    for caption, name in rows:
        expected.setdefault(name, []).append(" ".join(caption.split()))
    usable = not any(sources.bad_text(c) for captions in expected.values() for c in captions)
    for source in ("csv", "jsonl"):
        cfg = Config(source=source, captions=f"{folder}/x.{source}", images=str(folder))
        problems = sources.Problems()
        splits = sources.gather(sources.READERS[source](cfg, problems), cfg, problems)
        assert bool(problems.kinds) != usable
        if usable:
            assert {r["file_name"]: r["captions"] for r in splits["train"]} == expected


@given(st.binary(max_size=300), st.sampled_from(["csv", "jsonl", "flickr", "coco", "karpathy"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused_in_one_line(folder, data, source):
    head = b"image,caption\nf.png,x\n" if source == "csv" else b""
    (folder / "x.any").write_bytes(head + data)
    cfg = Config(source=source, captions=f"{folder}/x.any", images=str(folder))
    try:
        sources.read(cfg)
    except UserError as error:
        assert str(error).isprintable()


ANY_JSON = st.recursive(
    st.sampled_from([None, True, "f.png"]) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from("id image_id file_name filename split sentences raw caption sentid "
                        "filepath cocoid tokens captions image".split()), inner, max_size=6),
    max_leaves=12,
)  # fmt: skip


@given(st.lists(ANY_JSON, max_size=4), st.lists(ANY_JSON, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_json_is_read_or_refused_in_one_line(folder, images, annotations):
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "x.json").write_text(content)
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, images)))
    for source, name in (("coco", "x.json"), ("karpathy", "x.json"), ("jsonl", "x.jsonl")):
        cfg = Config(source=source, captions=f"{folder}/{name}", images=str(folder))
        with pytest.raises(UserError):  # there never is a val split
            sources.read(cfg)


def test_an_earlier_dataset_stays_until_the_source_is_good(here, clip):
    every_photo(here / "photos")
    told = dict(dataset="mine", source="csv", clip=clip, workers=0) | as_csv(here)
    prepare.main(Config(**told))
    before = made()
    with open("val.csv", "a") as file:
        print("f.png,,", file=file)
    with pytest.raises(UserError, match="1 problem"):
        prepare.main(Config(**told))
    assert made() == before


# ---------------------------------------------------------------------------------------------
# The user's own embeddings


def test_own_embeddings_and_their_mistakes(here, capsys):
    told = dict(dataset="mine", source="csv", embeddings="e.npy", embedding_names="names.txt",
                captions=as_csv(here)["captions"])  # fmt: skip
    names = [n for split in PHOTOS.values() for n in split]
    array = np.random.default_rng(0).standard_normal((7, 3, 5), np.float32)
    np.save("e.npy", array[::-1])
    Path("names.txt").write_text("\n".join(names[::-1]) + "\n", encoding="utf-8")
    prepare.main(Config(**told))
    for split, rows in (("train", array[:5]), ("val", array[5:])):
        opened = Split("data/mine", split)
        assert (opened.embeddings == rows.astype(np.float16)).all()
        assert [i["file_name"] for i in opened.references()[0]] == list(PHOTOS[split])
    meta = opened.meta
    assert (meta["features"], meta["n_positions"], meta["embedding_dim"]) == ("grid", 3, 5)
    before = made()

    Path("names.txt").write_text("\n".join(names[:6]), encoding="utf-8")
    with pytest.raises(UserError, match=r"e.npy has shape \(7, 3, 5\), names.txt has 6 names"):
        prepare.main(Config(**told))
    Path("names.txt").write_text("\n".join([*names[:6], names[0]]), encoding="utf-8")
    with pytest.raises(UserError, match="1 names occur twice"):
        prepare.main(Config(**told))
    Path("names.txt").write_text("\n".join([*names[:6], "other.png"]), encoding="utf-8")
    with pytest.raises(UserError, match="e.npy: 1 problem"):
        prepare.main(Config(**told))
    assert "images without a row in names.txt: 1\n  val: g.png" in capsys.readouterr().err
    Path("names.txt").write_text("\n".join(names[:5] + ["x", "y"]), encoding="utf-8")
    Path("val.csv").write_text("image,caption\nsub/c.png,x\nother/c.png,y\n")
    with pytest.raises(UserError, match="e.npy: 2 problem"):
        prepare.main(Config(**told))
    assert "two images of one row: 2\n  val: c.png and sub/c.png" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="embedding_names: expected a file with a name for each"):
        Config(**told | {"embedding_names": ""})
    as_csv(here)
    Path("names.txt").write_text("\n".join(names), encoding="utf-8")
    np.save("e.npy", array * 1e9)
    with pytest.raises(UserError, match="not finite in half precision, first for a b.png"):
        prepare.main(Config(**told))
    for bad in (b"", b"\x93NUMPY garbage", b"PK\3\4"):
        Path("e.npy").write_bytes(bad)
        with pytest.raises(UserError, match="e.npy: not a .npy array"):
            prepare.main(Config(**told))
    np.save("e.npy", np.array([{}] * 7), allow_pickle=True)
    with pytest.raises(UserError, match="e.npy: not a .npy array"):
        prepare.main(Config(**told))
    np.savez("e.npz", array)
    os.replace("e.npz", "e.npy")
    with pytest.raises(UserError, match="e.npy: not a .npy array"):
        prepare.main(Config(**told))
    assert made() == before


# ---------------------------------------------------------------------------------------------
# Bad images


def test_bad_images_are_left_out_and_listed_and_the_rest_stays_aligned(here, clip, capsys):
    told = many(here, 30) | {"clip": clip, "encode_batch": 4, "workers": 0}
    bad = {"train0.png": b"", "train5.png": b"text", "train6.png": b"", "val3.png": b"GIF89a",
           "train29.png": b"\x89PNG\r\n"}  # fmt: skip
    for i in range(8, 12):  # a whole batch
        bad[f"train{i}.png"] = b""
    for name, data in bad.items():
        (here / "photos" / name).write_bytes(data)
    with pytest.raises(UserError, match="of 34 images cannot be used, more than max_bad=0.01"):
        prepare.main(Config(**told))
    assert not Path("data/mine/meta.json").exists()
    prepare.main(Config(**told, max_bad=0.3))
    assert "left out 9 of 34 images, listed in data/mine/skipped.csv" in capsys.readouterr().out
    with open("data/mine/skipped.csv", newline="") as file:
        skipped = list(csv.DictReader(file))
    assert {row["file_name"] for row in skipped} == set(bad)
    assert list(skipped[0].values()) == ["train", "0", "train0.png", "empty file"]
    reference = Encoder(clip)
    for split, n in (("train", 30), ("val", 4)):
        opened = Split("data/mine", split)
        images, captions = opened.references()
        kept = [i for i in range(n) if f"{split}{i}.png" not in bad]
        assert [i["file_name"] for i in images] == [f"{split}{i}.png" for i in kept]
        assert [i["id"] for i in images] == [i + 30 * (split == "val") for i in kept]
        assert captions == [[f"photo {split}{i}"] for i in kept]
        assert opened.embeddings.shape == (len(kept), 1, 24)
        for row, image in enumerate(images):
            x = reference([read_image(here / "photos" / image["file_name"])])
            y = torch.tensor(opened.embeddings[row : row + 1])
            torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=2e-3)
    for name in bad:  # mended, the list goes
        picture(9, 9).save(here / "photos" / name)
    prepare.main(Config(**told))
    assert not Path("data/mine/skipped.csv").exists()


def test_captions_of_shards_that_cannot_be_used_are_left_out_and_listed(here, clip):
    """img2dataset writes what the web has; nobody should have to repair a line within a tar."""
    every_photo(here / "photos")
    captions = {"train": ["a dog", "", "two dogs", "x" * 3000, None, b"\xff"], "val": ["a cat"]}
    Path("shards").mkdir()
    for split, texts in captions.items():
        with tarfile.open(f"shards/{split}.tar", "w") as tar:
            for i, text in enumerate(texts):
                bad = (split, i) == ("train", 2)
                photo = (
                    b"no image" if bad else (here / "photos" / f"{'cdefg'[i % 5]}.png").read_bytes()
                )
                add(tar, f"{i:04d}.png", photo)
                if text is not None:
                    add(tar, f"{i:04d}.txt", text if isinstance(text, bytes) else text.encode())
    told = dict(dataset="mine", source="shards", captions="shards/{split}.tar", clip=clip,
                encode_batch=2, workers=0)  # fmt: skip
    with pytest.raises(UserError, match=r"at least \(rank 0\) 4 of 7 images cannot be used"):
        prepare.main(Config(**told))
    prepare.main(Config(**told, max_bad=0.8))
    with open("data/mine/skipped.csv", newline="") as file:
        rows = [(row["id"], row["reason"]) for row in csv.DictReader(file)]
    assert rows == [
        ("0001", "caption: empty"),
        ("0002", f"no image in a known format ({' '.join(encoder_module.FORMATS)})"),
        ("0003", "caption: more than 2000 characters"), ("0004", "caption: missing"),
        ("0005", "caption: a control character, or not UTF-8"),
    ]  # fmt: skip
    opened = Split("data/mine", "train")
    images, kept = opened.references()
    assert [i["id"] for i in images] == ["0000"] and kept == [["a dog"]]
    x = Encoder(clip)([read_image(here / "photos/c.png")])
    torch.testing.assert_close(x, torch.tensor(opened.embeddings), atol=2e-3, rtol=2e-3)


def test_a_spreadsheet_runs_nothing_of_skipped_csv(here, clip):
    told = many(here, 5) | {"clip": clip, "workers": 0}
    (here / "photos" / "=cmd|x").write_bytes(b"")
    with open("train.csv", "a") as file:
        print("\n=cmd|x,y", file=file)
    prepare.main(Config(**told, max_bad=0.5))
    assert Path("data/mine/skipped.csv").read_text().splitlines()[1] == "train,5,'=cmd|x,empty file"


def test_a_split_of_bad_images_only(here, clip):
    told = many(here, 9, 1) | {"clip": clip, "workers": 0, "max_bad": 0.5}
    (here / "photos" / "val0.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images of split `val` can be read"):
        prepare.main(Config(**told))


# ---------------------------------------------------------------------------------------------
# Interrupted, sharded, changed


EVERY_BATCH = """
import sys, prepare
from configurator import Config, configure, run

prepare.SYNC = 0.0  # every batch is safe at once
run(prepare.main, configure(Config, sys.argv[1:]))
"""


def begin(folder: Path, told: dict, rank: int = 0, world: int = 1, port: int = 0):
    """Start prepare.py in a process of its own, for several ranks as torchrun would."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if world > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    args = [f"--{k}={v}" for k, v in told.items()]
    return start("-c", EVERY_BATCH, *args, cwd=folder, env=env)


def wait_for_batches(folder: Path, n: int, process) -> None:
    """Wait until n batches are noted as done."""
    deadline = time.monotonic() + PATIENCE
    while lines_done(folder) < n and process.poll() is None:
        assert time.monotonic() < deadline, f"no {n} batches:\n{stacks(process)}"
        time.sleep(0.001)


def lines_done(folder: Path) -> int:
    """Batches that are noted as done."""
    return len(prepare.progress(folder / "data/mine/encoding"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, clip):
    """A source of 300 photos, three of them bad, and what one run makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    told = many(folder, 260, 40) | {"clip": clip, "encode_batch": 2, "workers": 1, "max_bad": 0.5}
    for name in ("train0.png", "train77.png", "val39.png"):
        (folder / "photos" / name).write_bytes(b"")
    finish(begin(folder, told))
    return folder, told, made(folder / "data/mine")


def copied(undisturbed, tmp_path) -> tuple[Path, dict, dict]:
    folder, told, expected = undisturbed
    for name in ("photos", "train.csv", "val.csv"):
        os.symlink(folder / name, tmp_path / name)
    return tmp_path, told, expected


def test_ten_kills_change_nothing(undisturbed, tmp_path):
    folder, told, expected = copied(undisturbed, tmp_path)
    rng, before = random.Random(0), 0
    for _ in range(10):
        process = begin(folder, told)
        target = before + rng.randint(1, 6)
        wait_for_batches(folder, target, process)
        time.sleep(rng.random() * 0.01)
        process.kill()
        assert "Error" not in "".join(wait(process))
        assert process.returncode == -9, "it ended before it was killed"
        assert not (folder / "data/mine/meta.json").exists()
        assert lines_done(folder) >= target  # each run went on from the one before
        before = lines_done(folder)
    finish(begin(folder, told))
    assert made(folder / "data/mine") == expected


def test_two_processes_and_a_kill_change_nothing(undisturbed, tmp_path):
    folder, told, expected = copied(undisturbed, tmp_path)
    for killed in (True, False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ranks = [begin(folder, told, rank, 2, port) for rank in range(2)]
        if killed:
            wait_for_batches(folder, 10, ranks[0])
            for process in ranks:
                process.kill()
        outputs = [wait(process) for process in ranks]
        assert killed or [process.returncode for process in ranks] == [0, 0], outputs
    assert len(list((folder / "data/mine").glob("*"))) == len(expected)
    assert made(folder / "data/mine") == expected


class Stop(Exception):
    pass


@pytest.fixture
def half_done(here, clip, monkeypatch):
    """A run that stopped after three batches. Returns its settings, and the batches of a rerun."""
    told = many(here, 20) | {"clip": clip, "encode_batch": 4, "workers": 0}
    encoded = []

    def encode(self, pixels, real=Encoder.encode):
        encoded.append(len(pixels))
        if len(encoded) == 4:
            raise Stop
        return real(self, pixels)

    monkeypatch.setattr(prepare, "SYNC", 0.0)
    monkeypatch.setattr(encoder_module.Encoder, "encode", encode)
    with pytest.raises(Stop):
        prepare.main(Config(**told))
    encoded += [0] * 9  # Stop no more
    del encoded[4:]
    return told, encoded


def rerun(told: dict, encoded: list) -> int:
    """Batches that a rerun encodes, besides the last check's of each split."""
    encoded.extend([0] * 5)
    before = len(encoded)
    prepare.main(Config(**told))
    return len(encoded) - before - 2


def test_a_rerun_encodes_only_what_is_missing(half_done):
    told, encoded = half_done
    assert rerun(told, encoded) == 4  # of 6 batches, two were noted


def test_a_rerun_with_other_settings_or_images_starts_anew(half_done, here, capsys):
    told, encoded = half_done
    shutil.copytree(here / "data", here / "kept")
    changes = [{"encode_batch": 5}, {"features": "grid"}, {"features": "grid", "grid": 2}]
    for change in changes:
        batches = 5 if "encode_batch" in change else 6
        shutil.rmtree(here / "data")
        shutil.copytree(here / "kept", here / "data")
        assert rerun(told | change, encoded) == batches
        assert "from the start" in capsys.readouterr().out
    shutil.rmtree(here / "data")
    shutil.copytree(here / "kept", here / "data")
    picture(20, 30, 99).save(here / "photos" / "train0.png")  # another image by the same name
    assert rerun(told, encoded) == 6
    x = Encoder(told["clip"])([read_image(here / "photos" / "train0.png")])
    y = torch.tensor(Split("data/mine", "train").embeddings[:1])
    torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("bad", [False, True])
def test_cut_off_at_the_very_end_nothing_is_encoded_again(half_done, here, monkeypatch, bad):
    told, encoded = half_done
    told = told | {"max_bad": 0.5}
    if bad:
        (here / "photos" / "train3.png").write_bytes(b"")

    def cut(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_meta", cut)
        with pytest.raises(Stop):
            rerun(told, encoded)
    assert rerun(told, encoded) == 0
    x = Encoder(told["clip"])([read_image(here / "photos" / "train19.png")])
    y = torch.tensor(Split("data/mine", "train").embeddings[-1:])
    torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=2e-3)


def test_a_full_disk_leaves_the_earlier_dataset_whole(here, clip, monkeypatch):
    """meta.json was deleted first, and only then it turned out that there was no room."""
    told = many(here, 8) | {"clip": clip, "workers": 0}
    prepare.main(Config(**told))
    before = made()
    (here / "train.csv").write_text((here / "train.csv").read_text().replace("photo", "picture"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data.np.save", full)
        with pytest.raises(OSError, match="No space left on device: '.*train_tokens.npy'"):
            prepare.main(Config(**told))
    assert made() == before
    prepare.main(Config(**told))
    assert "picture" in Path("data/mine/train.json").read_text()


def test_a_vocabulary_too_small_is_told_before_anything_is_encoded(here, clip, monkeypatch):
    told = many(here, 8) | {"clip": clip, "workers": 0}
    monkeypatch.setattr(prepare, "encode", None)
    with pytest.raises(UserError, match="vocab_size=9: .* at least [0-9]+ is needed"):
        prepare.main(Config(**told, vocab_size=9))


def test_a_second_prepare_of_the_same_dataset_is_refused(here, clip):
    told = many(here, 8) | {"clip": clip, "workers": 0}
    with prepare.alone(Path("data/mine")):
        said = one_line(start("prepare.py", *(f"--{k}={v}" for k, v in told.items())))
    assert said == "another prepare.py is writing data/mine/\n"
    prepare.main(Config(**told))
    assert not Path("data/mine/lock").exists()


def test_scenes_of_its_own_and_the_users_files_are_not_confused(here):
    """--source was forgotten, and scenes took the place of the user's dataset."""
    with pytest.raises(
        UserError, match="source=shapes renders .* takes no captions: give --source"
    ):
        prepare.main(Config(dataset="mine", captions="x.csv", shapes_train=9, shapes_eval=9))
    assert not Path("data").exists()


# ---------------------------------------------------------------------------------------------
# Downloads, from a server on loopback that breaks


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; each of the first `breaks` GETs ends after 1,000 bytes."""

    files: dict[str, bytes] = {}
    breaks, ranges, tag, asked, shift, length = 0, True, '"1"', [], 0, True

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def reply(self, body):
        cls = type(self)
        data = cls.files.get(self.path)
        if data is None:
            return self.send_error(404)
        wanted, begin = self.headers.get("Range"), 0
        if body:
            cls.asked.append(wanted)
        if wanted and cls.ranges and self.headers.get("If-Range") == cls.tag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-")) + cls.shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if cls.length or not wanted:
            self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("ETag", cls.tag)
        self.end_headers()
        if body:
            if cls.breaks:
                cls.breaks -= 1
                self.wfile.write(data[begin : begin + 1000])
                self.wfile.flush()
                self.connection.close()
            else:
                self.wfile.write(data[begin:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("Fresh", (Server,), {"files": {}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(download, "WAIT", 0.0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield handler
        server.shutdown()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as content:
        for name, data in files.items():
            content.writestr(name, data)
    return file.getvalue()


def test_a_broken_download_goes_on(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks = data, 3
    download.download(f"{server.url}/x.zip", Path("d/x.zip"))
    assert Path("d/x.zip").read_bytes() == data
    assert server.asked == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    note = json.loads(Path("d/x.zip.json").read_text())
    assert note["sha256"] == hashlib.sha256(data).hexdigest() and note["bytes"] == 4500
    assert [p.name for p in sorted(Path("d").iterdir())] == ["x.zip", "x.zip.json"]


def test_given_up_it_goes_on_in_the_next_run(here, server, monkeypatch):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks = data, 1
    monkeypatch.setattr(download, "TRIES", 1)

    def gone(*_, real=download.request):
        if Path("x.zip.part").exists():
            raise ConnectionResetError("gone")
        return real(*_)

    with monkeypatch.context() as patch:
        patch.setattr(download, "request", gone)
        with pytest.raises(UserError, match="gone: tried 1 times; the same command goes on"):
            download.download(f"{server.url}/x.zip", Path("x.zip"))
    download.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data and server.asked == [None, "bytes=1000-"]


def test_without_ranges_or_after_a_change_it_starts_again(here, server, monkeypatch):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks, server.ranges = data, 1, False
    download.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data

    server.ranges, server.breaks, server.tag = True, 1, '"old"'
    server.files["/y.zip"] = b"old" * 1000

    def changing(*args, real=download.request):
        size = real(*args)
        server.files["/y.zip"], server.tag = data, '"new"'
        return size

    monkeypatch.setattr(download, "request", changing)
    download.download(f"{server.url}/y.zip", Path("y.zip"))
    assert Path("y.zip").read_bytes() == data  # not half old, half new


def test_a_server_that_sends_another_part_or_no_length(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks, server.shift = data, 1, 500
    download.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data  # it was taken for the whole
    assert server.asked == [None, "bytes=1000-", None]
    server.breaks, server.shift, server.length = 2, 0, False
    download.download(f"{server.url}/x.zip", Path("y.zip"))
    assert Path("y.zip").read_bytes() == data  # the end of a broken part was taken for the file's


def test_archives_are_told_apart_checked_and_deleted_when_used(here, server):
    server.files |= {"/dl?id=1": zipped({"photos/a": b"x"}), "/dl?id=2": zipped({"x.csv": b"y"})}
    both = f"{server.url}/dl?id=1 raw/photos; {server.url}/dl?id=2 raw/x.csv"
    told = dict(downloads=both, images="raw/photos", captions="raw/x.csv", yes=True)
    second = server.files.pop("/dl?id=2")
    with pytest.raises(UserError, match="id=2: 404"):
        download.fetch(Config(**told))
    assert [p.suffix for p in sorted(Path("raw").iterdir())] == [".json", ""]  # a note, photos
    server.files["/dl?id=2"] = second
    download.fetch(Config(**told))
    assert Path("raw/x.csv").read_bytes() == b"y" and len(list(Path("raw").iterdir())) == 4
    server.files["/b.zip"] = zipped({"b": b"right"})
    Path("raw/b.zip").write_bytes(zipped({"b": b"wrong"}))
    checksum = hashlib.sha256(server.files["/b.zip"]).hexdigest()
    told = dict(downloads=f"{server.url}/b.zip raw/b {checksum}", images="raw/b", yes=True)
    with pytest.raises(UserError, match="its checksum is not .*deleted"):
        download.fetch(Config(**told))
    download.fetch(Config(**told))
    assert Path("raw/b").read_bytes() == b"right"


def test_checksums(here, server):
    data = zipped({"c.csv": b"x"})
    server.files["/x.zip"] = data
    url, path = f"{server.url}/x.zip", Path("x.zip")
    for name in ("sha256", "md5"):
        download.download(url, path, hashlib.new(name, data).hexdigest())
    with pytest.raises(UserError, match="its checksum is not 0000"):
        download.download(url, path, "0" * 64)
    download.download(url, path)
    server.files["/x.zip"] = zipped({"c.csv": b"y"})
    with pytest.raises(UserError, match="delete x.zip.json to accept the new file"):
        download.download(url, path)
    with pytest.raises(UserError, match="404"):
        download.download(f"{server.url}/none.zip", Path("none.zip"))


def test_prepare_fetches_what_is_missing_after_asking(here, clip, server, monkeypatch, capsys):
    told = many(here, 6) | {"clip": clip, "workers": 0, "images": "raw/photos"}
    names = {f"photos/{p.name}": p.read_bytes() for p in Path("photos").iterdir()}
    names |= {"__MACOSX/photos/x": b"junk", "other.txt": b"not asked for"}
    server.files |= {"/a.zip": zipped(names), "/c.zip": zipped({"x.csv": b"image,caption\n"})}
    shutil.rmtree("photos")
    told["downloads"] = f"{server.url}/a.zip raw/photos; {server.url}/c.zip raw/x.csv;"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="raw/photos is missing: add --yes to download it"):
        prepare.main(Config(**told))
    out = capsys.readouterr().out
    assert "/a.zip, 0.0 MB, for raw/photos" in out and "c.zip" not in out  # captions lie elsewhere

    def end(_):
        raise EOFError

    for answer in (lambda _: "n", lambda _: "", end):  # end: Ctrl-D
        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        with pytest.raises(UserError, match="nothing was downloaded"):
            prepare.main(Config(**told))
    assert not Path("raw").exists()
    server.breaks = 2
    prepare.main(Config(**told, yes=True))
    assert len(Split("data/mine", "train")) == 6
    assert sorted(p.name for p in Path("raw").iterdir()) == ["a.zip.json", "photos"]
    server.files.clear()
    prepare.main(Config(**told))  # all is there: nothing is asked


def test_hostile_zips(here, server):
    def fetch(files, name="photos"):
        Path("a.zip").write_bytes(files if isinstance(files, bytes) else zipped(files))
        download.unpack(Path("a.zip"), Path("raw") / name)

    Path("raw").mkdir()
    with pytest.raises(UserError, match=r"member photos/../../escape.txt points outside"):
        fetch({"photos/a.txt": b"", "photos/../../escape.txt": b""})
    with pytest.raises(UserError, match="holds no photos"):
        fetch({"../photos/a": b"", "/photos/b": b""})
    text = {"photos/a": b"hello world, " * 5000 + random.Random(0).randbytes(3000)}
    deflated, flipped = bytearray(zipped(text, zipfile.ZIP_DEFLATED)), bytearray(zipped(text))
    flipped[200] ^= 1
    deflated[120:500] = bytes(380)
    for broken in (b"no zip", zipped(text)[:500], deflated, flipped):
        Path("a.zip.json").write_text("{}")
        with pytest.raises(
            UserError, match="not a zip.*deleted, the same command fetches it again"
        ):
            fetch(bytes(broken))
        assert not Path("a.zip").exists() and not Path("a.zip.json").exists()
    assert not Path("raw/photos").exists() and not Path("escape.txt").exists()
    fetch({"photos/a": b"x"})
    assert Path("raw/photos/a").read_bytes() == b"x"
    with pytest.raises(UserError, match="downloads: expected `URL PATH"):
        download.fetch(Config(downloads="file:///etc/passwd x"))
