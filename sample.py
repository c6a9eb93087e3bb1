"""Captions a dataset's split, or any image files and folders, with a trained checkpoint.

    python sample.py --ckpt out/shapes/ckpt.pt --split test --method beam
    python sample.py --ckpt out/coco/ckpt.pt --image photo.jpg another.png folder/
    python sample.py --ckpt out/coco/ckpt.pt --image dog.jpg --method sample --top_p 0.9 --n_best 5

On a split it writes predictions.json (COCO's result format) and predictions.csv, and prints the
scores as one line of JSON, last. What is done is kept as it goes: interrupted, the same command
goes on where it stopped and ends with the same files.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import gallery
import metrics
import shapes
from configurator import ConfigError, UserError, configure, one_of, printable, run, within
from data import Split, append, write_text
from decode import Decoding, generate
from track import Tracker
from train import Place

# ---------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class SampleConfig:
    # -- what -----------------------------------------------------------------------------
    ckpt: str  # a checkpoint that train.py wrote
    split: str = ""  # caption this split of the checkpoint's dataset, and score the captions
    image: tuple[str, ...] = ()  # or these image files, and all images in these folders
    data: str = ""  # the dataset directory; empty: data/<the checkpoint's dataset>
    images: str = ""  # folder of the split's images, for the gallery; empty: as prepare.py had it
    clip: str = ""  # where the encoder lies; empty: as the checkpoint names it
    # -- how ------------------------------------------------------------------------------
    method: str = "greedy"  # greedy, sample (temperature, top-k, top-p) or beam
    n_best: int = 1  # captions an image: its best beams, or so many samples
    beams: int = 5  # beam: hypotheses kept per image
    length_penalty: float = 0.0  # beam: scores are log p / length ** length_penalty
    temperature: float = 1.0  # sample: below 1 sharpens, above 1 flattens
    top_k: int = 0  # sample: only from the k likeliest tokens, 0 = all
    top_p: float = 1.0  # sample: only from the likeliest that together reach p
    min_len: int = 1  # tokens of a caption at least
    max_len: int = 0  # and at most; 0: as many as the model has room for, at most 40
    no_repeat_ngram: int = 0  # no n tokens in a row occur twice, 0 = off
    prompt: str = ""  # text that every caption continues
    seed: int = 0  # of sampling
    # -- where to -------------------------------------------------------------------------
    out_json: str = ""  # empty: predictions.json in a folder of the split beside the checkpoint
    out_csv: str = ""  # empty: the same with .csv
    gallery: bool = False  # write gallery.html beside out_json too, or here if that is not given
    attention: bool = False  # keep, for the gallery, which prefix each token attends to
    # -- run ------------------------------------------------------------------------------
    batch_size: int = 64  # images decoded at a time
    workers: int = 2  # threads that read image files
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "float32"  # of autocast: auto bfloat16 float16 float32
    java: bool = False  # score with the COCO toolkit's Java tokenizer too, not only its METEOR
    track: str = "none"  # add the gallery to the tracked run of the checkpoint: none mlflow

    def __post_init__(self):
        within(self, "batch_size", 1, 10**6)
        within(self, "max_len", 0, 10**6)
        within(self, "workers", 0, 1000)
        one_of(self, "dtype", "auto bfloat16 float16 float32")
        one_of(self, "track", "none mlflow")
        if bool(self.split) == bool(self.image):
            raise ConfigError("give either --split=<name> or --image <files and folders>")
        shown = self.split or self.gallery or self.out_json
        for name, idle, needed in (
            ("java", self.java and not self.split, "--split"),
            ("track", self.track != "none" and not self.gallery, "--gallery"),
            ("attention", self.attention and not shown, "--gallery or --out_json"),
        ):
            if idle:
                raise ConfigError(f"{name}: does nothing without {needed}")

    def decoding(self, room: int) -> Decoding:
        own = {f.name: getattr(self, f.name) for f in fields(Decoding)}
        return Decoding(**(own | {"max_len": self.max_len or min(40, room)}))


# ---------------------------------------------------------------------------------------------
# What is captioned: each item has "image_id", "file_name", "path", and for a split "references"


def split_items(cfg: SampleConfig, meta: dict) -> tuple[list[dict], Split]:
    split = Split(Path(cfg.data or f"data/{meta['dataset']}"), cfg.split)
    keys = ("encoder", "features", "grid", "n_positions", "embedding_dim")
    ours, theirs = ({k: m[k] or f"no {k}" for k in keys} for m in (meta, split.meta))
    if ours != theirs:
        differ = [f"{k} {theirs[k]}, not {ours[k]}" for k in ours if ours[k] != theirs[k]]
        raise UserError(f"{split.folder} does not fit {cfg.ckpt}: it has {'; '.join(differ)}")
    folder = cfg.images or split.meta["images"] or str(split.folder / "images")
    folder = Path(folder.replace("{split}", cfg.split))
    images, references = split.references()
    items = []
    for image, captions in zip(images, references, strict=True):
        path = folder / image["file_name"]
        items.append(
            {"image_id": image["id"], "file_name": image["file_name"],
             "path": str(path) if path.is_file() else "", "references": captions,
             "true_facts": image.get("facts")}
        )  # fmt: skip
    return items, split


def image_items(cfg: SampleConfig) -> list[dict]:
    from encoder import find_images

    return [{"image_id": i, "file_name": p.name, "path": str(p), "references": []}
            for i, p in enumerate(find_images(cfg.image))]  # fmt: skip


def open_encoder(cfg: SampleConfig, meta: dict, device: str):
    """The checkpoint's encoder. Raises UserError where width or kind are not what it needs."""
    from encoder import Encoder

    if not meta["encoder"]:
        raise UserError(
            f"{cfg.ckpt} was trained on embeddings of your own, which no encoder here "
            f"makes: use --split"
        )
    encoder = Encoder(cfg.clip or meta["encoder"], meta["features"], meta["grid"], device)
    have = f"{encoder.n_positions} x {encoder.embedding_dim} ({encoder.kind})"
    need = f"{meta['n_positions']} x {meta['embedding_dim']} ({meta['encoder_kind']})"
    if have != need:
        raise UserError(
            f"{encoder.name} gives {meta['features']} embeddings of {have}, "
            f"{cfg.ckpt} needs {need} as of {meta['encoder']}"
        )
    return encoder


# ---------------------------------------------------------------------------------------------
# Progress that survives an interruption


class Partial:
    """Finished predictions, and files that could not be read, one JSON a line and in the items'
    order, below a line that says of what run they are."""

    def __init__(self, path: Path, run: dict):
        self.path, self.done = path, []
        header = json.dumps(run, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        if lines and lines[0] == header:
            with contextlib.suppress(ValueError):  # a torn line and what follows it is done again
                for line in lines[1:]:
                    self.done.append(json.loads(line))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{x}\n" for x in [header, *map(json.dumps, self.done)]))

    def add(self, predictions: list[dict]) -> None:
        self.done += predictions
        append(self.path, "".join(json.dumps(p) + "\n" for p in predictions))

    def finish(self) -> None:
        self.path.unlink()


# ---------------------------------------------------------------------------------------------
# From captions to files


def as_prediction(item: dict, found: list, tokenizer, maps, grid: int) -> dict:
    """An entry of predictions.json: COCO's two keys, and what the gallery shows."""
    texts, best = [tokenizer.decode(c.ids) for c in found], found[0]
    row = {"image_id": item["image_id"], "caption": texts[0]}
    row |= {k: item[k] for k in ("file_name", "path", "references")}
    row["tokens"] = [tokenizer.sp.id_to_piece(i) for i in best.ids]
    row["logprobs"] = [round(p, 4) for p in best.logprobs]
    if len(found) > 1:
        row["n_best"] = [{"caption": t, "logprob": round(c.logprob, 4)}
                         for t, c in zip(texts, found, strict=True)]  # fmt: skip
    if item.get("true_facts"):
        row["facts"] = {"stated": sorted(shapes.stated(texts[0])), "true": item["true_facts"]}
    if maps is not None:
        row["attention"] = [[round(w, 4) for w in token] for token in maps]
        row["grid"] = grid
    return row


def score(predictions: list[dict], java: bool) -> dict:
    """Corpus scores; each prediction gets its own under "scores"."""
    hypotheses = {p["image_id"]: p["caption"] for p in predictions}
    references = {p["image_id"]: p["references"] for p in predictions}
    meteor = metrics.java_missing() is None
    corpus, per_image = metrics.score(hypotheses, references, java=java, meteor=meteor)
    for p in predictions:
        own = per_image[p["image_id"]]
        p["scores"] = {"bleu": own["Bleu_4"], "rouge_l": own["ROUGE_L"], "cider": own["CIDEr"]}
    if all("facts" in p for p in predictions):
        captions = [p["caption"] for p in predictions]
        corpus["facts"] = shapes.score_facts(captions, [p["facts"]["true"] for p in predictions])
    corpus["signature"] = metrics.signature(hypotheses, references, java=java, meteor=meteor)
    return corpus


def as_csv(predictions: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image_id", "file_name", "caption", "references", "bleu", "rouge_l", "cider"))
    for p in predictions:
        own = p.get("scores", {})
        cells = [f"{own[k]:.4f}" if own else "" for k in ("bleu", "rouge_l", "cider")]
        writer.writerow(
            [p["image_id"], p["file_name"], p["caption"], " | ".join(p["references"]), *cells]
        )
    return text.getvalue().encode("utf-8", "backslashreplace").decode()  # of names in other bytes


@torch.inference_mode()
def attention_maps(model, embeddings, captions: list[list[int]], bos: int) -> list:
    """For each caption, (t, P): how the last layer's heads, on average, look at the prefix when
    they choose each token; the rest of each row's 1 goes to the caption itself."""
    maps = []
    for embedding, ids in zip(embeddings, captions, strict=True):
        tokens = torch.tensor([[bos, *ids[:-1]]], device=embeddings.device)
        where = torch.arange(tokens.size(1), device=tokens.device)[None]
        seen: list = []
        layer = model.transformer.h[-1].attn
        handle = layer.c_attn.register_forward_hook(lambda _, args, out: seen.append(out))  # noqa: B023
        model.hidden(embedding[None], tokens, torch.ones_like(tokens), where)
        handle.remove()
        q, k, _ = seen[0][0].float().unflatten(-1, (3, layer.n_head, -1)).permute(1, 2, 0, 3)
        P, T = model.cfg.prefix_length, q.size(1)
        scores = (q @ k.transpose(1, 2)) / q.size(-1) ** 0.5  # (nh, T, T)
        causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1).mean(0)
        maps.append(weights[P : P + len(ids), :P].tolist())
    return maps


# ---------------------------------------------------------------------------------------------


def main(cfg: SampleConfig) -> dict:
    """Captions what `cfg` names. Returns the scores, empty for images without references."""
    if cfg.java and (missing := metrics.java_missing()):
        raise UserError(missing)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("sample.py runs as one process, not under torchrun")
    content = checkpoint.load(cfg.ckpt)
    model, tokenizer = checkpoint.build(content, cfg.ckpt)
    place, meta = Place(cfg.device, cfg.dtype), content["meta"]
    model.to(place.device)
    side = 0 if meta["features"] == "pooled" else math.isqrt(meta["n_positions"])
    decoding = cfg.decoding(model.cfg.block_size - model.cfg.prefix_length)
    prompt = cfg.prompt.lower() if meta["lowercase"] else cfg.prompt
    if cfg.split:
        items, split = split_items(cfg, meta)
        out = Path(cfg.out_json or Path(cfg.ckpt).parent / cfg.split / "predictions.json")
    else:
        items, encoder = image_items(cfg), open_encoder(cfg, meta, place.kind)
        out = Path(cfg.out_json) if cfg.out_json else None

    for path in filter(None, (out, cfg.out_csv)):
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder: give the name of a file")
    partial, done = None, []
    if out:
        weights = hashlib.sha256(Path(cfg.ckpt).read_bytes()).hexdigest()
        partial = Partial(
            out.with_name(out.name + ".partial.jsonl"),
            {"ckpt": weights, "decoding": asdict(decoding), "prompt": prompt,
             "attention": cfg.attention, "items": [i["path"] or i["file_name"] for i in items],
             "dtype": str(place.dtype), "clip": cfg.clip,
             "data": split.meta["files"] if cfg.split else None},
        )  # fmt: skip
        if done := partial.done:
            print(f"going on after {len(done)} images that {partial.path} holds")
    first, begin = len(done), time.perf_counter()
    batches = [range(i, min(i + cfg.batch_size, len(items)))
               for i in range(first, len(items), cfg.batch_size)]  # fmt: skip
    if cfg.split:
        stream = ((split.embedding(np.array(batch)), {}) for batch in batches)
    else:
        files = [[(items[i]["path"],) for i in batch] for batch in batches]
        stream = encoder.stream(files, workers=max(0, min(cfg.workers, len(batches) - 1)))
    bar = tqdm(total=len(items), initial=first, unit="image", disable=None if cfg.split else True)
    for batch, (embeddings, bad) in zip(batches, stream, strict=True):
        good = [i for n, i in enumerate(batch) if n not in bad]
        embeddings = embeddings.to(place.device)
        with place.autocast():
            found = generate(model, embeddings, tokenizer, decoding, prompt, good) if good else []
        maps = [None] * len(good)
        if cfg.attention:
            maps = attention_maps(model, embeddings, [f[0].ids for f in found], tokenizer.bos)
        new = {batch[n]: {"skipped": f"{items[batch[n]]['path']}: {why}"} for n, why in bad.items()}
        for i, captions, seen in zip(good, found, maps, strict=True):
            new[i] = as_prediction(items[i], captions, tokenizer, seen, side)
            if cfg.image:
                for n in new[i].get("n_best", [new[i]]):
                    print(printable(f"{items[i]['path']}: {n['caption']}"))
        (partial.add if partial else done.extend)([new[i] for i in batch])
        bar.update(len(batch))
    bar.close()
    took = time.perf_counter() - begin
    rate = sum("skipped" not in p for p in done[first:]) / took
    predictions = [p for p in done if "skipped" not in p]
    skipped = [p["skipped"] for p in done if "skipped" in p]

    scores: dict = {}
    if cfg.split:
        scores = score(predictions, cfg.java)
    for line in skipped:
        print(printable(f"skipped {line}"), file=sys.stderr)
    if out:
        write_text(out, json.dumps(predictions))
        table = Path(cfg.out_csv or out.with_suffix(".csv"))
        write_text(table, as_csv(predictions))
        partial.finish()
        print(f"wrote {out} and {table}")
    elif cfg.out_csv:
        write_text(cfg.out_csv, as_csv(predictions))
        print(f"wrote {cfg.out_csv}")
    if cfg.gallery and predictions:
        page = (out or Path("predictions.json")).with_name("gallery.html")
        missing = gallery.write(predictions, page, title=f"{meta['dataset']} {cfg.split}".strip())
        print(f"wrote {page}" + (f", {len(missing)} images not found" if missing else ""))
        tracker = Tracker(cfg.track, {}, Path(cfg.ckpt).parent, "", resume=True)
        tracker.artifact(page)
        tracker.close()
    print(f"{len(predictions)} images, {rate:.1f} captions/s, {cfg.method} on {place.device}")
    if scores:
        print(json.dumps({"split": cfg.split, "images": len(predictions), **scores}))
    if skipped:
        raise UserError(f"{len(skipped)} of {len(items)} images could not be read")
    return scores


if __name__ == "__main__":
    run(main, configure(SampleConfig, sys.argv[1:], __doc__, files=False))
