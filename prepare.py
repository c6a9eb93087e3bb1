"""Make a dataset directory from images (or embeddings) and captions.

    python prepare.py config/shapes.py
    python prepare.py config/coco.py                       # downloads what is missing, after asking
    python prepare.py config/flickr8k.py --captions=dataset_flickr8k.json --images=Images
    python prepare.py config/flickr8k.py --captions=dataset_flickr8k.json \\
        --embeddings=embeddings.npy --embedding_names=filenames.txt
    python prepare.py --dataset=mine --source=csv --captions=captions_{split}.csv --images=photos
    torchrun --nproc_per_node=8 prepare.py config/coco.py  # several machines need a shared data/

Four phases: read and check the source, train the tokenizer on the training captions, encode each
image once, and write `data/<dataset>/`. Its meta.json comes last, and an earlier dataset there
stays whole until then. If it is interrupted, the same command resumes and produces identical
files; on a finished dataset, it encodes nothing again. Images that cannot be read or have no
caption, and in tar shards captions that cannot be used, are left out and listed in
`data/<dataset>/skipped.csv`; prepare.py stops if they are more than `max_bad` of all.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from configurator import Config, configure
from data import Meta, Tokenizer, write_split
from parts import encoder as clip
from parts import sources
from parts.common import UserError, fingerprint, naming, read_json, replacing, run, sync, write_text
from parts.device import Device
from parts.gpt2 import read_tokenizer
from parts.sources import Record

SYNC = 5.0  # seconds between fsyncs
Splits = dict[str, list[Record]]


def main(cfg: Config) -> None:
    device = Device(cfg.device, "float32")
    with device.owning(cfg.data_dir / "lock", f"prepare.py is writing {cfg.data_dir}/"):
        if not cfg.embeddings:  # a missing one is found before hours of downloading
            encoder = clip.Encoder(cfg.clip, cfg.features, cfg.grid, device.torch_device)
        splits, tokenizer = device.on_first(lambda: gather_inputs(cfg))
        if not cfg.embeddings:
            files, encoder_fields, encoding = encode(splits, encoder, cfg, device)
        elif device.is_first:
            files, encoder_fields, encoding = copy_embeddings(splits, cfg)
        if device.is_first:
            finish(splits, files, tokenizer, cfg, encoder_fields, encoding)
    device.close()


# ---------------------------------------------------------------------------------------------
# 1. Read, 2. tokenizer: both before hours of encoding, because they may refuse


def gather_inputs(cfg: Config) -> tuple[Splits, Tokenizer]:
    """Download what is missing; return the records of each split and the tokenizer."""
    tokenizer = None
    if cfg.tokenizer:
        path = Path(cfg.tokenizer)
        if path.is_file() or path.suffix == ".model":
            model = path.read_bytes()
        else:
            model = read_tokenizer(cfg.tokenizer)
        tokenizer = Tokenizer(model, cfg.lowercase, cfg.tokenizer)
    sources.fetch(cfg)
    splits = sources.read(cfg, tokenizer)
    if not tokenizer:
        captions = [c for record in splits["train"] if not record.bad for c in record.captions]
        tokenizer = train_tokenizer(captions, cfg.vocab_size, cfg.lowercase)
    return splits, tokenizer


def train_tokenizer(captions: list[str], vocab_size: int, lowercase: bool = False) -> Tokenizer:
    """Train a sentencepiece BPE of at most `vocab_size` pieces; small texts have fewer.

    It keeps every character as the user wrote it. Raise UserError if the captions have more
    characters than `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(c.lower() if lowercase else c for c in captions),
            model_writer=model, model_type="bpe", vocab_size=vocab_size, character_coverage=1.0,
            normalization_rule_name="identity", pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            max_sentence_length=1 << 20, minloglevel=2, num_threads=1,
        )  # fmt: skip
    except RuntimeError as error:
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        most = re.search(r"value <= (\d+)", str(error))
        if least:
            raise UserError(
                f"vocab_size={vocab_size}: the captions have too many characters for it, "
                f"at least {least[1]} is needed"
            ) from None
        if not most:
            raise UserError(f"vocab_size={vocab_size}: {str(error).strip()}") from None
        print(f"the captions have only {most[1]} pieces: vocab_size {vocab_size} -> {most[1]}")
        return train_tokenizer(captions, int(most[1]), lowercase)
    return Tokenizer(model.getvalue(), lowercase)


# ---------------------------------------------------------------------------------------------
# 3. Encode: rows go to data/<dataset>/encoding/<split>.npy, which `finish` moves into place


class EmbeddingFile:
    """A split's embeddings while they are made: <folder>/<split>.npy, (images, P, D) float16.

    Rows are written with `seek` and `write`: on a full disk, writing through a memmap is a SIGBUS.
    After they are safe on the disk, <folder>/rank<rank>.jsonl records which batches are done, so
    that the next run resumes after a kill.
    """

    def __init__(self, folder: Path, split: str, rank: int = 0):
        self.folder = folder
        self.split = split
        self.path = folder / f"{split}.npy"
        self.log = folder / f"rank{rank}.jsonl"
        rows = self.rows()
        self.shape = rows.shape
        self.begin = rows.offset
        self.unlogged: list[str] = []

    @classmethod
    def create(cls, folder: Path, split: str, shape: tuple) -> "EmbeddingFile":
        """Write a file of zeros."""
        path = folder / f"{split}.npy"
        with naming(path):
            np.lib.format.open_memmap(path, "w+", np.float16, shape)
        return cls(folder, split)

    def rows(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def write(self, row: int, block: np.ndarray) -> None:
        """Write a block of rows, of which `row` is the first."""
        with naming(self.path), open(self.path, "rb+") as file:
            file.seek(self.begin + row * block[0].nbytes)
            file.write(block.tobytes())

    def copy(self, array: np.ndarray, rows: list[int]) -> np.ndarray:
        """Write these rows of an array, which may exceed memory. Return the largest absolute value
        of each in half precision, infinite or NaN if it does not fit."""
        largest = np.empty(len(rows), np.float16)
        for i in range(0, len(rows), 4096):
            with np.errstate(over="ignore"):
                block = array[rows[i : i + 4096]].astype(np.float16)
            largest[i : i + 4096] = np.abs(block).max((1, 2))
            self.write(i, block)
        self.sync()
        return largest

    def sync(self) -> None:
        """Make what was written safe: rows first, then the record that they exist."""
        with naming(self.path), open(self.path, "rb+") as file:
            sync(file)
        if self.unlogged:
            with naming(self.log), open(self.log, "a", encoding="utf-8") as file:
                file.write("".join(["\n", *self.unlogged]))  # the first newline ends a torn line
                sync(file)
            self.unlogged = []

    def done(self) -> dict[int, dict[int, str]]:
        """Return the batches that all runs and ranks have written, each with its bad rows."""
        batches = {}
        for path in self.folder.glob("rank*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a torn line: its batch is encoded again
                    split, batch, bad = json.loads(line)
                    if split == self.split:
                        batches[batch] = {int(row): reason for row, reason in bad.items()}
        return batches

    def keep(self, rows: list[int]) -> "EmbeddingFile":
        """Return the file with these rows only: a copy, <split>.kept.npy, unless it is all."""
        if len(rows) == self.shape[0]:
            return self
        kept = self.create(self.folder, f"{self.split}.kept", (len(rows), *self.shape[1:]))
        kept.copy(self.rows(), rows)
        return kept


def create_files(cfg: Config, origin: dict, shapes: dict[str, tuple]) -> str:
    """Make each split's file in data/<dataset>/encoding, or leave those of an interrupted run of
    the same origin. Return this run's mark, which stands in the file `run` there."""
    folder = cfg.data_dir / "encoding"
    origin = origin | {"shapes": json.loads(json.dumps(shapes))}
    resumes = False
    if (folder / "made_by.json").is_file():
        is_same = read_json(folder / "made_by.json") == origin
        resumes = is_same and all((folder / f"{split}.npy").exists() for split in shapes)
        if not resumes:
            print("settings, images or versions differ from the unfinished run's: starting over")
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for split, shape in shapes.items():
            EmbeddingFile.create(folder, split, shape)
        write_text(folder / "made_by.json", json.dumps(origin))
    mark = secrets.token_hex(8)
    write_text(folder / "run", mark)
    return mark


def encode(splits: Splits, encoder, cfg: Config, device: Device) -> tuple[dict, dict, dict]:
    """Encode the images with CLIP, unless that is done, and drop the records of bad ones.

    Return, on rank 0, each split's file, the encoder fields of meta.json, and the content of
    encoding.json.
    """
    P, D = encoder.n_positions, encoder.embedding_dim
    shapes = {split: (len(records), P, D) for split, records in splits.items()}
    folder = cfg.data_dir / "encoding"
    origin = device.on_first(lambda: fingerprint_of_inputs(splits, cfg, encoder))
    files, bad = device.on_first(lambda: earlier_encoding(cfg, origin))
    if not files:
        mark = device.on_first(lambda: create_files(cfg, origin, shapes))
        is_shared = (folder / "run").is_file() and (folder / "run").read_text() == mark
        if not all(device.gather(is_shared)):
            raise UserError(f"{folder} is not the same on every machine: put it on shared storage")
        files = {split: EmbeddingFile(folder, split, device.rank) for split in splits}
        encode_missing(splits, files, encoder, cfg, device)
        device.gather(None)  # wait until all are done
    if not device.is_first:
        return {}, {}, {}
    bad = bad or list_bad(splits, files)
    drop_bad(splits, files, bad, cfg)
    for split in splits:
        # Rows and records are still aligned: the last row is what the last image gives.
        ((x, _),) = encoder.stream([[sources.locate(splits[split][-1], cfg)]], workers=0)
        last = torch.tensor(files[split].rows()[-1:])
        assert torch.cosine_similarity(x.double().ravel(), last.double().ravel(), 0) > 0.99
    encoder_fields = {"encoder": cfg.clip, "encoder_kind": encoder.kind}
    encoder_fields |= {"features": cfg.features, "grid": cfg.grid}
    return files, encoder_fields, {"made_by": origin, "bad": bad}


def earlier_encoding(cfg: Config, origin: dict) -> tuple[dict[str, EmbeddingFile], dict]:
    """Return each split's file and its bad rows, of a finished encoding of the same origin;
    nothing if there is none.

    Its files are in place, or if `finish` was cut off, still in data/<dataset>/encoding.
    """
    path = cfg.data_dir / "encoding.json"
    earlier = read_json(path) if path.is_file() else {}
    if earlier.get("made_by") != origin:
        return {}, {}
    files, bad = {}, {}
    for split, sample in earlier["files"].items():
        in_place = cfg.data_dir.glob(f"{split}_embeddings.npy")
        for file in (*in_place, *cfg.data_dir.glob(f"encoding/{split}*.npy")):
            if fingerprint(file) == sample:
                files[split] = EmbeddingFile(file.parent, file.stem)
        bad[split] = {int(row): reason for row, reason in earlier["bad"][split].items()}
    if files.keys() != bad.keys():
        return {}, {}
    print(f"the images are encoded already, as {path} says")
    return files, bad


def fingerprint_of_inputs(splits: Splits, cfg: Config, encoder) -> dict:
    """Return all that the embeddings' bytes depend on: model, images, and how they are batched."""
    import PIL
    import transformers

    stat = functools.lru_cache(1)(os.stat)  # of a tar, once
    sha = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            path, *part = sources.locate(record, cfg)
            status = (stat(path).st_size, stat(path).st_mtime_ns)
            sha.update(repr((split, path, part, *status, record.bad)).encode())
    return {
        "images": sha.hexdigest(), "encoder": encoder.digest(), "features": cfg.features,
        "grid": cfg.grid, "batch": cfg.encode_batch, "device": encoder.device.type,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
    }  # fmt: skip


def encode_missing(
    splits: Splits, files: dict[str, EmbeddingFile], encoder, cfg: Config, device: Device
) -> None:
    """Encode this rank's share of the batches that are not done.

    A split is cut into batches of `encode_batch`; batch b is rank b % world's. Its bytes depend
    on its own images alone and have a place of their own in the file, so neither the number of
    ranks nor an interruption can change the result.
    """
    size, jobs = cfg.encode_batch, []  # jobs: (split, batch, its records)
    for split, records in splits.items():
        done = files[split].done()
        for batch in range(device.rank, -(-len(records) // size), device.world):
            if batch not in done:
                jobs.append((split, batch, records[batch * size : (batch + 1) * size]))
    images = ([sources.locate(r, cfg) for r in records] for _, _, records in jobs)
    bad = list_bad(splits, files)
    total = sum(map(len, splits.values()))
    n_images = sum(len(records) for _, _, records in jobs)
    synced = time.monotonic()
    with tqdm(total=n_images, desc="encoding", unit="image", disable=not device.is_first) as bar:
        stream = encoder.stream(images, cfg.workers)
        for (split, batch, records), (x, reasons) in zip(jobs, stream, strict=True):
            if not torch.isfinite(x).all():
                raise UserError(f"clip={cfg.clip} overflows half precision: choose another model")
            block = np.zeros((len(records), *x.shape[1:]), np.float16)
            block[[i for i in range(len(records)) if i not in reasons]] = x
            reasons = {batch * size + i: reason for i, reason in reasons.items()}
            files[split].write(batch * size, block)
            files[split].unlogged.append(json.dumps([split, batch, reasons]) + "\n")
            bar.update(len(records))
            bad[split] |= reasons
            if sum(map(len, bad.values())) > cfg.max_bad * total:  # no need to wait for the end
                check_bad(splits, bad, cfg, device.rank)
            if time.monotonic() - synced >= SYNC:
                for file in files.values():
                    file.sync()
                synced = time.monotonic()
    for file in files.values():
        file.sync()


def list_bad(splits: Splits, files: dict[str, EmbeddingFile]) -> dict[str, dict[int, str]]:
    """Return split -> row -> why its image or caption cannot be used, as far as it is known."""
    bad = {}
    for split, records in splits.items():
        bad[split] = {row: record.bad for row, record in enumerate(records) if record.bad}
        for reasons in files[split].done().values():
            bad[split] |= reasons
    return bad


def check_bad(splits: Splits, bad: dict, cfg: Config, rank: int = 0) -> None:
    """Write the bad rows, as far as they are known, to skipped.csv. Raise UserError if they are
    more than `max_bad`."""
    count = sum(map(len, bad.values()))
    total = sum(map(len, splits.values()))
    path = cfg.data_dir / "skipped.csv"
    if not count:
        path.unlink(missing_ok=True)
        return
    own = path.with_name(f"skipped.{rank}.csv")  # two ranks may have too many at once
    with replacing(own) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "id", "file_name", "reason"))
        for split, reasons in bad.items():
            for row, reason in sorted(reasons.items()):
                record = splits[split][row]
                cells = (split, record.id, record.file_name, reason)
                # A spreadsheet would run a cell that begins like a formula.
                writer.writerow([f"'{c}" if str(c).startswith(tuple("=+-@")) else c for c in cells])
    os.replace(own, path)
    if count > cfg.max_bad * total:
        raise UserError(
            f"at least {count} of {total} images cannot be used, more than max_bad={cfg.max_bad}: "
            f"repair those in {path}, or raise max_bad"
        )
    print(f"left out {count} of {total} images, listed in {path}")


def drop_bad(splits: Splits, files: dict[str, EmbeddingFile], bad: dict, cfg: Config) -> None:
    """Leave the bad rows out of records and files. Raise UserError if they are too many."""
    check_bad(splits, bad, cfg)
    for split, records in splits.items():
        kept = [row for row in range(len(records)) if row not in bad[split]]
        if not kept:
            path = cfg.data_dir / "skipped.csv"
            raise UserError(f"none of the images of split `{split}` can be read: see {path}")
        splits[split] = [records[row] for row in kept]
        files[split] = files[split].keep(kept)


# ---------------------------------------------------------------------------------------------
# 3. or, instead of encoding: the user's own embeddings


def copy_embeddings(splits: Splits, cfg: Config) -> tuple[dict, dict, dict]:
    """Copy the rows of the user's array to the splits, by file name.

    Drop rows of zeros, which some programs write for an image that they could not read. Return what
    `encode` returns. Raise UserError if an image has no row (a split other than train and val of
    such images is left out), two share one, or a row is not finite in half precision.
    """
    array, index = open_embeddings(cfg)
    rows = {}  # split -> the row of each image
    owner: dict[int, str] = {}  # row -> the image that has it
    problems = sources.Problems()
    for split, records in list(splits.items()):
        names = [record.file_name for record in records]
        rows[split] = [index.get(name, index.get(name.rpartition("/")[2])) for name in names]
        if split not in sources.NEEDED and set(rows[split]) == {None}:
            print(f"left out split `{split}`: {cfg.embedding_names} has none of its images")
            del splits[split]
            continue
        for record, row in zip(records, rows[split], strict=True):
            name = record.file_name
            if row in owner:
                problems.add("two images of one row", split, f"{owner[row]} and {name}")
            elif row is not None:
                owner[row] = name
            elif not record.bad:
                problems.add(f"images without a row in {cfg.embedding_names}", split, name)
    problems.stop(cfg.embeddings)
    P, D = array.shape[1:]
    create_files(cfg, {}, {split: (len(rows[split]), P, D) for split in splits})
    files = {split: EmbeddingFile(cfg.data_dir / "encoding", split) for split in splits}
    bad = list_bad(splits, files)
    for split, file in files.items():
        largest = file.copy(array, [row or 0 for row in rows[split]])  # a bad image may have none
        for row in np.flatnonzero(~np.isfinite(largest)):
            name = splits[split][row].file_name
            raise UserError(f"{cfg.embeddings}: not finite in half precision, first for {name}")
        for row in np.flatnonzero(largest == 0).tolist():
            bad[split].setdefault(row, "embedding of zeros")
    drop_bad(splits, files, bad, cfg)
    return files, {"encoder": "", "features": "pooled" if P == 1 else "grid", "grid": 0}, {}


NOT_NPY = (
    'not a .npy array: write one by np.save("embeddings.npy", x), where x is torch.load(FILE)'
    ".numpy() of a .pt, np.load(FILE)[NAME] of a .npz, pickle.load(open(FILE, 'rb')) of a pickle"
)


def open_embeddings(cfg: Config) -> tuple[np.ndarray, dict[str, int]]:
    """Return the user's array, (N, P, D), memory-mapped, and the row of each image's name."""
    try:
        array = np.lib.format.open_memmap(cfg.embeddings, "r")
    except ValueError:
        raise UserError(f"{cfg.embeddings}: {NOT_NPY}") from None
    if array.dtype.kind not in "fiu":
        raise UserError(f"{cfg.embeddings}: not a .npy array of numbers")
    names = Path(cfg.embedding_names).read_text("utf-8-sig", "surrogateescape")
    names = names.removesuffix("\n").split("\n")
    if array.ndim not in (2, 3) or len(array) != len(names) or not array.size:
        raise UserError(
            f"{cfg.embeddings} has shape {array.shape}, {cfg.embedding_names} has {len(names)} "
            f"names: one row, (D,) or (P, D), is needed for each"
        )
    index = {name.strip(): row for row, name in enumerate(names)}
    if len(index) != len(names):
        raise UserError(f"{cfg.embedding_names}: {len(names) - len(index)} names occur twice")
    return array[:, None] if array.ndim == 2 else array, index


# ---------------------------------------------------------------------------------------------
# 4. Finish


def finish(
    splits: Splits, files: dict[str, EmbeddingFile], tokenizer: Tokenizer, cfg: Config,
    encoder_fields: dict, encoding: dict,
) -> None:  # fmt: skip
    """Write all that is missing, then move everything into place, meta.json last.

    Keeps the old dataset intact until the last moment; safe to repeat.
    """
    folder, ready = cfg.data_dir, cfg.data_dir / "encoding" / "ready"
    _, P, D = files["train"].shape
    shutil.rmtree(ready, ignore_errors=True)
    with replacing(ready / "tokenizer.model") as part:
        part.write_bytes(tokenizer.model)
    counts = {split: write_split(ready, split, splits[split], tokenizer) for split in splits}
    samples = {split: fingerprint(file.path) for split, file in files.items()}
    write_text(folder / "encoding.json", json.dumps(encoding | {"files": samples}))
    (folder / "meta.json").unlink(missing_ok=True)  # what it describes is about to change
    for split, file in files.items():
        os.replace(file.path, folder / f"{split}_embeddings.npy")
    for path in ready.iterdir():
        os.replace(path, folder / path.name)
    meta = Meta(
        dataset=cfg.dataset, source=cfg.source, captions=cfg.captions, images=cfg.images,
        normalize=cfg.normalize, lowercase=cfg.lowercase, vocab_size=len(tokenizer),
        splits=counts, pad=tokenizer.pad, bos=tokenizer.bos, eos=tokenizer.eos, unk=tokenizer.unk,
        n_positions=P, embedding_dim=D, **encoder_fields,
    )  # fmt: skip
    meta.write(folder)
    shutil.rmtree(folder / "encoding")
    for split, n in counts.items():
        print(f"{split}: {n['images']} images, {n['captions']} captions, {n['tokens']} tokens")
    print(f"wrote {folder}/")


if __name__ == "__main__":
    run(lambda: main(configure(Config, sys.argv[1:], __doc__)))
