"""Every caption format, from source file to caption; and every kind of bad input."""

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import made, photos
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from configurator import Config
from data import Split
from parts import encoder, sources
from parts.common import UserError
from parts.encoder import Encoder, read_image
from sample import SampleConfig, SplitSource

# ---------------------------------------------------------------------------------------------
# A tiny CLIP, photos, and their captions


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
            name_of_split = "restval" if split == "train" and i > 2 else split
            images.append({"filepath": of, "filename": last, "cocoid": 100 + number,
                           "split": name_of_split, "sentences": sentences})  # fmt: skip
            number += 1
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return {"source": "karpathy", "captions": "dataset.json", "images": "photos"}


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    tar.addfile(member, io.BytesIO(data))


def as_shards(folder: Path) -> dict:
    """One caption per image, two shards per split; the keys start over in each split."""
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
    options = {"source": build.__name__.rpartition("_")[2]} | build(here)
    prepare.main(Config(dataset="mine", clip=clip, encode_batch=2, workers=0, **options))
    reference = Encoder(clip)
    all_ids = set()
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
            all_ids |= {i["id"] for i in images}
        for row, file in enumerate(files):
            x = reference([read_image(file)])[0].float()
            y = opened.embedding(np.array([row]))[0].float()
            torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
            begin, end = opened.image_start[row], opened.image_start[row + 1]
            text = opened.tokenizer.decode(opened.tokens[begin:end].tolist())
            assert text == " ".join(captions[row])  # bos is left out, a word's start is a space
    if build in (as_one_csv, as_jsonl):
        assert all_ids == {f"no. {n}" for split in PHOTOS.values() for n in split}
    if build is as_karpathy:
        assert all_ids == set(range(100, 107))
    if build is as_coco:
        assert all_ids == {7, 8, 9, 10, 11, 1007, 1008}
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
    # sample.py looked for them in photos/val, and might have shown others of these names
    every_photo(here / "photos" / "val")
    captioner = SimpleNamespace(split=lambda name: Split("data/mine", name))
    shown = SplitSource(SampleConfig(ckpt="", split="val"), captioner).items
    assert [item["path"] for item in shown] == [f"photos/train/{name}" for name in names[1]]
    before = made()
    prepare.main(cfg)
    assert made() == before  # the choice depends on the seed alone
    with pytest.raises(UserError, match="no images in split `val`, only in train: --val_images=N"):
        prepare.main(Config(**{**vars(cfg), "val_images": 0}))
    with pytest.raises(UserError, match="val_images=5, but there are 5 images in all"):
        prepare.main(Config(**{**vars(cfg), "val_images": 5}))


class Ids(SimpleNamespace):
    """A tokenizer of ten ids."""

    def __len__(self):
        return 10


def test_tokens_are_one_list_of_whole_numbers():
    ids = Ids(pad=0, bos=1, eos=2, unk=3)
    for tokens in ([1, 5, 3, 2], [5, 3], "5 3", "[5, 3]"):
        assert sources.token_ids(tokens, ids) == [5, 3]
    for tokens in (5, [[5, 3]], [5, True], [5, 3.0], ["5"], [5, 10], [5, 0], "5 x", [], None):
        assert sources.token_ids(tokens, ids) is None


def test_every_caption_needs_its_own_tokens(here, capsys):
    """An empty caption was dropped before they were counted, and the last of four lists with it."""
    photos(here / "photos", ["f.png", "g.png"])
    rows = [{"captions": ["", "x y", "z"], "tokens": [[5], [6], [7], [8]]},
            {"captions": ["", "x y"], "tokens": [[5], [6]]}]  # fmt: skip
    lines = [
        json.dumps({"image": f"{name}.png"} | row) for name, row in zip("fg", rows, strict=True)
    ]
    Path("x.jsonl").write_text("\n".join(lines))
    cfg = Config(dataset="d", source="jsonl", captions="x.jsonl", images="photos", val_images=1)
    with pytest.raises(UserError, match="x.jsonl: 1 problem"):
        sources.read(cfg, Ids(pad=0, bos=1, eos=2, unk=3))
    listed = "bad tokens (expected those of each caption): 1\n  x.jsonl:1"
    assert listed in capsys.readouterr().err


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
    options = dict(dataset="mine", source="csv", captions="{split}.csv", images="photos", clip=clip,
                workers=0)  # fmt: skip
    with pytest.raises(UserError, match="train.csv:2: tokens need --tokenizer=FILE"):
        prepare.main(Config(**options))
    prepare.main(Config(tokenizer="own.model", **options))
    opened = Split("data/mine", "train")
    assert opened.tokenizer.model == own.model
    assert opened.tokens.tolist() == [own.bos, 9, 8, 7] * 6
    Path("val.csv").write_text("image,caption,tokens\nf.png,x,5 99\ng.png,x,7 8\n")
    with pytest.raises(UserError, match="{split}.csv: 1 problem"):
        prepare.main(Config(tokenizer="own.model", **options))
    assert "none of them pad, bos or eos): 1\n  val.csv:2: ['5 99']" in capsys.readouterr().err
    Path("val.csv").write_text("image,caption\nf.png,x\n")
    with pytest.raises(UserError, match="{split}.csv: 1 problem"):
        prepare.main(Config(tokenizer="own.model", **options))
    assert "tokens for some images only: 1\n  val.csv:2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# What people have. `own` gives embeddings, so that nothing needs encoding


def own(names: list[str], **settings) -> Config:
    """Write embeddings for these images. Return the settings of prepare.py."""
    np.save("e.npy", np.random.default_rng(0).standard_normal((len(names), 4), np.float32))
    Path("names.txt").write_text("\n".join(names), encoding="utf-8-sig")
    return Config(dataset="mine", embeddings="e.npy", embedding_names="names.txt",
                  vocab_size=60, **settings)  # fmt: skip


def coco(names: list[str], first: int = 1, captions: int = 1, **more) -> str:
    """Return a COCO file in which images and captions are counted from `first` and from 1."""
    images = [{"id": first + i, "file_name": name} for i, name in enumerate(names)]
    owners = [image["id"] for image in images for _ in range(captions)]
    annotations = [
        {"id": 1 + n, "image_id": i, "caption": f"a dog {n}"} for n, i in enumerate(owners)
    ]
    return json.dumps({"images": images, "annotations": annotations} | more)


def ids_of(split: str) -> list:
    return [image["id"] for image in Split("data/mine", split).references()[0]]


@pytest.mark.parametrize("step", [0, 1000])
def test_ids_may_begin_anew_in_each_coco_file(here, step):
    """Ids of images, or only of captions, that begin at 1 in each file were refused, row by row."""
    names = {"train": ["0.jpg", "1.jpg", "2.jpg"], "val": ["3.jpg", "4.jpg"]}
    for n, (split, images) in enumerate(names.items()):
        Path(f"{split}.json").write_text(coco(images, 1 + step * n, captions=2))
    prepare.main(own(sum(names.values(), []), source="coco", captions="{split}.json"))
    assert ids_of("train") == [1, 2, 3] and ids_of("val") == [1 + step, 2 + step]
    annotations = json.loads(Path("data/mine/val.json").read_text())["annotations"]
    assert [a["id"] for a in annotations] == [1, 2, 3, 4]


def test_ids_may_begin_anew_in_each_split_of_any_source(here, capsys):
    for split in ("train", "val"):
        rows = [f"{split}{i}.jpg,a dog,{i}" for i in range(3)]
        Path(f"{split}.csv").write_text("\n".join(["image,caption,id", *rows]))
    names = [f"{split}{i}.jpg" for split in ("train", "val") for i in range(3)]
    prepare.main(own(names, source="csv", captions="{split}.csv"))
    assert ids_of("train") == ids_of("val") == [0, 1, 2]
    images = [{"filename": name, "imgid": n % 3, "split": name[:-5],
               "sentences": [{"raw": "a cat", "sentid": n % 3}]}
              for n, name in enumerate(names)]  # fmt: skip
    Path("k.json").write_text(json.dumps({"images": images}))
    prepare.main(own(names, source="karpathy", captions="k.json"))
    assert ids_of("train") == ids_of("val") == [0, 1, 2]
    images[1]["sentences"][0]["sentid"] = 0  # within a split, they must differ
    Path("k.json").write_text(json.dumps({"images": images}))
    listed, _ = problems_of(capsys, **vars(own(names, source="karpathy", captions="k.json")))
    assert listed == "id of two captions: 1\n  k.json: images[1]: 0\n"


def test_keys_may_begin_anew_in_each_shard_or_folder(here):
    """They were refused as ids of two images. Predictions need ids that differ within a split."""
    photos(here, ["f.png"])
    data = Path("f.png").read_bytes()
    pairs = [{f"{k}.png": data, f"{k}.txt": b"a dog"} for k in ("000", "001")]
    for path, members in (
        ("out/a/0.tar", pairs[0]), ("out/b/0.tar", pairs[0] | pairs[1]), ("val.tar", pairs[0]),
    ):  # fmt: skip
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shard_of(path, members)
    cfg = Config(dataset="mine", source="shards", captions="out/*/*.tar", val_images=1)
    records = [r for split in sources.read(cfg).values() for r in split]
    assert {r.id for r in records} == {"a/0/000", "b/0/000", "b/0/001"}
    assert all(r.file_name == f"{r.id[:3]}.tar/{r.id[4:]}.png" for r in records)
    Path("train.tar").write_bytes(Path("out/b/0.tar").read_bytes())
    splits = sources.read(Config(dataset="mine", source="shards", captions="{split}.tar"))
    assert [[r.id for r in records] for records in splits.values()] == [["000", "001"], ["000"]]


def test_a_byte_order_mark_is_no_text(here):
    """Files saved on Windows: a JSON with a BOM was refused, a caption in a tar began with it."""
    bom = b"\xef\xbb\xbf"
    names = ["a.png", "b.png"]
    photos(here, names)
    karpathy = [{"filename": n, "split": split, "sentences": [{"raw": "a dog"}]}
                for n, split in zip(names, ("train", "val"), strict=True)]  # fmt: skip
    lines = ['{"image": "a.png", "caption": "a dog"}', '{"image": "b.png", "caption": "a dog"}']
    shard_of("x.tar", {"a.png": Path("a.png").read_bytes(), "a.txt": bom + b"a dog",
                       "b.png": Path("b.png").read_bytes(),
                       "b.json": bom + b'{"caption": "a dog"}'})  # fmt: skip
    Path("x.karpathy").write_bytes(bom + json.dumps({"images": karpathy}).encode())
    Path("x.coco").write_bytes(bom + coco(names).encode().replace(b" 0", b"").replace(b' 1"', b'"'))
    Path("x.jsonl").write_bytes(bom + "\n".join(lines).encode())
    Path("x.csv").write_bytes(bom + b"image,caption\na.png,a dog\nb.png,a dog\n")
    Path("x.flickr").write_bytes(bom + b"a.png#0\ta dog\nb.png#0\ta dog\n")
    os.rename("x.tar", "x.shards")
    for source in sources.READERS:
        cfg = Config(
            dataset="mine", source=source, captions=f"x.{source}", images=".", val_images=1
        )
        records = [record for split in sources.read(cfg).values() for record in split]
        assert sorted(Path(r.file_name).name for r in records) == names, source
        assert [r.captions for r in records] == [["a dog"]] * 2, source
    prepare.main(own(names, source="csv", captions="x.csv", val_images=1))  # names.txt has one, too


def test_what_macos_adds_to_a_tar_is_ignored(here):
    """Each file has a twin `._name`: one of an image and one of a caption stopped prepare.py."""
    photos(here, ["f.png"])
    members = {}
    for key in ("0", "sub/1", "2"):
        folder, _, name = key.rpartition("/")
        for suffix, data in (("png", Path("f.png").read_bytes()), ("txt", key.encode())):
            members[f"./{folder}/._{name}.{suffix}"] = b"\0\5\x16\7 Mac OS X"
            members[f"__MACOSX/{key}.{suffix}"] = b"\0\5\x16\7 Mac OS X"
            members[f"./{key}.{suffix}"] = data
    shard_of("mac.tar", members)
    splits = sources.read(Config(dataset="mine", source="shards", captions="mac.tar", val_images=1))
    records = [record for records in splits.values() for record in records]
    assert {(r.id, *r.captions, r.bad) for r in records} == {
        (k, k, "") for k in ("0", "sub/1", "2")
    }


def test_images_of_every_readable_suffix_in_a_tar(here, capsys):
    """A tar of .gif and .bmp had "captions without an image"."""
    photos(here, ["f.gif", "f.bmp", "f.png"])
    files = {f"{n}.{s}": Path(f"f.{s}").read_bytes() for n, s in enumerate(("gif", "bmp", "png"))}
    shard_of("x.tar", files | {f"{n}.txt": b"a dog" for n in range(3)})
    splits = sources.read(Config(dataset="mine", source="shards", captions="x.tar", val_images=1))
    assert sorted(r.file_name for records in splits.values() for r in records) == [
        "x.tar/0.gif", "x.tar/1.bmp", "x.tar/2.png"
    ]  # fmt: skip


@pytest.mark.parametrize("content", [{"annotations": []}, {"annotations": None}, {}])
def test_test_images_without_annotations_are_prepared_with_their_ids(here, content, capsys):
    """COCO's image_info_test2017.json, found by {split}, stopped prepare.py."""
    names = [f"{i}.jpg" for i in range(7)]
    for split, some in (("train", names[:3]), ("val", names[3:5]), ("test", names[5:])):
        Path(f"{split}.json").write_text(coco(some, 40 + int(some[0][0])))
    test = json.loads(Path("test.json").read_text())
    Path("test.json").write_text(json.dumps({"images": test["images"], "info": {}} | content))
    options = dict(source="coco", captions="{split}.json")
    cfg = own(names, **options)
    prepare.main(cfg)
    opened = Split("data/mine", "test")
    assert ids_of("test") == [45, 46] and opened.references()[1] == [[], []]
    assert opened.embeddings.shape == (2, 1, 4) and len(opened.tokens) == 0
    assert opened.lengths.tolist() == opened.n_captions.tolist() == [0, 0]
    assert "test: 2 images, 0 captions, 0 tokens" in capsys.readouterr().out
    prepare.main(own(names[:5], **options))  # no embedding of a test image
    assert "left out split `test`: names.txt has none of its images" in capsys.readouterr().out
    assert list(Split("data/mine", "val").meta.splits) == ["train", "val"]
    os.replace("test.json", "val.json")
    with pytest.raises(UserError, match="none of the 2 images of split `val` has a caption"):
        prepare.main(cfg)


def test_an_image_without_captions_is_left_out_and_listed(here, capsys):
    """One among thousands stopped prepare.py."""
    names = [f"{i}.jpg" for i in range(200)]
    for split, some in (("train", names[:150]), ("val", names[150:])):
        content = json.loads(coco(some))
        if split == "train":
            del content["annotations"][7]
        Path(f"{split}.json").write_text(json.dumps(content))
    options = dict(source="coco", captions="{split}.json")
    prepare.main(own(names, **options))
    assert "left out 1 of 200 images, listed in data/mine/skipped.csv" in capsys.readouterr().out
    rows = Path("data/mine/skipped.csv").read_text().splitlines()
    assert rows[1:] == ["train,8,7.jpg,caption: missing"]
    opened, array = Split("data/mine", "train"), np.load("e.npy").astype(np.float16)
    kept = [i for i in range(150) if i != 7]
    assert ids_of("train") == [i + 1 for i in kept]
    assert (opened.embeddings[:, 0] == array[kept]).all()
    with pytest.raises(UserError, match="1 of 200 images cannot be used, more than max_bad=0.001"):
        prepare.main(own(names, **options, max_bad=0.001))
    images = [{"filename": n, "imgid": i, "split": "val" if i > 150 else "train",
               "sentences": [{"raw": "a dog", "sentid": i}] * (i != 3)}
              for i, n in enumerate(names)]  # fmt: skip
    Path("k.json").write_text(json.dumps({"images": images}))
    prepare.main(own(names, source="karpathy", captions="k.json"))
    assert ids_of("train")[:4] == [0, 1, 2, 4]


def test_hugging_faces_metadata_files(here, capsys):
    """Their keys file_name and text gave two problems a line, and no word on the keys wanted."""
    names = [f"{i}.jpg" for i in range(4)]
    lines = [{"file_name": n, "text": f"a dog {n}", "width": 3} for n in names]
    lines[3]["text"] = ["a cat", "cats"]  # several captions
    Path("metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [f"{n},a dog {n}" for n in names[:3]] + [f"{names[3]},a cat", f"{names[3]},cats"]
    Path("metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    expected = {n: [f"a dog {n}"] for n in names[:3]} | {names[3]: ["a cat", "cats"]}
    for source in ("jsonl", "csv"):
        prepare.main(own(names, source=source, captions=f"metadata.{source}", val_images=1))
        found = {}
        for split in ("train", "val"):
            images, captions = Split("data/mine", split).references()
            found |= dict(zip([i["file_name"] for i in images], captions, strict=True))
        assert found == expected
    Path("both.csv").write_text("image,caption,file_name,text\n0.jpg,ours,x,y\n1.jpg,ours,x,y\n")
    splits = sources.read(own(names, source="csv", captions="both.csv", val_images=1))
    assert [r.captions for records in splits.values() for r in records] == [["ours"]] * 2
    Path("x.jsonl").write_text('{"img": "0.jpg", "title": "a dog"}\n' * 9)
    listed, error = problems_of(capsys, source="jsonl", captions="x.jsonl")
    assert error == "x.jsonl:1: expected a header or keys with image,caption, got `img,title`"
    assert not listed


def test_only_ascii_spaces_are_joined(here):
    """U+3000, between Chinese or Japanese phrases, and no-break spaces became plain ones."""
    captions = ["一只狗\u3000在跑", "20\u00a0km \t  away ", "a\u2009b"]
    rows = [f"{i}.jpg,{c}" for i, c in enumerate(captions)]
    Path("x.csv").write_text("\n".join(["image,caption", *rows]))
    prepare.main(own(["0.jpg", "1.jpg", "2.jpg"], source="csv", captions="x.csv", val_images=1))
    kept = sum((Split("data/mine", s).references()[1] for s in ("train", "val")), [])
    assert {*sum(kept, [])} == {"一只狗\u3000在跑", "20\u00a0km away", "a\u2009b"}


# ---------------------------------------------------------------------------------------------
# Messages that say what to do


def test_shards_without_a_usable_caption_say_what_was_expected(here):
    """They ended in an internal error of sentencepiece."""
    photos(here, ["f.png"])
    data = Path("f.png").read_bytes()
    shard_of("a.tar", {f"{i}.{k}": data for i in range(6) for k in ("png", "caption")})
    match = (
        r"a.tar: none of the 6 images of split `train` has a caption that can be used; "
        r"a.tar/0.png: caption: missing \(expected KEY.txt or `caption` in KEY.json, found .cap"
    )
    with pytest.raises(UserError, match=match):
        prepare.main(Config(dataset="mine", source="shards", captions="a.tar", val_images=2))
    shard_of("a.tar", {"0.png": data, "0.txt": b" ", "1.png": data, "1.txt": b""})
    with pytest.raises(UserError, match="none of the 2 images .* a.tar/0.png: caption: empty"):
        prepare.main(Config(dataset="mine", source="shards", captions="a.tar", val_images=1))


def test_images_without_a_caption_are_left_out_and_named(here, capsys):
    """Tables and JSON say by an empty caption that there is none: one of them stopped the rest."""
    photos(here / "photos", ["f.png", "g.png", "h.png"])
    Path("x.csv").write_text("image,caption\nf.png,a dog\ng.png,\nh.png,\u200b\nh.png, a cat\n")
    Path("x.jsonl").write_text(
        '{"image": "f.png", "captions": [" ", "a dog"], "id": 1}\n'
        '{"image": "g.png", "caption": null, "id": 2}\n{"image": "h.png", "text": "a cat", "id": 3}'
    )
    names = ("f.png", "g.png", "h.png")
    for name, count in (("x.csv", 2), ("x.jsonl", 1)):
        cfg = Config(
            dataset="d", source=Path(name).suffix[1:], captions=name, images="photos", val_images=1
        )
        splits = sources.read(cfg)
        records = sorted(splits["train"] + splits["val"], key=lambda r: r.file_name)
        assert [r.captions for r in records] == [["a dog"], [], ["a cat"]]
        reasons = {"x.csv": "caption: empty", "x.jsonl": "caption: missing"}
        assert [r.bad for r in records] == ["", reasons[name], ""]
        assert [r.file_name for r in records] == list(names)
        assert f"left out, a caption (empty): {count}\n  {name}:" in capsys.readouterr().err
    own = {"image_id": 1, "id": 5, "caption": " "}, {"image_id": 1, "id": 6, "caption": "a dog"}
    images = [{"id": 1, "file_name": "f.png"}, {"id": 2, "file_name": "g.png"}]
    Path("x.json").write_text(json.dumps({"images": images, "annotations": own}))
    cfg = Config(dataset="d", source="coco", captions="x.json", images="photos", val_images=1)
    records = [r for records in sources.read(cfg).values() for r in records]
    (record,) = [r for r in records if r.captions]
    assert (record.captions, record.caption_ids) == (["a dog"], [6])


def test_tables_as_spreadsheets_write_them(here):
    """UTF-16, and spaces after commas; all other spaces stay as they were written."""
    photos(here / "photos", ["f.png", "g.png"])
    table = 'image, caption\nf.png, "a red, big ball"\ng.png, 一只狗\u3000\n'
    for encoding in ("utf-16", "utf-8-sig"):
        Path("x.csv").write_text(table, encoding)
        cfg = Config(dataset="d", source="csv", captions="x.csv", images="photos", val_images=1)
        captions = [r.captions[0] for records in sources.read(cfg).values() for r in records]
        assert sorted(captions) == ["a red, big ball", "一只狗\u3000"]
    Path("x.token").write_text("f.png#0\t\u3000一只狗\u00a0 \ng.png#0\ta cat\r\n", "utf-8")
    cfg = Config(dataset="d", source="flickr", captions="x.token", images="photos", val_images=1)
    captions = [r.captions[0] for records in sources.read(cfg).values() for r in records]
    assert sorted(captions) == ["a cat", "\u3000一只狗\u00a0"]


@pytest.mark.parametrize("bar", [";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_tables_with_semicolons_or_tabs(here, bar, encoding):
    """A spreadsheet's "CSV" has semicolons in half of Europe, and its "Unicode text" has tabs:
    "expected a header" was the answer, and what to change was not said."""
    Path("x.csv").write_text(f'image{bar}caption\n0.jpg{bar}"a; b, c"\n1.jpg{bar}a, b\n', encoding)
    cfg = own(["0.jpg", "1.jpg"], source="csv", captions="x.csv", val_images=1)
    captions = [r.captions for records in sources.read(cfg).values() for r in records]
    assert sorted(captions) == [["a, b"], ["a; b, c"]]


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps(["a dog's ball", 'a "big" caf\u00e9']),
        str(["a dog's ball", 'a "big" caf\u00e9']),
        str(np.array(["a dog's ball", 'a "big" caf\u00e9'])),
    ],
)
def test_a_list_of_captions_in_one_cell(here, cell):
    """As pandas, and Hugging Face's Flickr30k in its columns filename and raw, write an image's
    five captions: the whole list, with its brackets, was one caption, of each image."""
    rows = [["filename", "raw"], ["0.jpg", cell], ["1.jpg", "[not a list"]]
    with open("x.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    cfg = own(["0.jpg", "1.jpg"], source="csv", captions="x.csv", val_images=1)
    captions = [r.captions for records in sources.read(cfg).values() for r in records]
    assert sorted(captions) == [["[not a list"], ["a dog's ball", 'a "big" caf\u00e9']]


def test_names_that_begin_anew_in_each_split(here, capsys):
    """Hugging Face's train/1.jpg and val/1.jpg, both `1.jpg` in their metadata.jsonl: no list of
    names fitted. With folders, none was found; without, each occurred twice."""
    names = ["val/0.jpg", "train/0.jpg", "train/1.jpg"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        line = json.dumps({"file_name": Path(name).name, "text": f"a dog of {name}"})
        with open(Path(name).with_name("metadata.jsonl"), "a") as file:
            file.write(line + "\n")
    options = dict(source="jsonl", captions="{split}/metadata.jsonl")
    listed, _ = problems_of(capsys, **options)
    assert "image in two splits (if each has a folder, set --images=FOLDER/{split}): 1" in listed
    prepare.main(own(names, **options, images="{split}"))
    array = np.load("e.npy").astype(np.float16)
    np.testing.assert_array_equal(Split("data/mine", "val").embeddings[:, 0], array[:1])
    np.testing.assert_array_equal(Split("data/mine", "train").embeddings[:, 0], array[1:])


@pytest.mark.parametrize("captions", ["{split}.json", "train.json"])
def test_captions_that_the_dataset_would_replace_are_refused(here, captions):
    """Whoever kept their own COCO files in data/mine/ had them replaced by the dataset's, which
    bear the same names, without the licenses and all else that it does not need."""
    Path("data/mine").mkdir(parents=True)
    for split, names in (("train", ["0.jpg"]), ("val", ["1.jpg"])):
        Path(f"data/mine/{split}.json").write_text(coco(names))
    cfg = own(["0.jpg", "1.jpg"], source="coco", captions=f"./data/mine/{captions}")
    with pytest.raises(UserError, match=r"data/mine/train.json would be replaced: move it"):
        prepare.main(cfg)
    assert Path("data/mine/train.json").read_text() == coco(["0.jpg"])


def test_the_built_in_scenes_replace_no_other_dataset(here):
    """`prepare.py --dataset=mine` alone, to prepare again, rendered 11,000 scenes, and put them in
    the place of a dataset of photographs that had taken hours to encode."""
    Path("x.csv").write_text("image,caption\n0.jpg,a dog\n1.jpg,a dog\n")
    prepare.main(own(["0.jpg", "1.jpg"], source="csv", captions="x.csv", val_images=1))
    before = made()
    with pytest.raises(UserError, match="data/mine is of --source=csv: add that, or another"):
        prepare.main(Config(dataset="mine", shapes_train=9, shapes_eval=9))
    assert made() == before and not Path("data/mine/images").exists()


def test_captions_may_come_from_a_pipe(here):
    """As in `--captions=<(zcat captions.csv.gz)`: it can be read once."""
    photos(here / "photos", ["f.png", "g.png"])
    os.mkfifo("x.csv")
    table = "image,caption\nf.png,a dog\ng.png,a cat\n"
    threading.Thread(target=Path("x.csv").write_text, args=(table,), daemon=True).start()
    cfg = Config(dataset="d", source="csv", captions="x.csv", images="photos", val_images=1)
    captions = [r.captions for records in sources.read(cfg).values() for r in records]
    assert sorted(captions) == [["a cat"], ["a dog"]]


def test_karpathys_test_images_may_have_no_sentences(here):
    photos(here / "photos", ["f.png", "g.png", "h.png"])
    entries = [
        {"filename": "f.png", "split": "train", "imgid": 0, "sentences": [{"raw": "a dog"}]},
        {"filename": "g.png", "split": "val", "imgid": 1, "sentences": [{"raw": "a cat"}]},
        {"filename": "h.png", "split": "test", "imgid": 2},
    ]
    Path("x.json").write_text(json.dumps({"images": entries}))
    cfg = Config(dataset="d", source="karpathy", captions="x.json", images="photos")
    (record,) = sources.read(cfg)["test"]
    assert (record.captions, record.bad) == ([], "")


def test_an_image_of_a_tar_that_cannot_be_decoded_is_left_out(here, clip):
    """A single .heic among thousands: its caption had no image, and nothing was written."""
    photos(here, ["f.png"])
    data = (here / "f.png").read_bytes()
    members = {f"{i}.png": data for i in range(3)} | {f"{i}.txt": b"a dog" for i in range(4)}
    shard_of("a.tar", members | {"3.heic": b"\0\0\0 ftypheic"})
    prepare.main(Config(dataset="mine", source="shards", captions="a.tar", val_images=1, clip=clip,
                        workers=0, max_bad=0.5, vocab_size=50))  # fmt: skip
    assert "3.heic,no image in a known format" in Path("data/mine/skipped.csv").read_text()


def test_a_split_by_another_name_is_pointed_out(here):
    Path("training.csv").write_text("image,caption\n0.jpg,a dog\n")
    Path("val.csv").write_text("image,caption\n1.jpg,a dog\n")
    cfg = own(["0.jpg", "1.jpg"], source="csv", captions="{split}.csv")
    with pytest.raises(UserError, match="`train`, only in val: if it is training.csv, rename that"):
        prepare.main(cfg)
    Path("one.csv").write_text("image,caption,split\n0.jpg,a dog,training\n1.jpg,x,val\n")
    with pytest.raises(UserError, match="`train`, only in training, val: if it is training, re"):
        prepare.main(own(["0.jpg", "1.jpg"], source="csv", captions="one.csv"))
    with pytest.raises(UserError, match="no_{split}.csv: no images in split `train`: check --cap"):
        prepare.main(own(["0.jpg", "1.jpg"], source="csv", captions="no_{split}.csv"))
    Path("training.csv").unlink()
    Path("val.csv").unlink()


def test_a_val_split_by_another_name_is_pointed_out(here):
    for name in ("train", "validation"):
        Path(f"{name}.csv").write_text("image,caption\n0.jpg,a dog\n")
    cfg = own(["0.jpg"], source="csv", captions="{split}.csv")
    with pytest.raises(
        UserError, match="no images in split `val`, .*: if it is validation.csv, re"
    ):
        prepare.main(cfg)
    Path("one.csv").write_text("image,caption,split\n0.jpg,a dog,train\n1.jpg,x,validation\n")
    cfg = own(["0.jpg", "1.jpg"], source="csv", captions="one.csv")
    with pytest.raises(UserError, match="only in train, validation: if it is validation, rename"):
        prepare.main(cfg)


def test_absolute_names_are_explained_once(here, capsys):
    """Each of them was a line, "outside the images folder"."""
    photos(here / "photos", ["f.png", "g.png"])
    rows = [f"{here}/photos/{n}.png,a dog" for n in "fg"]
    Path("x.csv").write_text("\n".join(["image,caption", *rows]))
    options = dict(dataset="mine", source="csv", captions="x.csv", val_images=1)
    listed, error = problems_of(capsys, **options, images="elsewhere")
    assert f"names are relative to {here}/elsewhere/; --images=/ takes absolute ones" in listed
    assert len(listed.splitlines()) == 2 and "1 problem" in error
    for images in ("/", "photos"):
        splits = sources.read(Config(**options, images=images))
        assert {r.file_name for s in splits.values() for r in s} == {r.split(",")[0] for r in rows}
    Path("x.csv").write_text("\n".join(["image,caption,split", rows[0] + ",train", "f.png,x,val"]))
    assert "image in two splits" in problems_of(capsys, **options)[0]


# ---------------------------------------------------------------------------------------------
# Problems are listed, and nothing is written


def problems_of(capsys, **settings) -> tuple[str, str]:
    """Return what `sources.read` lists, and its error."""
    with pytest.raises(UserError) as error:
        sources.read(Config(**({"dataset": "mine", "images": "photos"} | settings)))
    return capsys.readouterr().err, str(error.value)


CSV = "image,caption\nf.png,fine\n"
BAD_CSV = {
    'f.png,"a\nb"\nf.png,"a\0b"\n': ["bad caption (a control character", "x.csv:5"],
    "f.png,\x1b[31mred\n": ["bad caption (a control character", "x.csv:3"],
    f"f.png,{'x' * 3000}\n": ["bad caption (more than 2000 characters)", "x.csv:3"],
    f"f.png,{'x' * 1_000_000}\nf.png,a\0\n": [
        "bad caption (more than 2000 characters): 1\n  x.csv:3",
        "x.csv:4",
    ],
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


def test_twenty_of_each_sort_are_listed_and_all_are_counted(here, capsys):
    photos(here / "photos", ["f.png"])
    rows = [f"none{i}.png,x" for i in range(50)] + ["f.png,\0"] * 30
    Path("x.csv").write_text("image,caption\n" + "\n".join(rows))
    listed, error = problems_of(capsys, source="csv", captions="x.csv")
    assert "no such image: 50" in listed and "and 30 more" in listed
    assert "bad caption (a control character, or not UTF-8): 30" in listed
    assert "and 10 more" in listed
    assert listed.count("x.csv:") == 40
    assert "x.csv: 80 problems" in error


def test_splits_and_ids(here, capsys):
    """What a split or an id should be was not said, and the ids 1 and "1" looked alike."""
    photos(here / "photos", ["f.png", "g.png"])
    lines = [
        {"image": "f.png", "caption": "x", "id": 1, "split": "train"},
        {"image": "f.png", "caption": "x", "id": "1", "split": "train"},
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
        "image with two ids (if they number captions, rename the column): 1\n  x.jsonl:2: f.png: "
        "1 and '1'",
        "image in two splits (if each has a folder, set --images=FOLDER/{split}): 2\n  x.jsonl:3",
        "id of two images: 1\n  x.jsonl:4",
        "bad split name (expected lower-case letters, digits, - or _): 1\n  x.jsonl:5: ../../x",
        "bad caption (not text): 1\n  x.jsonl:5",
        "bad file name (not text): 1\n  x.jsonl:6", "left out, a caption (missing): 1\n  x.jsonl:7",
        "bad id (expected a whole number or a text): 1\n  x.jsonl:7: 1.5",
        "not a JSON object: 2\n  x.jsonl:8", "  x.jsonl:9: {broken",
    ):  # fmt: skip
        assert expected in listed


def test_known_defects_of_flickrs_files_are_mended_and_named(here, capsys):
    """One line of Flickr30k's results.csv lacks a bar, for 2199200615.jpg, and Flickr8k's token
    file has captions of 2258277193_586949ec62.jpg.1, which is no image of it: both were refused."""
    photos(here / "photos", ["f.png", "g.png"])
    options = dict(dataset="mine", source="flickr", captions="x.csv", images="photos",
                   val_images=1)  # fmt: skip
    lines = ["image_name| comment_number| comment", "f.png| 0| A dog .", "f.png| 4   A cat .",
             "g.png| 0| A | bar ."]  # fmt: skip
    Path("x.csv").write_text("\n".join(lines))
    splits = sources.read(Config(**options))
    captions = {r.file_name: r.captions for records in splits.values() for r in records}
    assert captions == {"f.png": ["A dog .", "A cat ."], "g.png": ["A | bar ."]}
    listed = capsys.readouterr().err
    assert listed == "`|` put after a number: 1\n  x.csv:3: f.png| 4   A cat .\n"
    Path("x.csv").write_text("f.png#0\tA dog\nx.jpg.1#0\tA man\nx.jpg.1#1\tMen\ng.png#0\tA cat\n")
    splits = sources.read(Config(**options))
    assert {r.file_name for records in splits.values() for r in records} == {"f.png", "g.png"}
    listed = capsys.readouterr().err
    assert listed.startswith(
        "left out, of an image never published: 2\n  x.csv:2: x.jpg.1#0\\tA man"
    )
    Path("x.csv").write_text("\n".join([lines[0], "f.png| A dog .", "f.png| 4   A cat ."]))
    listed, error = problems_of(capsys, **options)
    assert "neither a tab nor the header's columns: 1\n  x.csv:2: f.png| A dog .\n" in listed
    assert error == "x.csv: 1 problem, listed above; nothing was written"


def test_coco_and_karpathy_entries_are_named(here, capsys):
    photos(here / "photos", ["f.png", "g.png"])
    image = {"id": 1, "file_name": "f.png"}
    content = {"images": [image, image, {"id": [], "file_name": "g.png"}, 5],
               "annotations": [{"image_id": 1, "id": 3, "caption": "x"}, {"caption": "x"},
                               {"image_id": 9, "id": 3, "caption": "x"}]}  # fmt: skip
    Path("x.json").write_text(json.dumps(content))
    listed, _ = problems_of(capsys, source="coco", captions="x.json")
    for expected in (
        "image listed twice: 1\n  x.json: images[1]",
        "bad id (expected a whole number or a text): 1\n  x.json: images[2]: []",
        "not a JSON object: 1\n  x.json: images[3]: 5",
        "caption of an image that is not listed: 2\n  x.json: annotations[1]: image_id None",
        "x.json: annotations[2]: image_id 9",
    ):  # fmt: skip
        assert expected in listed
    entry = {"filename": "f.png", "split": "train", "imgid": 0, "sentences": [{"raw": "x"}]}
    content = {"images": [entry, entry, {**entry, "sentences": 3}, {**entry, "filename": "../x"}]}
    Path("x.json").write_text(json.dumps(content))
    listed, _ = problems_of(capsys, source="karpathy", captions="x.json")
    for expected in ("image listed twice: 1\n  x.json: images[1]",
                     "`sentences` is not a list of objects: 1\n  x.json: images[2]",
                     "outside the images folder: 1\n  x.json: images[3]"):  # fmt: skip
        assert expected in listed
    for text in ("[]", '{"images": 3}', "{", "[" * 10_000, '"\xff"'):
        Path("x.json").write_bytes(text.encode("latin-1"))
        for source in ("coco", "karpathy"):
            assert "x.json" in problems_of(capsys, source=source, captions="x.json")[1]


def test_hostile_tars(here, capsys):
    """Nothing is unpacked; links, names that leave the tar, and truncated tars are listed."""
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
        add(tar, "5.txt", b"x")
        add(tar, "5.html", data)
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
        "captions without an image: 2\n  t/0.tar: member 4: 1.txt\n  t/0.tar: member 6: 5.txt, 5.h",
        "neither a plain file nor a folder: 1\n  t/0.tar: member 5: 2.png",
        "not a JSON object: 1\n  t/1.tar: member 1",
        "broken tar: 2\n  t/2.tar", "  t/3.tar",
    ):  # fmt: skip
        assert expected in listed
    assert {p for p in here.rglob("*")} == before


def shard_of(path: str, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return Path(path).read_bytes()


def test_no_sample_of_a_truncated_or_damaged_tar_is_lost_silently(here, capsys):
    """tarfile took a truncated or damaged header for the end, and ignored what follows the end."""
    whole = shard_of("s.tar", {f"{i}.{k}": b"x" * 600 for i in range(9) for k in ("png", "txt")})
    damaged, sixth = bytearray(whole), 5 * 2 * 1536
    damaged[sixth + 8] ^= 1
    for data in (damaged, whole[:sixth], whole[: sixth + 100], whole + whole):
        Path("s.tar").write_bytes(data)
        listed, _ = problems_of(capsys, source="shards", captions="s.tar")
        problem = "truncated or concatenated tar (download or write it again)"
        assert f"{problem}: 1\n  s.tar: no end mark at byte" in listed
    Path("s.tar").write_bytes(whole[: sixth + 512 + 100])  # within a text, which is read at once
    assert "broken tar: 1\n  s.tar: un" in problems_of(capsys, source="shards", captions="s.tar")[0]
    Path("s.tar").write_bytes(gzip.compress(whole))
    listed, _ = problems_of(capsys, source="shards", captions="s.tar")
    assert "broken tar: 1\n  s.tar: " in listed and "gunzip it first" in listed


def test_keys_of_a_tar_may_have_dots_and_folders(here, capsys):
    names = ("dog.v2", "x/0", "y/0", "./z")
    shard_of("s.tar", {f"{n}.{k}": n.encode() for n in names for k in ("PNG", "txt")})
    problems = sources.Problems()
    cfg = Config(dataset="d", source="shards", captions="s.tar")
    records = [record for _, record in sources.read_rows(cfg, problems)]
    assert [(record.id, record.captions) for record in records] == [
        ("dog.v2", ["dog.v2"]), ("x/0", ["x/0"]), ("y/0", ["y/0"]), ("z", ["./z"])
    ]  # fmt: skip
    with tarfile.open("s.tar", "a") as tar:
        add(tar, "x/0.txt", b"another")
    listed, _ = problems_of(capsys, source="shards", captions="s.tar")
    assert "two members of one key and type: 1\n  s.tar: member 8: x/0.txt" in listed


def test_one_file_with_two_names_is_one_image(here, capsys):
    """`./a.png` in val passed as another image than `a.png` in train; split folders do differ."""
    photos(here / "photos", ["a.png", "train/1.png", "val/1.png"])
    Path("x.csv").write_text("image,caption,split\na.png,x,train\n./a.png,x,val\n")
    listed, _ = problems_of(capsys, source="csv", captions="x.csv")
    assert "image in two splits (if each has a folder, set --images=FOLDER/{split}): 1" in listed
    assert "\n  x.csv:3: ./a.png" in listed
    Path("x.csv").write_text("image,caption,split\n1.png,x,train\n1.png,y,val\n")
    cfg = Config(dataset="d", source="csv", captions="x.csv", images="photos/{split}")
    assert {s: r[0].captions for s, r in sources.read(cfg).items()} == {
        "train": ["x"], "val": ["y"]
    }  # fmt: skip


def test_a_column_that_is_not_read_may_be_of_any_length(here):
    """By default, Python's csv module refuses a cell of more than 131,072 characters."""
    Path("x.csv").write_text(f"image,caption,html\na.png,x,{'y' * 200_000}\nb.png,z,\n")
    splits = sources.read(own(["a.png", "b.png"], source="csv", captions="x.csv", val_images=1))
    assert [len(splits[split]) for split in ("train", "val")] == [1, 1]


def test_columns_that_are_not_read_may_be_there_twice(here):
    """A CSV with both `caption` and `captions`, or with a repeated column that is ignored, was
    refused. `caption` is the documented one."""
    names = [f"{i}.jpg" for i in range(4)]
    for header, row in (
        ("image,caption,captions", "{},a dog,\"['a dog', 'dogs']\""),
        ("image,captions,caption", "{},other,a dog"),
        ("image,caption,text,text,file_name,file_name", "{},a dog,x,y,z,z"),
        ("image,caption,url,url", "{},a dog,x,y"), ("image,captions", "{},a dog"),
    ):  # fmt: skip
        Path("x.csv").write_text("\n".join([header, *map(row.format, names)]))
        splits = sources.read(own(names, source="csv", captions="x.csv", val_images=1))
        found = {r.file_name: r.captions for records in splits.values() for r in records}
        assert found == {name: ["a dog"] for name in names}, header


def test_nothing_is_dropped_if_columns_repeat_or_ids_are_partial(here, capsys):
    photos(here / "photos", ["a.png", "b.png"])
    Path("x.csv").write_text("image,caption,caption\na.png,one,two\n")
    _, error = problems_of(capsys, source="csv", captions="x.csv")
    assert error == "x.csv:1: caption is there twice: rename one"
    Path("x.jsonl").write_text('{"image": "a.png", "caption": "one", "captions": ["two"]}')
    _, error = problems_of(capsys, source="jsonl", captions="x.jsonl")
    assert error == "x.jsonl:1: caption and captions are both there: rename one"
    Path("x.jsonl").write_text('{"image": "a.png", "caption": "one"}\n{}\n')
    _, error = problems_of(capsys, source="jsonl", captions="x.jsonl")
    assert error.startswith("x.jsonl:2: expected a header or keys with image,caption")
    sentences = {"a": {"raw": "x"}, "b": {"raw": "y", "sentid": 0}}
    images = [{"filename": f"{n}.png", "split": "train", "imgid": n, "sentences": [sentence]}
              for n, sentence in sentences.items()]  # fmt: skip
    Path("k.json").write_text(json.dumps({"images": images}))
    listed, _ = problems_of(capsys, source="karpathy", captions="k.json")
    assert "ids of captions in split train for some images only: 1\n  k.json: images[1]" in listed


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
        expected.setdefault(name, []).append(sources.SPACES.sub(" ", caption).strip(" "))
    usable = not any(sources.text_problem(c) for captions in expected.values() for c in captions)
    for source in ("csv", "jsonl"):
        cfg = Config(
            dataset="d", source=source, captions=f"{folder}/x.{source}", images=str(folder)
        )
        problems = sources.Problems()
        splits = sources.Gathering(cfg, problems).splits
        assert bool(problems.lines) != usable
        if usable:
            assert {r.file_name: r.captions for r in splits["train"]} == expected


@given(st.binary(max_size=300), st.sampled_from(["csv", "jsonl", "flickr", "coco", "karpathy"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused_in_one_line(folder, data, source):
    head = b"image,caption\nf.png,x\n" if source == "csv" else b""
    (folder / "x.any").write_bytes(head + data)
    cfg = Config(dataset="d", source=source, captions=f"{folder}/x.any", images=str(folder))
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
        cfg = Config(dataset="d", source=source, captions=f"{folder}/{name}", images=str(folder))
        with pytest.raises(UserError):  # there is never a val split
            sources.read(cfg)


def test_an_earlier_dataset_stays_until_the_source_is_good(here, clip):
    every_photo(here / "photos")
    options = dict(dataset="mine", source="csv", clip=clip, workers=0) | as_csv(here)
    prepare.main(Config(**options))
    before = made()
    with open("val.csv", "a") as file:
        print("f.png,\0,", file=file)
    with pytest.raises(UserError, match="1 problem"):
        prepare.main(Config(**options))
    assert made() == before


def test_unusable_captions_of_shards_are_left_out_and_listed(here, clip):
    """img2dataset writes what it finds on the web; nobody can repair a line within a tar."""
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
    options = dict(dataset="mine", source="shards", captions="shards/{split}.tar", clip=clip,
                encode_batch=2, workers=0)  # fmt: skip
    with pytest.raises(UserError, match=r"at least 4 of 7 images cannot be used"):
        prepare.main(Config(**options))
    prepare.main(Config(**options, max_bad=0.8))
    with open("data/mine/skipped.csv", newline="") as file:
        rows = [(row["id"], row["reason"]) for row in csv.DictReader(file)]
    assert rows == [
        ("0001", "caption: empty"),
        ("0002", f"no image in a known format ({' '.join(encoder.FORMATS)})"),
        ("0003", "caption: more than 2000 characters"), ("0004", "caption: missing"),
        ("0005", "caption: a control character, or not UTF-8"),
    ]  # fmt: skip
    opened = Split("data/mine", "train")
    images, kept = opened.references()
    assert [i["id"] for i in images] == ["0000"] and kept == [["a dog"]]
    x = Encoder(clip)([read_image(here / "photos/c.png")])
    torch.testing.assert_close(x, torch.tensor(opened.embeddings), atol=2e-3, rtol=2e-3)
