"""The dataset directory `data/<name>/`: how it is written, checked, and read in packed batches.

meta.json                how it was made; the counts; size and SHA-256 of every other file
tokenizer.model          sentencepiece BPE, trained on the training captions only
<split>_embeddings.npy   (N, P, D) float16: one row an image, memory-mapped
<split>_tokens.npy       uint16 or uint32: bos caption bos caption ..., of all images end to end
<split>_offsets.npy      int64: N + 1 first captions of the images, then C + 1 first tokens of
                         the captions
<split>.json             images and references in COCO's caption annotation format
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from configurator import UserError

FORMAT = 1  # of the directory; raised when it changes
FILES = ("embeddings.npy", "tokens.npy", "offsets.npy")  # of a split, besides <split>.json

# ---------------------------------------------------------------------------------------------
# Files that appear whole or not at all


@contextlib.contextmanager
def naming(path: Path | str, part: Path | None = None) -> Iterator[None]:
    """Writing to a full disk raises an error that names no file, or `part`: now it names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or part and str(error.filename) == str(part):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place, fsynced, when all went well.

    A killed process leaves it behind; having a fixed name, it is overwritten the next time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with naming(path, part):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # gone, or the folder is read-only
            part.unlink()
    with contextlib.suppress(OSError):  # the new name too is on disk, where the system can do it
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_text(path: Path | str, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def append(path: Path | str, text: str) -> None:
    """Adds text to a file's end. The file is closed each time, so that nothing waits in a buffer
    that a full disk would refuse again, with a traceback, when the process ends."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_json(path: Path | str):
    """The content of a JSON file. Raises UserError where it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def digest(path: Path, sample: bool) -> str:
    """SHA-256 of a file; with `sample`, of its size and at most 256 blocks spread over it.

    A sample is the whole of a file up to 16 MiB, and takes a moment for one of any size.
    """
    block, size = 1 << 16, path.stat().st_size
    sha = hashlib.sha256(str(size).encode() if sample else b"")
    blocks = -(-size // block)
    chosen = range(blocks)
    if sample and blocks > 256:
        chosen = np.linspace(0, blocks - 1, 256).astype(np.int64).tolist()
    with open(path, "rb") as file:
        for i in chosen:
            file.seek(i * block)
            sha.update(file.read(block))
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """A sentencepiece model held as bytes, so that a checkpoint can carry it."""

    def __init__(self, model: bytes, where: str = "tokenizer"):
        self.model = model
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{where} is not a sentencepiece model") from None
        self.bos, self.eos, self.unk = self.sp.bos_id(), self.sp.eos_id(), self.sp.unk_id()
        ids = (self.bos, self.eos, self.unk)
        if min(ids) < 0 or len(set(ids)) < 3:
            raise UserError(f"{where} lacks one of the bos, eos and unk ids: {ids}")
        pad = self.sp.pad_id()
        self.pad = pad if pad >= 0 else self.unk  # never generated, never a target

    def __len__(self) -> int:
        return self.sp.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids without bos and eos."""
        return self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; the special ones are left out."""
        special = (self.pad, self.bos, self.eos)
        return self.sp.decode([int(i) for i in ids if i not in special])


# ---------------------------------------------------------------------------------------------
# Writing


def write_split(
    folder: Path, split: str, records: list[dict], tokenizer: Tokenizer, lowercase: bool = False
) -> dict:
    """Writes a split's tokens, offsets and references. Returns its counts for meta.json.

    `records` holds, for each image, "id", "file_name", "captions" (texts), and where the source
    knows them "caption_ids", "facts" and "tokens" (each caption's ids, without bos and eos).
    """
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts, lengths = [], []
    for i in range(0, len(records), 4096):  # the lists of ids would take more room than the texts
        some = records[i : i + 4096]
        if "tokens" in some[0]:
            ids = [t for r in some for t in r["tokens"]]
        else:
            captions = [c for r in some for c in r["captions"]]
            ids = tokenizer.sp.encode([c.lower() for c in captions] if lowercase else captions)
        parts.append(np.array([t for i in ids for t in (tokenizer.bos, *i)], kind))
        lengths.append(np.array([1 + len(i) for i in ids], np.int64))
    tokens, lengths = np.concatenate(parts), np.concatenate(lengths)
    per_image = np.array([len(r["captions"]) for r in records], np.int64)
    offsets = np.concatenate(([0], per_image.cumsum(), [0], lengths.cumsum()))
    write_array(folder / f"{split}_tokens.npy", tokens)
    write_array(folder / f"{split}_offsets.npy", offsets)
    with replacing(folder / f"{split}.json") as part, open(part, "w", encoding="utf-8") as file:
        file.write('{"images": [')
        for i, r in enumerate(records):
            image = {k: r[k] for k in ("id", "file_name", "facts") if k in r}
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        n = 0
        for r in records:
            for j, c in enumerate(r["captions"]):
                number = r["caption_ids"][j] if "caption_ids" in r else n
                annotation = {"id": number, "image_id": r["id"], "caption": c}
                file.write((", " if n else "") + json.dumps(annotation))
                n += 1
        file.write("]}")
    return {
        "images": len(records),
        "captions": n,
        "tokens": int(lengths.sum()),
        "longest_caption": int(lengths.max()),
        "unknown_tokens": int((tokens == tokenizer.unk).sum()),
    }


def write_array(path: Path, array: np.ndarray) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        np.save(file, array)


def write_meta(folder: Path, meta: dict) -> None:
    """Completes and writes meta.json, the last file of a dataset: where it is, all is there."""
    files = ["tokenizer.model"]
    files += [f"{s}_{f}" for s in meta["splits"] for f in FILES] + [
        f"{s}.json" for s in meta["splits"]
    ]
    meta["files"] = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": digest(folder / name, sample=False),
            "sample": digest(folder / name, sample=True),
        }
        for name in files
    }
    write_text(folder / "meta.json", json.dumps({"format": FORMAT, **meta}, indent=1))


# ---------------------------------------------------------------------------------------------
# Reading


def open_meta(folder: Path, hint: str = "run `python prepare.py config/<name>.py` first") -> dict:
    """The content of meta.json. Raises UserError where there is no dataset, or another format."""
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder}/meta.json not found: {hint}")
    meta = read_json(folder / "meta.json")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{folder}/meta.json is not a dataset of format {FORMAT}: {hint}")
    return meta


class Split:
    """One split of a dataset directory, its files checked against meta.json and memory-mapped.

    embeddings  (N, P, D) float16
    tokens      (L,) ids: bos caption bos caption ...
    rows        (N + 1,) int64: where in `tokens` each image's captions begin
    lengths     (N,) int64: tokens of each image's captions, a bos for each included
    n_captions  (N,) int64

    Raises UserError, naming the file and what to do, where one is missing or not as it was made.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = Path(folder), name
        self.meta = open_meta(self.folder)
        if name not in self.meta["splits"]:
            there = ", ".join(self.meta["splits"])
            raise UserError(f"{folder} has no split `{name}`; it has: {there}")
        for file in ("tokenizer.model", f"{name}.json", *(f"{name}_{f}" for f in FILES)):
            self._check(file)
        self.tokenizer = Tokenizer((self.folder / "tokenizer.model").read_bytes())
        load = lambda f: np.load(self.folder / f"{name}_{f}.npy", mmap_mode="r")  # noqa: E731
        self.embeddings, self.tokens, offsets = load("embeddings"), load("tokens"), load("offsets")
        n = self.meta["splits"][name]["images"]
        self.captions = offsets[n + 1 :]  # (C + 1,) where in `tokens` each caption begins
        self.rows = np.asarray(self.captions[offsets[: n + 1]])
        self.lengths, self.n_captions = np.diff(self.rows), np.diff(offsets[: n + 1])

    def _check(self, file: str) -> None:
        path, made = self.folder / file, self.meta["files"][file]
        again = "run prepare.py again"
        if not path.is_file():
            raise UserError(f"{path} is missing: {again}")
        if path.stat().st_size != made["bytes"]:
            size = path.stat().st_size
            raise UserError(f"{path} has {size} bytes, not the {made['bytes']} written: {again}")
        if digest(path, sample=True) != made["sample"]:
            raise UserError(f"{path} is not the file that prepare.py wrote: {again}")

    def __len__(self) -> int:
        return len(self.lengths)

    def references(self) -> tuple[list[dict], list[list[str]]]:
        """The images, in the order of the rows, and the reference captions of each."""
        content = read_json(self.folder / f"{self.name}.json")
        captions: dict = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return content["images"], list(captions.values())

    def embedding(self, rows: np.ndarray) -> torch.Tensor:
        """(B, P, D) float16 of the rows, read in the order of the file."""
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), *self.embeddings.shape[1:]), np.float16)
        out[order] = self.embeddings[rows[order]]
        return torch.from_numpy(out)

    def pack(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The images' embeddings and packed captions, as `ClipLM.forward` takes them.

        Returns embeddings (B, P, D) float16; tokens, segments and positions (B, S) int64, with S
        the longest row; where and targets (M,) int64: the places of the real tokens among B * S,
        and the id that follows each (eos after a caption's last).
        """
        bos, eos, lengths = self.tokenizer.bos, self.tokenizer.eos, self.lengths[rows]
        width = int(lengths.max())  # S
        index = np.arange(width)
        real = index < lengths[:, None]  # (B, S)
        flat = np.concatenate([self.tokens[self.rows[i] : self.rows[i + 1]] for i in rows])
        tokens = np.full(real.shape, self.tokenizer.pad, np.int64)
        tokens[real] = flat
        begins = tokens == bos
        segments = np.where(real, begins.cumsum(1), width + 1)
        positions = np.where(real, index - np.maximum.accumulate(begins * index, 1), 0)
        targets = np.append(flat[1:], bos).astype(np.int64)
        targets[targets == bos] = eos  # what precedes a caption's bos is the end of another
        arrays = dict(tokens=tokens, segments=segments, positions=positions,
                      where=np.flatnonzero(real), targets=targets)  # fmt: skip
        packed = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"embeddings": self.embedding(rows), **packed}


# ---------------------------------------------------------------------------------------------
# The order of training, and the batches


class Order:
    """Which images form the batch of a step: a pure function of (seed, step).

    An epoch is a new permutation, sorted by length within windows of 32 batches, so that rows of
    like length meet and little is padded; its batches then come in random order. The remainder
    that fills no batch is left out of that epoch (another one the next time).
    """

    def __init__(self, seed: int, lengths: np.ndarray, batch_size: int, parts: int = 1):
        if batch_size > len(lengths):
            raise UserError(f"batch_size={batch_size} exceeds the {len(lengths)} training images")
        if batch_size < parts:
            raise UserError(
                f"batch_size={batch_size} is less than {parts}, the processes x micro-steps"
            )
        self.seed, self.lengths, self.batch_size = seed, lengths, batch_size
        self.per_epoch = len(lengths) // batch_size
        self._epoch, self._batches = -1, np.empty(0)

    def batch(self, step: int) -> np.ndarray:
        """The (batch_size,) image numbers of step `step`, counted from 0."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            images = rng.permutation(len(self.lengths))[: self.per_epoch * self.batch_size]
            window = 32 * self.batch_size
            for i in range(0, len(images), window):
                part = images[i : i + window]
                images[i : i + window] = part[np.argsort(self.lengths[part], kind="stable")]
            batches = images.reshape(self.per_epoch, self.batch_size)
            self._epoch, self._batches = epoch, batches[rng.permutation(self.per_epoch)]
        return self._batches[place]


def batches(
    split: Split, order: Order, start: int, stop: int, rank: int = 0, world: int = 1, micro: int = 1
) -> Iterator[tuple[list[dict], dict]]:
    """Yields, for the steps start..stop-1, this rank's micro-batches and the global counts.

    The batch of a step is defined first and then dealt out to `world` ranks of `micro`
    micro-batches each, one image at a time, so that each gets rows of like length. The counts
    ({"images", "captions", "targets"}) are of the whole batch: every rank knows them without
    asking. Batches are made ahead of the step by a thread.
    """
    parts = world * micro

    def make(step: int):
        rows = order.batch(step)
        packed = [split.pack(rows[m * world + rank :: parts]) for m in range(micro)]
        sums = {"captions": split.n_captions[rows].sum(), "targets": split.lengths[rows].sum()}
        counts = {"images": len(rows), **{name: int(n) for name, n in sums.items()}}
        return packed, counts

    yield from ahead(make(step) for step in range(start, stop))


def ahead(items: Iterator, depth: int = 4) -> Iterator:
    """Yields the items, the next `depth` of them made meanwhile by a thread."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(end)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
