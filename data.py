"""The dataset directory `data/<name>/`: how it is written, checked, and read in packed batches.

meta.json                how it was made; the counts; size and SHA-256 of every other file
tokenizer.model          sentencepiece BPE, trained on the training captions only; or a byte-level
                         BPE such as GPT-2's, as JSON (parts/gpt2.py)
<split>_embeddings.npy   (images, n_positions, D) float16, memory-mapped
<split>_tokens.npy       uint16 or uint32: bos caption bos caption ..., all images end to end
<split>_offsets.npy      int64, two lists end to end: the first caption of each image, the first
                         token of each caption; each list ends with its total
<split>.json             images and references in COCO's caption annotation format
encoding.json            what the embeddings were made by, so that prepare.py can use them again

Letters are model.py's: B images, S caption tokens in a row, M targets, D an embedding's width.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from configurator import from_dict
from parts.common import UserError, fingerprint, prefetch, read_json, replacing, sha256, write_text
from parts.gpt2 import BytePairs

# ---------------------------------------------------------------------------------------------
# Reading a split


class Split:
    """One split of a dataset directory, its files checked against meta.json and memory-mapped.

    embeddings     (images, n_positions, D) float16
    tokens         ids: bos caption bos caption ...
    caption_start  where in `tokens` each caption begins, and the end
    image_start    where in `tokens` each image's captions begin, and the end
    lengths        (images,) tokens of each image's captions, a bos for each included
    n_captions     (images,)

    Raises UserError if a file is missing, or has changed since prepare.py wrote it.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = Path(folder), name
        self.meta = Meta.read(self.folder)
        if name not in self.meta.splits:
            known = ", ".join(self.meta.splits)
            raise UserError(f"{folder} has no split `{name}`; it has: {known}")
        for file in files_of(name):
            path = self.folder / file
            if not path.is_file() or fingerprint(path) != self.meta.files[file]["sample"]:
                raise UserError(f"{path} is missing or was changed: run prepare.py again")
        model = (self.folder / "tokenizer.model").read_bytes()
        self.tokenizer = Tokenizer(model, self.meta.lowercase)
        self.embeddings = self._load("embeddings")
        self.tokens = self._load("tokens")
        offsets = self._load("offsets")
        images = self.meta.splits[name]["images"]
        first_caption = offsets[: images + 1]
        self.caption_start = offsets[images + 1 :]
        self.image_start = np.asarray(self.caption_start[first_caption])
        self.lengths = np.diff(self.image_start)
        self.n_captions = np.diff(first_caption)

    def _load(self, array: str) -> np.ndarray:
        return np.load(self.folder / f"{self.name}_{array}.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def references(self) -> tuple[list[dict], list[list[str]]]:
        """Return the images, in the order of the rows, and each one's reference captions."""
        content = read_json(self.folder / f"{self.name}.json")
        captions: dict = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return content["images"], list(captions.values())

    def embedding(self, images: np.ndarray) -> torch.Tensor:
        """Return (B, n_positions, D) float16, read in file order to avoid seeking."""
        order = np.argsort(images, kind="stable")
        out = np.empty((len(images), *self.embeddings.shape[1:]), np.float16)
        out[order] = self.embeddings[images[order]]
        return torch.from_numpy(out)

    def caption_tokens(self, image: int) -> np.ndarray:
        """Return the tokens of an image's captions: bos caption bos caption ..."""
        return self.tokens[self.image_start[image] : self.image_start[image + 1]]

    def pack(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the images' embeddings and packed captions, as `ClipLM.forward` takes them.

        A row is one image with all its captions. Returns embeddings (B, n_positions, D) float16,
        and what `pack_rows` returns.
        """
        tokens = np.concatenate([self.caption_tokens(image) for image in images])  # (M,)
        packed = pack_rows(tokens, self.lengths[images], self.tokenizer)
        return {"embeddings": self.embedding(images), **packed}


def pack_rows(flat: np.ndarray, lengths: np.ndarray, tokenizer: "Tokenizer") -> dict:
    """Return packed rows: [bos caption 1 | bos caption 2 | ... | padding], one per image.

    Args:
        flat: (M,) the ids of all rows, bos caption bos caption ..., end to end.
        lengths: (B,) how many of them each row has.

    Returns tokens, segments and positions (B, S) int64, with S the longest row; targets_at and
    targets (M,) int64: the indices of the real tokens among the B * S, and the id that follows
    each (eos after a caption's last).
    """
    S = int(lengths.max())
    index = np.arange(S)
    is_real = index < lengths[:, None]  # (B, S)
    tokens = np.full(is_real.shape, tokenizer.pad, np.int64)
    tokens[is_real] = flat
    is_bos = tokens == tokenizer.bos
    caption_begin = np.maximum.accumulate(is_bos * index, axis=1)  # (B, S): the latest bos
    # A token followed by a bos ends its caption, so its target is eos.
    targets = np.append(flat[1:], tokenizer.bos).astype(np.int64)
    targets[targets == tokenizer.bos] = tokenizer.eos
    arrays = {
        "tokens": tokens,
        "segments": np.where(is_real, is_bos.cumsum(axis=1), S + 1),
        "positions": np.where(is_real, index - caption_begin, 0),
        "targets_at": np.flatnonzero(is_real),
        "targets": targets,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------------------------------------
# The order of training, and the batches


class Order:
    """Which images form the batch of a step: a pure function of (seed, step).

    An epoch is a new permutation, sorted by length within windows of 32 batches, so that rows of
    similar length share a batch and little is padded; its batches then come in random order.
    Images left over, too few for a batch, are skipped; the next epoch skips different ones.

    Raises UserError if there are fewer images than a batch has.
    """

    def __init__(self, seed: int, lengths: np.ndarray, batch_size: int):
        if batch_size > len(lengths):
            raise UserError(f"batch_size={batch_size} exceeds the {len(lengths)} training images")
        self.seed, self.lengths, self.batch_size = seed, lengths, batch_size
        self.per_epoch = len(lengths) // batch_size
        self._epoch, self._batches = -1, np.empty(0)

    def batch(self, step: int) -> np.ndarray:
        """Return the (batch_size,) image numbers of step `step`, counted from 0."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            images = rng.permutation(len(self.lengths))[: self.per_epoch * self.batch_size]
            window = 32 * self.batch_size
            for i in range(0, len(images), window):
                part = images[i : i + window]
                images[i : i + window] = part[np.argsort(self.lengths[part], kind="stable")]
            batches = images.reshape(self.per_epoch, self.batch_size)
            self._epoch, self._batches = epoch, batches[rng.permutation(self.per_epoch)]
        return self._batches[number]


def deal(images: np.ndarray, rank: int, world: int, micro_steps: int) -> list[np.ndarray]:
    """Return a rank's micro-batches of the images of a batch.

    They are dealt out one at a time, so that each micro-batch gets rows of similar length. Raises
    UserError if there are fewer images than micro-batches of all ranks.
    """
    parts = world * micro_steps
    if len(images) < parts:
        raise UserError(
            f"batch_size={len(images)} is less than {parts}, the processes x micro-steps"
        )
    return [images[m * world + rank :: parts] for m in range(micro_steps)]


def batches(
    split: Split, order: Order, steps: range, rank: int = 0, world: int = 1, micro_steps: int = 1
) -> Iterator[tuple[list[dict], dict]]:
    """Yield, for each step, this rank's packed micro-batches and the counts of the whole batch.

    The batch of a step is defined first and then dealt out (see `deal`). The counts
    ({"images", "captions", "targets"}) are global: no rank has to ask for them. A background
    thread prefetches.
    """

    def make(step: int) -> tuple[list[dict], dict]:
        images = order.batch(step)
        packed = [split.pack(own) for own in deal(images, rank, world, micro_steps)]
        counts = {
            "images": len(images),
            "captions": int(split.n_captions[images].sum()),
            "targets": int(split.lengths[images].sum()),
        }
        return packed, counts

    return prefetch(make, steps)


# ---------------------------------------------------------------------------------------------
# What meta.json says, and the tokenizer

FORMAT = 1  # of the directory; raised when it changes
ENCODING = ("encoder", "features", "grid", "n_positions", "embedding_dim")  # must fit a model


def files_of(split: str) -> list[str]:
    """Return the names of the files that a split is read from."""
    names = ("_embeddings.npy", "_tokens.npy", "_offsets.npy", ".json")
    return ["tokenizer.model", *(split + name for name in names)]


@dataclass(frozen=True)
class Meta:
    """The content of meta.json: how a dataset was made. A checkpoint carries it too."""

    dataset: str  # its name
    source: str  # as in configurator.Config, like most of the following
    captions: str
    images: str
    encoder: str  # which CLIP; empty for the user's own embeddings
    features: str  # pooled or grid
    grid: int
    n_positions: int  # embeddings per image: 1 if pooled
    embedding_dim: int  # D
    normalize: bool
    lowercase: bool
    vocab_size: int
    splits: dict  # split -> images, captions, tokens, longest_caption, unknown_tokens
    encoder_kind: str = ""  # clip or siglip
    pad: int = -1  # the special ids, for programs other than ours
    bos: int = -1
    eos: int = -1
    unk: int = -1
    files: dict = field(default_factory=dict)  # name -> bytes, sha256, sample (its fingerprint)
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Meta":
        """Read meta.json. Raise UserError if there is no dataset, or of another format."""
        path = folder / "meta.json"
        hint = "run `python prepare.py config/<name>.py` first, or set --data to its folder"
        content = read_json(path, hint)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is not a dataset of format {FORMAT}: {hint}")
        return from_dict(cls, content, str(path))

    def write(self, folder: Path) -> None:
        """Add what is known of the files and write meta.json, a dataset's last file."""
        files = {}
        for split in self.splits:
            for name in files_of(split):
                path = folder / name
                size = path.stat().st_size
                files[name] = {"bytes": size, "sha256": sha256(path), "sample": fingerprint(path)}
        write_text(folder / "meta.json", json.dumps(asdict(self) | {"files": files}, indent=1))

    @property
    def longest_caption(self) -> int:
        """The tokens of the longest caption of all splits, counting one of bos and eos."""
        return max(split["longest_caption"] for split in self.splits.values())

    def differences(self, other: "Meta") -> str:
        """Return how the other's embeddings differ in kind from this one's, "" if they do not."""
        return "; ".join(
            f"{name} {getattr(other, name) or 'none'}, not {getattr(self, name) or 'none'}"
            for name in ENCODING
            if getattr(other, name) != getattr(self, name)
        )

    def refuse_other(self, trained_on: "Meta", path: Path | str, hint: str) -> None:
        """Raise UserError, with `hint`, if a checkpoint was trained on other files than these. A
        split that only one of them has changes nothing."""
        names = [n for n in trained_on.files if n in self.files] or self.files
        changed = ", ".join(n for n in names if self.files.get(n) != trained_on.files.get(n))
        if changed:
            raise UserError(f"{path} was trained on another dataset: {changed} differ: {hint}")


class Tokenizer:
    """A tokenizer held as bytes, so that a checkpoint can carry it.

    Args:
        model: the content of a sentencepiece model file, or what gpt2.read_tokenizer returns.
        lowercase: lower-case every text first.
        name: what to call it in errors.

    Raises UserError if it is neither, or lacks bos, eos or unk.
    """

    def __init__(self, model: bytes, lowercase: bool = False, name: str = "tokenizer"):
        self.model = model
        self.lowercase = lowercase
        try:
            if model.startswith(b'{"version"'):
                self.sp = BytePairs(model)
            else:
                self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{name} is not a sentencepiece model") from None
        self.bos, self.eos, self.unk = self.sp.bos_id(), self.sp.eos_id(), self.sp.unk_id()
        special = (self.bos, self.eos, self.unk)
        if min(special) < 0 or len(set(special)) < 3:
            raise UserError(f"{name} lacks one of the bos, eos and unk ids: {special}")
        self.pad = self.sp.pad_id()
        if self.pad < 0:  # never generated, never a target, so that another special id will do
            self.pad = self.unk

    def __len__(self) -> int:
        return self.sp.get_piece_size()

    def text(self, caption: str) -> str:
        """Return a caption as it is encoded: in lower case, if it is so trained."""
        return caption.lower() if self.lowercase else caption

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos."""
        return self.sp.encode([self.text(text) for text in texts])

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids, without the special ones."""
        special = (self.pad, self.bos, self.eos)
        return self.sp.decode([int(i) for i in ids if i not in special])

    def pieces(self, ids: list[int]) -> list[str]:
        """Return each id's piece of text, with sentencepiece's mark for a space."""
        return [self.sp.id_to_piece(i) for i in ids]


# ---------------------------------------------------------------------------------------------
# Writing a split


def write_split(folder: Path, split: str, records: list, tokenizer: Tokenizer) -> dict:
    """Write a split's tokens, offsets and references. Return its counts for meta.json.

    Print how many captions change when encoded and decoded, as by an unknown character.

    `records` are sources.Record: images with id, file_name, captions, and if the source knows
    them caption_ids, facts and tokens (each caption's ids, without bos and eos).
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    tokens, lengths, changed = [], [], []
    for i in range(0, len(records), 4096):  # all ids as lists would take more room than the texts
        some = records[i : i + 4096]
        captions = [c for record in some for c in record.captions]
        encoded = [ids for record in some for ids in record.tokens or ()]
        encoded = encoded or tokenizer.encode_all(captions)
        for caption, text in zip(captions, tokenizer.sp.decode(encoded), strict=True):
            if text != (original := tokenizer.text(caption)):
                changed.append((original, text))
        tokens.append(np.array([t for ids in encoded for t in (tokenizer.bos, *ids)], dtype))
        lengths.append(np.array([1 + len(ids) for ids in encoded], np.int64))
    if changed:
        example = "`{}` to `{}`".format(*changed[0])
        print(f"{split}: the tokenizer changes {len(changed)} captions, first {example}")
    tokens = np.concatenate(tokens)
    lengths = np.concatenate(lengths)
    per_image = np.array([len(record.captions) for record in records], np.int64)
    offsets = np.concatenate(([0], per_image.cumsum(), [0], lengths.cumsum()))
    write_array(folder / f"{split}_tokens.npy", tokens)
    write_array(folder / f"{split}_offsets.npy", offsets)
    with replacing(folder / f"{split}.json") as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(references_as_json(records, split))
    return {
        "images": len(records),
        "captions": len(lengths),
        "tokens": int(lengths.sum()),
        "longest_caption": int(lengths.max(initial=0)),
        "unknown_tokens": int((tokens == tokenizer.unk).sum()),
    }


def references_as_json(records: list, split: str) -> Iterator[str]:
    """Yield images and captions as JSON in COCO's format, in pieces: there may be millions."""
    separator = '{"images": ['
    for record in records:
        image = {"id": record.id, "file_name": record.file_name}
        if record.facts:
            image["facts"] = record.facts
        if record.split not in (None, split):
            image["split"] = record.split  # the source's own, which names the image's folder
        yield separator + json.dumps(image)
        separator = ", "
    yield '], "annotations": ['
    separator = ""
    first = 0  # number of the record's first caption
    for record in records:
        ids = record.caption_ids or range(first, first + len(record.captions))
        for number, caption in zip(ids, record.captions, strict=True):
            entry = {"id": number, "image_id": record.id, "caption": caption}
            yield separator + json.dumps(entry)
            separator = ", "
        first += len(record.captions)
    yield "]}"


def write_array(path: Path, array: np.ndarray) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        np.save(file, array)
