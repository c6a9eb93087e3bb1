"""Makes a dataset directory from images (or embeddings) and captions.

    python prepare.py config/shapes.py
    python prepare.py config/flickr8k.py --captions=dataset_flickr8k.json --images=Images
    python prepare.py config/flickr8k.py --captions=dataset_flickr8k.json \\
        --embeddings=embeddings.npy --embedding_names=filenames.txt

Reads the source, checks it, encodes each image once, trains the tokenizer on the training
captions, and writes `data/<dataset>/`, meta.json last.
"""

import io
import re
import sys
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

import shapes
from configurator import Config, UserError, configure, run
from data import Tokenizer, read_json, replacing, write_meta, write_split

# ---------------------------------------------------------------------------------------------
# Sources: each returns {split: [{"id", "file_name", "captions", ...}, ...]}


def karpathy(cfg: Config) -> dict[str, list[dict]]:
    """Karpathy's JSON of COCO, Flickr8k or Flickr30k; `restval` joins train."""
    content = read_json(cfg.captions)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f'{cfg.captions}: not in Karpathy\'s format, it has no list "images"')
    splits: dict[str, list[dict]] = {}
    for i, image in enumerate(content["images"]):
        try:
            split = {"restval": "train"}.get(image["split"], image["split"])
            name = "/".join(p for p in (image.get("filepath"), image["filename"]) if p)
            sentences = image["sentences"]
            record = {
                "id": image.get("cocoid", image.get("imgid", i)),
                "file_name": name,
                "captions": [s["raw"].strip() for s in sentences],
                "caption_ids": [s["sentid"] for s in sentences],
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{cfg.captions}: image {i} lacks {error}") from None
        splits.setdefault(split, []).append(record)
    return splits


def scenes(cfg: Config) -> dict[str, list[dict]]:
    """The built-in scenes, rendered into data/<dataset>/images."""
    counts = {"train": cfg.shapes_train, **dict.fromkeys(("val", "test", "novel"), cfg.shapes_eval)}
    splits = shapes.build(cfg.data_dir / "images", counts, cfg.seed)
    number = 0
    for records in splits.values():
        for record in records:
            record["id"] = number
            number += 1
    return splits


SOURCES = {"shapes": scenes, "karpathy": karpathy}


def check(splits: dict[str, list[dict]], cfg: Config) -> None:
    """Raises UserError, listing at most 20 problems, where the source cannot be used as it is."""
    where, problems, seen = cfg.captions or cfg.source, [], {}
    for needed in ("train", "val"):
        if not splits.get(needed):
            raise UserError(f"{where}: no images in split `{needed}`")
    for split, records in splits.items():
        for r in records:
            if r["id"] in seen:
                problems.append(f"image id {r['id']} in {split} occurs in {seen[r['id']]} already")
            seen[r["id"]] = split
            if not r["captions"]:
                problems.append(f"{r['file_name']}: no captions")
            problems += [
                f"{r['file_name']}: an empty caption" for c in r["captions"] if not c.strip()
            ]
    if problems:
        more = f" (and {len(problems) - 20} more)" if len(problems) > 20 else ""
        raise UserError(f"{where}: " + "; ".join(problems[:20]) + more)


# ---------------------------------------------------------------------------------------------
# Embeddings


def own_embeddings(splits: dict[str, list[dict]], cfg: Config) -> dict:
    """Deals out the rows of the user's array to the splits, by file name."""
    try:
        array = np.load(cfg.embeddings, mmap_mode="r")
        names = Path(cfg.embedding_names).read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{error.filename}: no such file") from None
    except ValueError as error:
        raise UserError(f"{cfg.embeddings}: not a .npy array: {error}") from None
    names = names[:-1] if names[-1] == "" else names
    if array.ndim not in (2, 3) or len(array) != len(names):
        raise UserError(f"{cfg.embeddings} has shape {array.shape}, {cfg.embedding_names} has "
                        f"{len(names)} names: one row, (D,) or (P, D), is needed for each")  # fmt: skip
    rows = {name.strip(): i for i, name in enumerate(names)}
    if len(rows) != len(names):
        raise UserError(f"{cfg.embedding_names}: {len(names) - len(rows)} names occur twice")
    array = array[:, None] if array.ndim == 2 else array
    for split, records in splits.items():
        found = [rows.get(r["file_name"], rows.get(Path(r["file_name"]).name)) for r in records]
        missing = [r["file_name"] for r, i in zip(records, found, strict=True) if i is None]
        if missing:
            raise UserError(f"{len(missing)} images of {split} have no row in {cfg.embedding_names}: "
                            f"{', '.join(missing[:5])}")  # fmt: skip
        out = array[found].astype(np.float16)
        if not np.isfinite(out).all():
            bad = records[int((~np.isfinite(out)).any((1, 2)).argmax())]["file_name"]
            raise UserError(f"{cfg.embeddings}: not finite in half precision, first for {bad}")
        with replacing(cfg.data_dir / f"{split}_embeddings.npy") as part, open(part, "wb") as file:
            np.save(file, out)
    kind = "pooled" if array.shape[1] == 1 else "grid"
    return {"encoder": "", "features": kind, "grid": 0, "n_positions": array.shape[1],
            "embedding_dim": array.shape[2]}  # fmt: skip


def encode(splits: dict[str, list[dict]], cfg: Config) -> dict:
    """Encodes the images of each split through CLIP."""
    from PIL import Image

    from encoder import Encoder
    from train import Place

    encoder = Encoder(cfg.clip, cfg.features, cfg.grid, Place(cfg.device, "float32").kind)
    folder = Path(cfg.images) if cfg.images else cfg.data_dir / "images"
    for split, records in splits.items():
        shape = (len(records), encoder.n_positions, encoder.embedding_dim)
        with replacing(cfg.data_dir / f"{split}_embeddings.npy") as part:
            out = np.lib.format.open_memmap(part, "w+", np.float16, shape)
            bar = tqdm(total=len(records), desc=f"encoding {split}", unit="image")
            for i in range(0, len(records), cfg.encode_batch):
                names = [r["file_name"] for r in records[i : i + cfg.encode_batch]]
                out[i : i + len(names)] = encoder([Image.open(folder / n) for n in names]).numpy()
                bar.update(len(names))
            bar.close()
            out.flush()
    return {"encoder": cfg.clip, "features": cfg.features, "grid": cfg.grid,
            "n_positions": encoder.n_positions, "embedding_dim": encoder.embedding_dim}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The tokenizer


def train_tokenizer(captions: list[str], vocab_size: int) -> Tokenizer:
    """A sentencepiece BPE of at most `vocab_size` pieces; small texts have fewer."""
    model = io.BytesIO()
    options = dict(
        model_type="bpe", character_coverage=1.0, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        max_sentence_length=1 << 20, minloglevel=2, num_threads=1,
    )  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=model, vocab_size=vocab_size, **options
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if not most:
            raise UserError(f"vocab_size={vocab_size}: {str(error).strip()}") from None
        print(f"the captions have only {most[1]} pieces: vocab_size {vocab_size} -> {most[1]}")
        return train_tokenizer(captions, int(most[1]))
    return Tokenizer(model.getvalue())


# ---------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    (cfg.data_dir / "meta.json").unlink(missing_ok=True)  # what it describes is about to change
    cfg.data_dir.mkdir(parents=True, exist_ok=True)
    splits = SOURCES[cfg.source](cfg)
    check(splits, cfg)
    made = own_embeddings(splits, cfg) if cfg.embeddings else encode(splits, cfg)
    texts = [c.lower() if cfg.lowercase else c for r in splits["train"] for c in r["captions"]]
    tokenizer = train_tokenizer(texts, cfg.vocab_size)
    with replacing(cfg.data_dir / "tokenizer.model") as part:
        part.write_bytes(tokenizer.model)
    counts = {
        split: write_split(cfg.data_dir, split, records, tokenizer, cfg.lowercase)
        for split, records in splits.items()
    }
    write_meta(cfg.data_dir, {
        "dataset": cfg.dataset, "source": cfg.source, "captions": cfg.captions, "images": cfg.images,
        **made, "normalize": cfg.normalize, "lowercase": cfg.lowercase,
        "vocab_size": len(tokenizer), "pad": tokenizer.pad, "bos": tokenizer.bos,
        "eos": tokenizer.eos, "unk": tokenizer.unk, "splits": counts,
    })  # fmt: skip
    for split, n in counts.items():
        print(f"{split}: {n['images']} images, {n['captions']} captions, {n['tokens']} tokens")
    print(f"wrote {cfg.data_dir}/")


if __name__ == "__main__":
    run(main, configure(Config, sys.argv[1:], __doc__))
