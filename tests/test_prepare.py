"""From images or embeddings to a dataset directory: bad images, kills, processes, full disks."""

import csv
import errno
import json
import os
import pickle
import random
import shutil
import socket
import time
from dataclasses import replace
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
    picture,
    stacks,
    start,
    wait,
)

import prepare
from configurator import Config, ConfigError, configure
from data import Meta, Split
from parts.common import UserError, owning
from parts.encoder import Encoder, read_image


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------
# The user's own embeddings


def test_own_embeddings_and_their_mistakes(here, capsys):
    source = many(here, 5, 2)
    options = source | dict(images="", embeddings="e.npy", embedding_names="names.txt")
    names = [f"train{i}.png" for i in range(5)] + ["val0.png", "val1.png"]
    array = np.random.default_rng(0).standard_normal((7, 3, 5), np.float32)
    np.save("e.npy", array[::-1])
    Path("names.txt").write_text("\n".join(names[::-1]) + "\n", encoding="utf-8")
    prepare.main(Config(**options))
    for split, rows, expected in (("train", array[:5], names[:5]), ("val", array[5:], names[5:])):
        opened = Split("data/mine", split)
        assert (opened.embeddings == rows.astype(np.float16)).all()
        assert [i["file_name"] for i in opened.references()[0]] == expected
    meta = opened.meta
    assert (meta.features, meta.n_positions, meta.embedding_dim) == ("grid", 3, 5)
    before = made()

    Path("names.txt").write_text("\n".join(names[:6]), encoding="utf-8")
    with pytest.raises(UserError, match=r"e.npy has shape \(7, 3, 5\), names.txt has 6 names"):
        prepare.main(Config(**options))
    Path("names.txt").write_text("\n".join([*names[:6], names[0]]), encoding="utf-8")
    with pytest.raises(UserError, match="1 names occur twice: write them with folders"):
        prepare.main(Config(**options))
    Path("names.txt").write_text("\n".join([*names[:6], "other.png"]), encoding="utf-8")
    with pytest.raises(UserError, match="e.npy: 1 problem"):
        prepare.main(Config(**options))
    listed = "images without a row in names.txt (the first of its names is train0.png): 1"
    assert f"{listed}\n  val: val1.png" in capsys.readouterr().err
    Path("names.txt").write_text("\n".join(names[:5] + ["x", "y"]), encoding="utf-8")
    Path("val.csv").write_text("image,caption\nsub/train2.png,x\nother/train2.png,y\n")
    with pytest.raises(UserError, match="e.npy: 2 problem"):
        prepare.main(Config(**options))
    assert (
        "two images share a row (make the names unique): 2\n  val: train2.png and sub/train2.png"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="embedding_names: expected a file with a name for each"):
        Config(**options | {"embedding_names": ""})
    many(here, 5, 2)
    Path("names.txt").write_text("\n".join(names), encoding="utf-8")
    np.save("e.npy", array * 1e9)
    with pytest.raises(UserError, match="not finite in half precision, first for train0.png"):
        prepare.main(Config(**options))
    for bad in (b"", b"\x93NUMPY garbage", b"PK\3\4"):
        Path("e.npy").write_bytes(bad)
        with pytest.raises(UserError, match="e.npy: not a .npy array"):
            prepare.main(Config(**options))
    np.save("e.npy", np.array([{}] * 7), allow_pickle=True)
    with pytest.raises(UserError, match="e.npy: not a .npy array"):
        prepare.main(Config(**options))
    np.savez("e.npz", array)
    os.replace("e.npz", "e.npy")
    with pytest.raises(UserError, match="e.npy: not a .npy array"):
        prepare.main(Config(**options))
    assert made() == before


def test_rows_of_zeros_are_bad_images(here, capsys):
    """ClipCap's scripts write zeros for a broken image; they were trained on without a word."""
    source = many(here, 5, 3)
    options = source | dict(images="", embeddings="e.npy", embedding_names="names.txt")
    names = [f"train{i}.png" for i in range(5)] + [f"val{i}.png" for i in range(3)]
    array = np.random.default_rng(0).standard_normal((8, 5), np.float32)
    array[[3, 5]] = 0
    array[6] *= 1e-12  # zeros in half precision
    np.save("e.npy", array)
    Path("names.txt").write_text("\n".join(names))
    with pytest.raises(UserError, match="3 of 8 images cannot be used, more than max_bad=0.01"):
        prepare.main(Config(**options))
    prepare.main(Config(**options, max_bad=0.5))
    assert "left out 3 of 8 images, listed in data/mine/skipped.csv" in capsys.readouterr().out
    assert Path("data/mine/skipped.csv").read_text().splitlines()[1:] == [
        "train,3,train3.png,embedding of zeros",
        "val,5,val0.png,embedding of zeros", "val,6,val1.png,embedding of zeros",
    ]  # fmt: skip
    for split, rows in (("train", [0, 1, 2, 4]), ("val", [7])):
        opened = Split("data/mine", split)
        assert [i["file_name"] for i in opened.references()[0]] == [names[i] for i in rows]
        assert (opened.embeddings[:, 0] == array[rows].astype(np.float16)).all()


@pytest.mark.parametrize("kind", ["pt", "npz", "pkl", "npy"])
def test_arrays_of_other_formats_say_how_to_make_one_of_ours(here, kind):
    options = many(here, 3) | dict(images="", embeddings=f"e.{kind}", embedding_names="train.csv")
    if kind == "pt":
        torch.save(torch.zeros(3, 2), "e.pt")
    elif kind == "npz":
        np.savez("e.npz", x=np.zeros((3, 2)))
    elif kind == "pkl":
        Path("e.pkl").write_bytes(pickle.dumps([np.zeros(2)] * 3))
    else:
        np.save("e.npy", np.array([{}, [], None], dtype=object))
    with pytest.raises(UserError, match=rf"e.{kind}: not a .npy array: write one by np.save\("):
        prepare.main(Config(**options))


# ---------------------------------------------------------------------------------------------
# Bad images


def test_bad_images_are_left_out_and_listed_and_the_rest_stays_aligned(here, clip, capsys):
    options = many(here, 30) | {"clip": clip, "encode_batch": 4, "workers": 0}
    bad = {"train0.png": b"", "train5.png": b"text", "train6.png": b"", "val3.png": b"GIF89a",
           "train29.png": b"\x89PNG\r\n"}  # fmt: skip
    for i in range(8, 12):  # a whole batch
        bad[f"train{i}.png"] = b""
    for name, data in bad.items():
        (here / "photos" / name).write_bytes(data)
    with pytest.raises(UserError, match="of 34 images cannot be used, more than max_bad=0.01"):
        prepare.main(Config(**options))
    assert not Path("data/mine/meta.json").exists()
    prepare.main(Config(**options, max_bad=0.3))
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
    for name in bad:  # once they are repaired, the list goes
        picture(9, 9).save(here / "photos" / name)
    prepare.main(Config(**options))
    assert not Path("data/mine/skipped.csv").exists()


def test_a_spreadsheet_runs_nothing_of_skipped_csv(here, clip):
    options = many(here, 5) | {"clip": clip, "workers": 0}
    (here / "photos" / "=cmd|x").write_bytes(b"")
    with open("train.csv", "a") as file:
        print("\n=cmd|x,y", file=file)
    prepare.main(Config(**options, max_bad=0.5))
    assert Path("data/mine/skipped.csv").read_text().splitlines()[1] == "train,5,'=cmd|x,empty file"


def test_a_split_of_bad_images_only(here, clip):
    options = many(here, 9, 1) | {"clip": clip, "workers": 0, "max_bad": 0.5}
    (here / "photos" / "val0.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images of split `val` can be used"):
        prepare.main(Config(**options))


# ---------------------------------------------------------------------------------------------
# Interrupted, sharded, changed


EVERY_BATCH = """
import sys, numpy as np, torch, prepare
from configurator import Config, configure
from parts.common import run

class Thumbnails(prepare.clip.Encoder):  # in the place of CLIP, whose import takes seconds
    def __init__(self, *args):
        self.n_positions, self.embedding_dim, self.kind = 1, 24, "clip"
        self.device = torch.device("cpu")

    def digest(self):
        return "thumbnails"

    def pixels(self, images):
        return torch.from_numpy(np.stack([image.resize((4, 2)) for image in images]))

    def encode(self, pixels):
        return pixels.reshape(len(pixels), 1, 24).half()

prepare.clip.Encoder = Thumbnails
prepare.SYNC = 0.0  # every batch is safe at once
run(prepare.main, configure(Config, sys.argv[1:]))
"""


def begin(folder: Path, options: dict, rank: int = 0, world: int = 1, port: int = 0):
    """Start prepare.py in a process of its own, for several ranks as torchrun would."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if world > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    args = [f"--{k}={v}" for k, v in options.items()]
    return start("-c", EVERY_BATCH, *args, cwd=folder, env=env)


def wait_for_batches(folder: Path, n: int, process) -> None:
    """Wait until n batches are noted as done."""
    deadline = time.monotonic() + PATIENCE
    while lines_done(folder) < n and process.poll() is None:
        assert time.monotonic() < deadline, f"no {n} batches:\n{stacks(process)}"
        time.sleep(0.001)


def lines_done(folder: Path) -> int:
    """Return how many batches are noted as done, as a torn last line is not."""
    batches = set()
    for path in (folder / "data/mine/encoding").glob("rank*.jsonl"):
        for line in filter(str.strip, path.read_text().split("\n")[:-1]):
            try:
                batches.add(tuple(json.loads(line)[:2]))
            except ValueError:
                continue
    return len(batches)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A source of 300 photos, three of them bad, and the dataset that one run makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    options = many(folder, 260, 40) | {"encode_batch": 2, "workers": 1, "max_bad": 0.5}
    for name in ("train0.png", "train77.png", "val39.png"):
        (folder / "photos" / name).write_bytes(b"")
    finish(begin(folder, options))
    return folder, options, made(folder / "data/mine")


def copied(undisturbed, tmp_path) -> tuple[Path, dict, dict]:
    folder, options, expected = undisturbed
    for name in ("photos", "train.csv", "val.csv"):
        os.symlink(folder / name, tmp_path / name)
    return tmp_path, options, expected


def test_ten_kills_change_nothing(undisturbed, tmp_path):
    folder, options, expected = copied(undisturbed, tmp_path)
    rng, before = random.Random(0), 0
    for _ in range(10):
        process = begin(folder, options)
        target = before + rng.randint(1, 6)
        wait_for_batches(folder, target, process)
        time.sleep(rng.random() * 0.01)
        process.kill()
        assert "Error" not in "".join(wait(process))
        assert process.returncode == -9, "it ended before it was killed"
        assert not (folder / "data/mine/meta.json").exists()
        assert lines_done(folder) >= target  # each run resumed the one before
        before = lines_done(folder)
    finish(begin(folder, options))
    assert made(folder / "data/mine") == expected


def test_two_processes_and_a_kill_change_nothing(undisturbed, tmp_path):
    folder, options, expected = copied(undisturbed, tmp_path)
    for killed in (True, False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ranks = [begin(folder, options, rank, 2, port) for rank in range(2)]
        if killed:
            wait_for_batches(folder, 10, ranks[0])
            for process in ranks:
                process.kill()
        outputs = [wait(process) for process in ranks]
        assert killed or [process.returncode for process in ranks] == [0, 0], outputs
    assert len(list((folder / "data/mine").glob("*"))) == len(expected)
    assert made(folder / "data/mine") == expected


SPLITS = ("train", "val")


class Stop(Exception):
    pass


@pytest.fixture
def half_done(here, clip, monkeypatch):
    """Stop a run after three batches. Return its settings and a list of the encoded batches."""
    options = many(here, 20) | {"clip": clip, "encode_batch": 4, "workers": 0}
    encoded = []

    def encode(self, pixels, real=Encoder.encode):
        encoded.append(len(pixels))
        if len(encoded) == 4:
            raise Stop
        return real(self, pixels)

    monkeypatch.setattr(prepare, "SYNC", 0.0)
    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(Stop):
        prepare.main(Config(**options))
    encoded += [0] * 9  # Stop no more
    del encoded[4:]
    return options, encoded


def rerun(options: dict, encoded: list) -> int:
    """Return how many batches a rerun encodes, not counting the check of each split's last row."""
    encoded.extend([0] * 5)
    before = len(encoded)
    prepare.main(Config(**options))
    return len(encoded) - before - 2


def test_a_rerun_encodes_only_what_is_missing(half_done):
    options, encoded = half_done
    assert rerun(options, encoded) == 4  # of 6 batches, two were noted


def test_a_rerun_with_other_settings_or_images_starts_over(half_done, here, capsys):
    options, encoded = half_done
    shutil.copytree(here / "data", here / "kept")
    changes = [{"encode_batch": 5}, {"features": "grid"}, {"features": "grid", "grid": 2}]
    for change in changes:
        batches = 5 if "encode_batch" in change else 6
        shutil.rmtree(here / "data")
        shutil.copytree(here / "kept", here / "data")
        assert rerun(options | change, encoded) == batches
        assert "starting over" in capsys.readouterr().out
    shutil.rmtree(here / "data")
    shutil.copytree(here / "kept", here / "data")
    picture(20, 30, 99).save(here / "photos" / "train0.png")  # another image by the same name
    assert rerun(options, encoded) == 6
    x = Encoder(options["clip"])([read_image(here / "photos" / "train0.png")])
    y = torch.tensor(Split("data/mine", "train").embeddings[:1])
    torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=2e-3)


@pytest.fixture
def finished(half_done, here):
    """A dataset made without an interruption but of the first run, with one bad image."""
    options, encoded = half_done
    (here / "photos" / "train3.png").write_bytes(b"")
    options = options | {"max_bad": 0.5}
    assert rerun(options, encoded) == 6
    return options, encoded


def test_a_finished_encoding_is_used_again(finished, capsys):
    """Running prepare.py again, or with another vocabulary, encoded every image again."""
    options, encoded = finished
    before = made()
    assert rerun(options, encoded) == 0 and made() == before
    assert "the images are encoded already" in capsys.readouterr().out
    text = Path("train.csv").read_text().replace("photo", "PICTURE")
    Path("train.csv").write_text(text)
    for change in ({"vocab_size": 30}, {"lowercase": True}):
        assert rerun(options | change, encoded) == 0
        after = made()
        assert all(after[f"{s}_embeddings.npy"] == before[f"{s}_embeddings.npy"] for s in SPLITS)
        assert after["skipped.csv"] == before["skipped.csv"]
        opened = Split("data/mine", "train")
        assert len(opened.references()[1]) == 19 and opened.references()[1][3] == ["PICTURE train4"]
        assert opened.meta.lowercase == bool(change.get("lowercase"))
    with pytest.raises(UserError, match="1 of 24 images cannot be used"):
        rerun(options | {"max_bad": 0.0}, encoded)


@pytest.mark.parametrize("how", ["absolute", "moved"])
def test_the_same_photos_in_a_folder_of_another_name_are_not_encoded_again(finished, here, how):
    """`--images=photos`, then the same with its full path: hours of encoding began anew. So did
    they after the photos had been moved to another disk."""
    options, encoded = finished
    folder = here / "photos"
    if how == "moved":
        folder = folder.rename(here / "elsewhere")
    assert rerun(options | {"images": str(folder)}, encoded) == 0


def test_other_settings_or_images_are_encoded_anew(finished, here):
    options, encoded = finished
    assert rerun(options | {"features": "grid"}, encoded) == 6
    assert rerun(options, encoded) == 6
    before = made()
    picture(20, 30, 99).save(here / "photos" / "train0.png")
    assert rerun(options, encoded) == 6
    assert made()["train_embeddings.npy"] != before["train_embeddings.npy"]
    with open("data/mine/val_embeddings.npy", "rb+") as file:  # not what was encoded
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")
    assert rerun(options, encoded) == 6
    assert made()["val_embeddings.npy"] == before["val_embeddings.npy"]


@pytest.mark.parametrize("change", [{"vocab_size": 30}, {"features": "grid"}])
def test_a_kill_at_any_file_leaves_the_old_dataset_or_a_resumable_one(
    finished, monkeypatch, change
):
    options, encoded = finished
    shutil.copytree("data", "old")
    rerun(options | change, encoded)
    expected, real = made(), os.replace
    for step in range(99):
        shutil.rmtree("data")
        shutil.copytree("old", "data")
        calls = []

        def replace(a, b, calls=calls, step=step):
            calls.append(b)
            if len(calls) > step:
                raise Stop
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                rerun(options | change, encoded)
            except Stop:
                pass
            else:
                break  # there are no more files
        if Path("data/mine/meta.json").exists():
            assert Split("data/mine", "train").meta == Meta.read(Path("old/mine"))
        again = rerun(options | change, encoded)
        assert again == 0 or "features" in change and len(calls) <= 6
        assert made() == expected
    assert step > 15


def test_the_built_in_scenes_are_encoded_once(here, clip, monkeypatch):
    """Each run wrote their images anew, so that nothing was resumed or used again."""
    options = dict(dataset="mine", shapes_train=3, shapes_eval=2, clip=clip, workers=0)
    prepare.main(Config(**options))
    monkeypatch.setattr(prepare, "encode_missing", None)
    prepare.main(Config(**options, vocab_size=60))
    assert Split("data/mine", "novel").meta.vocab_size == 60


@pytest.mark.parametrize("bad", [False, True])
def test_a_run_stopped_at_the_very_end_encodes_nothing_again(half_done, here, monkeypatch, bad):
    options, encoded = half_done
    options = options | {"max_bad": 0.5}
    if bad:
        (here / "photos" / "train3.png").write_bytes(b"")

    def cut(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Meta, "write", cut)
        with pytest.raises(Stop):
            rerun(options, encoded)
    assert rerun(options, encoded) == 0
    x = Encoder(options["clip"])([read_image(here / "photos" / "train19.png")])
    y = torch.tensor(Split("data/mine", "train").embeddings[-1:])
    torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=2e-3)


def test_a_full_disk_leaves_the_earlier_dataset_intact(here, clip, monkeypatch):
    """meta.json was deleted before it turned out that the disk had no room."""
    options = many(here, 8) | {"clip": clip, "workers": 0}
    prepare.main(Config(**options))
    before = made()
    (here / "train.csv").write_text((here / "train.csv").read_text().replace("photo", "picture"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data.np.save", full)
        with pytest.raises(OSError, match="No space left on device: '.*train_tokens.npy'"):
            prepare.main(Config(**options))
    assert made() == before
    prepare.main(Config(**options))
    assert "picture" in Path("data/mine/train.json").read_text()


def test_a_vocabulary_too_small_is_refused_before_anything_is_encoded(here, clip, monkeypatch):
    options = many(here, 8) | {"clip": clip, "workers": 0}
    monkeypatch.setattr(prepare, "encode", None)
    with pytest.raises(UserError, match="vocab_size=9: too few for .*: set at least [0-9]+"):
        prepare.main(Config(**options, vocab_size=9))


def test_a_second_prepare_of_the_same_dataset_is_refused(here, clip):
    options = many(here, 8) | {"clip": clip, "workers": 0}
    with owning(Path("data/mine/lock"), "prepare.py is writing data/mine/"):
        said = one_line(start("prepare.py", *(f"--{k}={v}" for k, v in options.items())))
        assert os.listdir("data/mine") == ["lock"]
    assert said == "another prepare.py is writing data/mine/: wait until it ends\n"
    prepare.main(Config(**options))
    assert not Path("data/mine/lock").exists()


def test_the_shipped_config_works_in_any_folder(here):
    """It found its CLIP in the repository's own folder only, and left an empty data/ elsewhere."""
    few = ["--shapes_train=8", "--shapes_eval=4", "--data=sets/a", "--workers=0"]
    cfg = configure(Config, ["config/shapes.py", *few])
    with pytest.raises(UserError, match="clip=assets/none: no such folder"):
        prepare.main(replace(cfg, clip="assets/none"))
    assert not Path("sets").exists()  # it had rendered every scene before
    prepare.main(cfg)
    meta = Split("sets/a", "train").meta
    assert (meta.dataset, meta.encoder) == ("shapes", "assets/shapes-clip")
    assert not Path("data").exists()


def test_built_in_scenes_do_not_replace_the_users_files(here):
    """Without --source, the built-in scenes took the place of the user's dataset."""
    with pytest.raises(UserError, match="source=shapes renders .* takes no captions: add --source"):
        prepare.main(Config(dataset="mine", captions="x.csv", shapes_train=9, shapes_eval=9))
    assert not Path("data").exists()
