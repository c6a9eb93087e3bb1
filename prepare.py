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
files; on a finished dataset, it encodes nothing again. Images that cannot be read, or have no
caption that can be used, are left out and listed in `data/<dataset>/skipped.csv`; prepare.py stops
if they are more than `max_bad` of all. Empty captions, and unusable ones in tar shards, are left
out and reported on stderr.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
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
        encoder = None
        origin: dict = {}  # what the embeddings' bytes depend on, unless they are the user's
        if not cfg.embeddings:  # a missing one is found before hours of downloading
            encoder = clip.Encoder(cfg.clip, cfg.features, cfg.grid, device.torch_device)
        splits, tokenizer = device.on_first(lambda: gather_inputs(cfg))
        if encoder:
            files, origin = encode(splits, encoder, cfg, device)
        elif device.is_first:
            files = copy_embeddings(splits, cfg)
        if device.is_first:
            finish(splits, files, tokenizer, cfg, encoder, origin)
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
        reason = str(error).strip()
        if most := re.search(r"value <= (\d+)", reason):
            print(f"the captions have only {most[1]} pieces: vocab_size {vocab_size} -> {most[1]}")
            return train_tokenizer(captions, int(most[1]), lowercase)
        if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            reason = f"too few for the characters in the captions: set at least {least[1]}"
        raise UserError(f"vocab_size={vocab_size}: {reason}") from None
    return Tokenizer(model.getvalue(), lowercase)


# ---------------------------------------------------------------------------------------------
# 3. Encode: rows go to data/<dataset>/encoding/<split>.npy, which `finish` moves into place. After
# they are safe on the disk, rank<rank>.jsonl there records which batches are done, each with its
# bad rows, so that the next run resumes after a kill.


def encode(splits: Splits, encoder, cfg: Config, device: Device) -> tuple[dict[str, Path], dict]:
    """Encode the images with CLIP, unless that is done, and mark the records of bad ones.

    Return each split's file and what its bytes depend on.
    """
    origin = device.on_first(lambda: fingerprint_of_inputs(splits, cfg, encoder))
    files = device.on_first(lambda: earlier_encoding(splits, cfg, origin))
    if files:
        return files, origin
    folder = cfg.data_dir / "encoding"
    P, D = encoder.n_positions, encoder.embedding_dim
    shapes = {split: (len(records), P, D) for split, records in splits.items()}
    made_by = device.on_first(lambda: start_encoding(cfg, origin, shapes))
    path = folder / "made_by.json"
    is_shared = path.is_file() and read_json(path) == made_by
    if not all(device.gather(is_shared)):
        raise UserError(f"{folder} is not the same on every machine: put it on shared storage")
    encode_missing(splits, folder, encoder, cfg, device)
    device.gather(None)  # wait until all are done
    batches_done(splits, folder)  # which marks the bad images of all ranks
    return {split: folder / f"{split}.npy" for split in splits}, origin


def start_encoding(cfg: Config, origin: dict, shapes: dict[str, tuple]) -> dict:
    """Make each split's file in data/<dataset>/encoding, or leave those of an interrupted run of
    the same origin. Return what stands in made_by.json there: the origin and this run's mark."""
    folder = cfg.data_dir / "encoding"
    files = {folder / f"{split}.npy": shape for split, shape in shapes.items()}
    path = folder / "made_by.json"
    earlier = {}
    if path.is_file():
        earlier = read_json(path)
    if earlier.get("origin") != origin or not all(file.exists() for file in files):
        if earlier:
            print("settings, images or versions differ from the unfinished run's: starting over")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, shape in files.items():
            with naming(file):
                np.lib.format.open_memmap(file, "w+", np.float16, shape)
    made_by = {"origin": origin, "run": secrets.token_hex(8)}
    write_text(path, json.dumps(made_by))
    return made_by


def earlier_encoding(splits: Splits, cfg: Config, origin: dict) -> dict[str, Path]:
    """Return each split's file, of a finished encoding of the same origin, and mark the records of
    bad images; return nothing if there is none.

    Its files are in place, or if `finish` was cut off, still in data/<dataset>/encoding.
    """
    path = cfg.data_dir / "encoding.json"
    earlier = read_json(path) if path.is_file() else {}
    if earlier.get("made_by") != origin:
        return {}
    files = {}
    for split, sample in earlier["files"].items():
        in_place = cfg.data_dir.glob(f"{split}_embeddings.npy")
        for file in (*in_place, *cfg.data_dir.glob(f"encoding/{split}*.npy")):
            if fingerprint(file) == sample:
                files[split] = file
    if files.keys() != splits.keys():
        return {}
    for split, reasons in earlier["bad"].items():
        for row, reason in reasons.items():
            splits[split][int(row)].bad = reason
    print(f"the images are encoded already, as {path} says")
    return files


def fingerprint_of_inputs(splits: Splits, cfg: Config, encoder) -> dict:
    """Return all that the embeddings' bytes depend on: model, images, and how they are batched."""
    import PIL
    import transformers

    stat = functools.lru_cache(1)(os.stat)  # of a tar, once
    sha = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            path, *part = sources.locate(record, cfg)  # of which the folder does not count
            status = (stat(path).st_size, stat(path).st_mtime_ns)
            sha.update(repr((split, record.file_name, part, *status, record.bad)).encode())
    return {
        "images": sha.hexdigest(), "encoder": encoder.digest(), "features": cfg.features,
        "grid": cfg.grid, "batch": cfg.encode_batch, "device": encoder.device.type,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
    }  # fmt: skip


def encode_missing(splits: Splits, folder: Path, encoder, cfg: Config, device: Device) -> None:
    """Encode this rank's share of the batches that are not done.

    A split is cut into batches of `encode_batch`; batch b is rank b % world's. Its bytes depend
    on its own images alone and have a place of their own in the file, so neither the number of
    ranks nor an interruption can change the result.
    """
    size, jobs = cfg.encode_batch, []  # jobs: (split, first row, records)
    done = batches_done(splits, folder)
    for split, records in splits.items():
        for row in range(device.rank * size, len(records), device.world * size):
            if (split, row // size) not in done:
                jobs.append((split, row, records[row : row + size]))
    images = ([sources.locate(r, cfg) for r in records] for _, _, records in jobs)
    n_images = sum(len(records) for _, _, records in jobs)
    total = sum(map(len, splits.values()))
    n_bad = sum(bool(record.bad) for records in splits.values() for record in records)
    begins = {split: np.load(folder / f"{split}.npy", mmap_mode="r").offset for split in splits}
    unlogged: list[str] = []
    synced = time.monotonic()
    with tqdm(total=n_images, desc="encoding", unit="image", disable=not device.is_first) as bar:
        stream = encoder.stream(images, cfg.workers)
        for (split, row, records), (x, reasons) in zip(jobs, stream, strict=True):
            if not torch.isfinite(x).all():
                raise UserError(f"clip={cfg.clip} overflows half precision: choose another model")
            block = np.zeros((len(records), *x.shape[1:]), np.float16)
            block[[i for i in range(len(records)) if i not in reasons]] = x
            path = folder / f"{split}.npy"
            with naming(path), open(path, "rb+") as file:  # on a full disk, a memmap is a SIGBUS
                file.seek(begins[split] + row * block[0].nbytes)
                file.write(block.tobytes())
            bad = {row + i: reason for i, reason in reasons.items()}
            unlogged.append(json.dumps([split, row // size, bad]) + "\n")
            bar.update(len(records))
            for i, reason in reasons.items():
                n_bad += not records[i].bad
                records[i].bad = reason
            if n_bad > cfg.max_bad * total:  # no need to wait for the end
                check_bad(splits, cfg, device.rank)
            if time.monotonic() - synced >= SYNC:
                log_batches(splits, folder, device.rank, unlogged)
                synced = time.monotonic()
    log_batches(splits, folder, device.rank, unlogged)


def log_batches(splits: Splits, folder: Path, rank: int, unlogged: list[str]) -> None:
    """Make what was written safe: rows first, then the record that they exist."""
    for path in (folder / f"{split}.npy" for split in splits):
        with naming(path), open(path, "rb+") as file:
            sync(file)
    log = folder / f"rank{rank}.jsonl"
    with naming(log), open(log, "a", encoding="utf-8") as file:
        file.write("".join(["\n", *unlogged]))  # the first newline ends a torn line
        sync(file)
    unlogged.clear()


def batches_done(splits: Splits, folder: Path) -> set[tuple[str, int]]:
    """Return the batches that all runs and ranks have written, and mark their bad images."""
    done = set()
    for path in folder.glob("rank*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a torn line: its batch is encoded again
                split, batch, reasons = json.loads(line)
                done.add((split, batch))
                for row, reason in reasons.items():
                    splits[split][int(row)].bad = reason
    return done


def check_bad(splits: Splits, cfg: Config, rank: int = 0) -> None:
    """Write the bad images, as far as they are known, to skipped.csv. Raise UserError if they are
    more than `max_bad`."""
    bad = [(split, record) for split in splits for record in splits[split] if record.bad]
    total = sum(map(len, splits.values()))
    path = cfg.data_dir / "skipped.csv"
    if not bad:
        path.unlink(missing_ok=True)
        return
    own = path.with_name(f"skipped.{rank}.csv")  # two ranks may have too many at once
    with replacing(own) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "id", "file_name", "reason"))
        for split, record in bad:
            cells = (split, record.id, record.file_name, record.bad)
            # A spreadsheet would run a cell that begins like a formula.
            writer.writerow([f"'{c}" if str(c).startswith(tuple("=+-@")) else c for c in cells])
    os.replace(own, path)
    if len(bad) > cfg.max_bad * total:
        raise UserError(
            f"at least {len(bad)} of {total} images cannot be used, more than "
            f"max_bad={cfg.max_bad}: repair those in {path}, or raise max_bad"
        )
    print(f"left out {len(bad)} of {total} images, listed in {path}")


# ---------------------------------------------------------------------------------------------
# 3. or, instead of encoding: the user's own embeddings


def copy_embeddings(splits: Splits, cfg: Config) -> dict[str, Path]:
    """Copy the rows of the user's array to the splits, by file name. Return each split's file.

    Rows of zeros, which some programs write for an image that they could not read, are bad. Raise
    UserError if an image has no row, two share one, or a row is not finite in half precision. A
    split without any rows, other than train and val, is left out.
    """
    array, index = open_embeddings(cfg)
    rows = {}  # split -> the row of each image
    owner: dict[int, str] = {}  # row -> the image that has it
    problems = sources.Problems()
    for split, records in list(splits.items()):
        rows[split] = []
        for record in records:
            name = record.file_name
            known = (f"{record.split}/{name}", name, name.rpartition("/")[2])
            rows[split].append(next((index[n] for n in known if n in index), None))
        if split not in sources.NEEDED and set(rows[split]) == {None}:
            print(f"left out split `{split}`: {cfg.embedding_names} has none of its images")
            del splits[split]
            continue
        for record, row in zip(records, rows[split], strict=True):
            name = record.file_name
            if row in owner:
                both = f"{owner[row]} and {name}"
                problems.add("two images share a row (make the names unique)", split, both)
            elif row is not None:
                owner[row] = name
            elif not record.bad:
                first = f"the first of its names is {next(iter(index))}"
                where = f"images without a row in {cfg.embedding_names} ({first})"
                problems.add(where, split, name)
    problems.stop(cfg.embeddings)
    start_encoding(cfg, {}, {})
    files = {split: cfg.data_dir / "encoding" / f"{split}.npy" for split in splits}
    for split, records in splits.items():
        # A bad image may have no row.
        largest = copy_rows(array, [row or 0 for row in rows[split]], files[split])
        for record, value in zip(records, largest, strict=True):
            if not math.isfinite(value):
                name = record.file_name
                raise UserError(f"{cfg.embeddings}: not finite in half precision, first for {name}")
            if value == 0:
                record.bad = record.bad or "embedding of zeros"
    return files


def copy_rows(array: np.ndarray, rows: list[int], path: Path) -> list[float]:
    """Write these rows of an array (N, P, D), which may exceed memory, to a .npy file in float16.

    Return the largest absolute value of each, infinite or NaN if it does not fit.
    """
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(rows), *array.shape[1:])}
    largest = []
    with replacing(path) as part, open(part, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(0, len(rows), 4096):
            with np.errstate(over="ignore"):
                block = array[rows[i : i + 4096]].astype(np.float16)
            file.write(block.tobytes())
            largest += np.abs(block).max((1, 2)).tolist()
    return largest


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
        twice = f"{len(names) - len(index)} names occur twice"
        raise UserError(f"{cfg.embedding_names}: {twice}: write them with folders, as train/1.jpg")
    return array[:, None] if array.ndim == 2 else array, index


# ---------------------------------------------------------------------------------------------
# 4. Finish


def finish(
    splits: Splits, files: dict[str, Path], tokenizer: Tokenizer, cfg: Config, encoder, origin: dict
) -> None:
    """Leave out bad images, write all that is missing, and move everything into place, meta.json
    last. Raise UserError if a split has bad images only, or if they exceed `max_bad`.

    Keeps the old dataset intact until the last moment; safe to repeat.
    """
    check_bad(splits, cfg)
    bad = {}
    for split, records in splits.items():
        bad[split] = {row: record.bad for row, record in enumerate(records) if record.bad}
        kept = [row for row in range(len(records)) if row not in bad[split]]
        if not kept:
            path = cfg.data_dir / "skipped.csv"
            raise UserError(f"none of the images of split `{split}` can be used: see {path}")
        array = np.load(files[split], mmap_mode="r")
        if len(kept) < len(array):  # else an earlier run has left them out
            files[split] = cfg.data_dir / "encoding" / f"{split}.kept.npy"
            copy_rows(array, kept, files[split])
        splits[split] = [records[row] for row in kept]
        if encoder:
            # Rows and records are still aligned: the last row is what the last image gives.
            ((x, _),) = encoder.stream([[sources.locate(splits[split][-1], cfg)]], workers=0)
            last = torch.tensor(np.load(files[split], mmap_mode="r")[-1:])
            assert torch.cosine_similarity(x.double().ravel(), last.double().ravel(), 0) > 0.99
    _, P, D = array.shape
    folder, ready = cfg.data_dir, cfg.data_dir / "encoding" / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    with replacing(ready / "tokenizer.model") as part:
        part.write_bytes(tokenizer.model)
    counts = {split: write_split(ready, split, splits[split], tokenizer) for split in splits}
    samples = {split: fingerprint(file) for split, file in files.items()}
    encoding = {"made_by": origin, "bad": bad, "files": samples}
    write_text(folder / "encoding.json", json.dumps(encoding))
    (folder / "meta.json").unlink(missing_ok=True)  # what it describes is about to change
    for split, file in files.items():
        os.replace(file, folder / f"{split}_embeddings.npy")
    for path in ready.iterdir():
        os.replace(path, folder / path.name)
    encoder_fields = {"encoder": "", "features": "pooled" if P == 1 else "grid", "grid": 0}
    if encoder:
        encoder_fields = {"encoder": cfg.clip, "features": cfg.features, "grid": cfg.grid}
        encoder_fields["encoder_kind"] = encoder.kind
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
