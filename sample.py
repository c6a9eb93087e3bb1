"""Caption a dataset's split, or any image files and folders, with a trained checkpoint.

    python sample.py --ckpt out/shapes/ckpt.pt --split test --method beam
    python sample.py --ckpt out/coco/ckpt.pt --image photo.jpg another.png folder/
    python sample.py --ckpt out/coco/ckpt.pt --image dog.jpg --method sample --top_p 0.9 --n_best 5
    python sample.py --ckpt out/coco/ckpt.pt --method nearest  # the floor: borrowed captions

On a split it writes predictions.json (COCO's result format) and predictions.csv, and prints the
scores as one line of JSON, last. Results are saved as they come: rerun the same command to resume
an interrupted one; it ends with the same files.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before what takes seconds
import contextlib
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gallery
import metrics
from configurator import ConfigError, configure, one_of, within
from data import Meta, Split
from decode import Caption, Decoding, generate, load_captioner
from parts.common import UserError, append, owning, printable, run, sha256, write_text
from parts.device import Device, lay_out_by_columns
from parts.neighbours import ImageText, Neighbours
from parts.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Decoding):
    METHODS = f"{Decoding.METHODS} nearest"
    # -- what -----------------------------------------------------------------------------
    ckpt: str  # a checkpoint that train.py wrote, or a folder that parts/export.py wrote
    split: str = ""  # caption this split, and score the captions; empty, without image: val
    image: tuple[str, ...] = ()  # or these image files, and all images in these folders
    data: str = ""  # the dataset directory; empty: the one that the checkpoint was trained on
    other_dataset: bool = False  # caption a split of a dataset that it was not trained on
    images: str = ""  # folder of the split's images, for the gallery; empty: prepare.py's
    clip: str = ""  # the encoder's name or folder; empty: the checkpoint's
    prompt: str = ""  # text that every caption continues
    # -- choosing among captions ----------------------------------------------------------
    # --method=nearest borrows a caption of the nearest training images; --rerank orders n_best by
    # how well each agrees with the others, the captions of those images, or the image
    neighbours: int = 20  # nearest training images
    rerank: str = "none"  # none consensus neighbours clip
    rerank_weight: float = 0.0  # of log p, which is added to the agreement
    tokens: str = "words"  # what agreement and scores count: words characters
    clip_score: bool = False  # score by CLIP too
    # -- where to -------------------------------------------------------------------------
    out_json: str = ""  # empty: predictions.json in a folder of the split next to the checkpoint
    out_csv: str = ""  # empty: the same with .csv
    gallery: bool = False  # write gallery.html too, next to out_json or else here
    attention: bool = False  # keep, for the gallery, how each token attends to the prefix
    # -- run ------------------------------------------------------------------------------
    batch_size: int = 64  # images decoded at a time
    workers: int = 2  # threads that read image files
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "float32"  # of autocast: auto bfloat16 float16 float32
    java: bool = False  # score with the COCO toolkit's Java tokenizer too, not only its METEOR
    track: str = "none"  # add the gallery to the checkpoint's tracked run: none mlflow

    def __post_init__(self):
        super().__post_init__()
        within(self, "batch_size", 1)
        within(self, "workers", 0)
        one_of(self, "dtype", "auto bfloat16 float16 float32")
        one_of(self, "track", "none mlflow")
        one_of(self, "tokens", "words characters")
        one_of(self, "rerank", "none consensus neighbours clip")
        within(self, "neighbours", 1, 1000)
        within(self, "rerank_weight", 0)
        if self.split and self.image:
            raise ConfigError("give either --split=<name> or --image <files and folders>")
        if not self.image and not self.split:
            object.__setattr__(self, "split", "val")  # the class is frozen
        borrows = self.method == "nearest" or self.rerank == "neighbours"
        if borrows and self.split == "train":
            raise ConfigError("split `train` lends its captions: choose another split", "split")
        if self.method == "nearest" and (self.prompt or self.attention):
            raise ConfigError("prompt and attention do nothing with --method=nearest", "method")
        shown = self.split or self.gallery or self.out_json
        for name, useless, needed in (
            ("rerank", self.rerank != "none" and self.n_best == 1, "--n_best=2 or more"),
            ("rerank_weight", self.rerank_weight and self.rerank == "none", "--rerank"),
            ("neighbours", self.neighbours != 20 and not borrows, "--rerank=neighbours"),
            ("java", self.java and not self.split, "--split"),
            ("track", self.track != "none" and not self.gallery, "--gallery"),
            ("attention", self.attention and not shown, "--gallery or --out_json"),
        ):
            if useless:
                raise ConfigError(f"{name}: does nothing without {needed}", name)


def main(cfg: SampleConfig) -> dict:
    """Caption what `cfg` names. Return the scores, empty for images without references."""
    if cfg.java and (missing := metrics.java_missing(cfg.tokens)):
        raise UserError(missing)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("sample.py runs as one process, not under torchrun")
    exported = Path(cfg.ckpt) / "model.safetensors"
    if exported.is_file():
        cfg = replace(cfg, ckpt=str(exported))
    out = output_path(cfg)
    with contextlib.ExitStack() as stack:
        for path in filter(None, (out, cfg.out_csv)):
            stack.enter_context(owning(Path(f"{path}.lock"), f"sample.py is writing {path}"))
        return caption_and_score(cfg, out)


def caption_and_score(cfg: SampleConfig, out: Path | None) -> dict:
    """Do what `main` does, when it owns the output files."""
    tracker = Tracker(cfg.track, {}, Path(cfg.ckpt).parent, "", resume=True)
    captioner = Captioner(cfg)
    source = SplitSource(cfg, captioner) if cfg.split else FileSource(cfg, captioner)
    results = Results(out, captioner.signature() | source.signature())
    first = len(results.entries)
    if first:
        print(f"resuming after {first} images in {results.path}")
    begin = time.perf_counter()
    caption_all(cfg, captioner, source, results)
    seconds = time.perf_counter() - begin

    # -- score and write
    predictions = [entry for entry in results.entries if "skipped" not in entry]
    skipped = [entry["skipped"] for entry in results.entries if "skipped" in entry]
    scored = cfg.split and any(p["references"] for p in predictions)
    scores = score(predictions, cfg, captioner.data / "train.json") if scored else {}
    for line in [*skipped, *source.others]:
        print(printable(f"skipped {line}"), file=sys.stderr)
    write_files(cfg, out, predictions)
    results.finish()
    if cfg.gallery and predictions:
        title = f"{captioner.meta.dataset} {cfg.split}".strip()
        write_gallery((out or Path("predictions.json")).parent, predictions, title, tracker)
    new = sum("skipped" not in entry for entry in results.entries[first:])
    print(
        f"{len(predictions)} images, {new / seconds:.1f} captions/s, {cfg.method} on "
        f"{captioner.device.torch_device}"
    )
    if cut := sum(p.get("cut", False) for p in predictions):
        print(f"{cut} of {len(predictions)} captions were cut before their end: raise --max_len")
    if scores:
        print(json.dumps({"split": cfg.split, "images": len(predictions), **scores}))
    if skipped:
        raise UserError(f"{len(skipped)} of {len(source.items)} images could not be read")
    return scores


def caption_all(cfg: SampleConfig, captioner: "Captioner", source, results: "Results") -> None:
    """Caption the items that have no results yet, a batch at a time."""
    done, items = len(results.entries), source.items
    batches = [items[i : i + cfg.batch_size] for i in range(done, len(items), cfg.batch_size)]
    disable = None if cfg.split else True  # image files have a line each instead
    bar = tqdm(total=len(items), initial=done, unit="image", disable=disable)
    for batch, (embeddings, bad) in zip(batches, source.embeddings(batches), strict=True):
        readable = [item for i, item in enumerate(batch) if i not in bad]
        made = captioner.caption(embeddings, readable)
        if cfg.clip_score and made:
            captioner.add_clip_scores(embeddings, made)
        predictions = iter(made)
        entries = []
        for i, item in enumerate(batch):
            if i in bad:
                entries.append({"skipped": f"{item['path']}: {bad[i]}"})
                continue
            prediction = next(predictions)
            entries.append(prediction)
            if cfg.image:
                for caption in prediction.get("n_best", [prediction]):
                    print(printable(f"{item['path']}: {caption['caption']}"))
        results.add(entries)
        bar.update(len(batch))
    bar.close()


# ---------------------------------------------------------------------------------------------
# From embeddings to captions


class Captioner:
    """A checkpoint, ready to caption."""

    def __init__(self, cfg: SampleConfig):
        self.cfg = cfg
        self.model, self.tokenizer, content = load_captioner(cfg.ckpt)
        self.meta = Meta.from_dict(content["meta"], f"{cfg.ckpt}: meta")
        trained_on = content["config"].get("data") or f"data/{self.meta.dataset}"
        self.data = Path(cfg.data or str(trained_on))
        self.device = Device(cfg.device, cfg.dtype)
        lay_out_by_columns(self.model)
        self.model.to(self.device.torch_device)
        if cfg.method == "nearest" or cfg.rerank in ("consensus", "neighbours"):
            training = fitting_split(cfg, self.meta, self.data, "train")
            _, captions = training.references()
            strings = metrics.token_strings(captions, tokens=cfg.tokens)
            self.cider = metrics.CiderD(strings, tokenize=str.split)
            if cfg.rerank != "consensus":
                lenders = training.embeddings, captions, strings
                self.neighbours = Neighbours(*lenders, cfg.neighbours)
        if cfg.rerank == "clip" or cfg.clip_score:
            self.clip = ImageText(self.meta, cfg.clip, self.device.torch_device)

    def signature(self) -> dict:
        """Return all that the captions depend on, besides the images."""
        cfg = self.cfg
        return {
            "ckpt": sha256(Path(cfg.ckpt)),
            "decoding": {f.name: getattr(cfg, f.name) for f in fields(Decoding)},
            "prompt": cfg.prompt,
            "attention": cfg.attention,
            "rerank": [cfg.rerank, cfg.rerank_weight, cfg.neighbours, cfg.tokens],
            "clip_score": cfg.clip_score,
            "device": str(self.device.torch_device),
            "dtype": str(self.device.dtype),
        }

    def caption(self, embeddings: torch.Tensor, items: list[dict]) -> list[dict]:
        """Return predictions of images from their embeddings (B, P, D)."""
        if not items:
            return []
        embeddings = embeddings.to(self.device.torch_device)
        numbers = [item["number"] for item in items]
        if self.cfg.method == "nearest":
            borrowed = self.neighbours.borrow(embeddings)
            best = [texts[self.cider.agreement(strings).argmax()] for texts, strings in borrowed]
            return [self.entry(*each) for each in zip(items, best, strict=True)]
        with self.device.autocast():
            captions = generate(
                self.model, embeddings, self.tokenizer, self.cfg, self.cfg.prompt, numbers,
                self.meta.longest_caption,
            )  # fmt: skip
        if self.cfg.rerank != "none":
            captions = self.rerank(embeddings, items, captions)
        attention = [None] * len(items)
        if self.cfg.attention:
            attention = self.attention(embeddings, [best.ids for best, *_ in captions])
        return [self.prediction(*each) for each in zip(items, captions, attention, strict=True)]

    def rerank(self, embeddings, items, captions: list[list[Caption]]) -> list[list[Caption]]:
        """Return each image's captions in the order of agreement + rerank_weight * log p."""
        texts = [[self.tokenizer.decode(caption.ids) for caption in own] for own in captions]
        strings = metrics.token_strings(texts, tokens=self.cfg.tokens)
        if self.cfg.rerank == "clip":
            images = self.clip.images(embeddings, [item["path"] for item in items])
            pairs = zip(texts, images, strict=True)
            agreement = [self.clip.texts(own) @ image for own, image in pairs]
        elif self.cfg.rerank == "neighbours":
            pairs = zip(strings, self.neighbours.borrow(embeddings), strict=True)
            agreement = [self.cider.agreement(own, borrowed) for own, (_, borrowed) in pairs]
        else:
            agreement = [self.cider.agreement(own) for own in strings]
        ranked = []
        for own, values in zip(captions, agreement, strict=True):
            logprobs = np.array([caption.logprob for caption in own])
            order = np.argsort(-values - self.cfg.rerank_weight * logprobs, kind="stable")
            ranked.append([own[i] for i in order])
        return ranked

    def add_clip_scores(self, embeddings: torch.Tensor, predictions: list[dict]) -> None:
        """Add CLIPScore and, if there are references, RefCLIPScore to each prediction."""
        images = self.clip.images(embeddings, [p["path"] for p in predictions])
        for image, p in zip(images, predictions, strict=True):
            texts = self.clip.texts([p["caption"], *p["references"]])
            p["scores"] = metrics.clip_score(image, texts[0], texts[1:])

    def entry(self, item: dict, caption: str) -> dict:
        """Return an entry of predictions.json: COCO's two keys, and what is known of the image."""
        entry = {"image_id": item["image_id"], "caption": caption}
        entry |= {name: item[name] for name in ("file_name", "path", "references")}
        if item.get("facts"):
            entry["facts"] = {"true": item["facts"]}
        return entry

    def prediction(self, item: dict, captions: list[Caption], attention) -> dict:
        """Return an entry with what the gallery shows of the model's captions."""
        texts = [self.tokenizer.decode(caption.ids) for caption in captions]
        entry = self.entry(item, texts[0])
        entry["tokens"] = self.tokenizer.pieces(captions[0].ids)
        entry["logprobs"] = [round(logprob, 4) for logprob in captions[0].logprobs]
        if not captions[0].ended:
            entry["cut"] = True
        if len(captions) > 1:
            entry["n_best"] = [
                {"caption": text, "logprob": round(caption.logprob, 4)}
                for text, caption in zip(texts, captions, strict=True)
            ]
        if attention is not None:
            entry["attention"] = attention
            entry["grid"] = math.isqrt(self.meta.n_positions) if self.model.cfg.is_grid else 0
        return entry

    def attention(self, embeddings: torch.Tensor, captions: list[list[int]]) -> list[list]:
        """Return, for each caption's tokens, the weights of the P prefix positions."""
        longest = max(1, *map(len, captions))
        tokens = torch.full((len(captions), longest), self.tokenizer.bos)
        for row, ids in zip(tokens, captions, strict=True):
            row[1 : len(ids)] = torch.tensor(ids[:-1])
        weights = self.model.prefix_attention(embeddings, tokens.to(embeddings.device))
        return [
            [[round(weight, 4) for weight in token] for token in row[: len(ids)]]
            for row, ids in zip(weights.tolist(), captions, strict=True)
        ]


# ---------------------------------------------------------------------------------------------
# What is captioned: items with number, image_id, file_name, path and references


def fitting_split(cfg: SampleConfig, meta: Meta, folder: Path, name: str) -> Split:
    """Return a split of a dataset. Raise UserError if it does not fit the checkpoint, or if the
    checkpoint was trained on another dataset: that may have had these images in training."""
    split = Split(folder, name)
    if differences := meta.differences(split.meta):
        raise UserError(f"{folder} does not fit {cfg.ckpt}: it has {differences}")
    if not cfg.other_dataset:
        hint = "add --other_dataset to caption this one all the same"
        split.meta.refuse_other(meta, cfg.ckpt, hint)
    return split


class SplitSource:
    """The images of a dataset's split."""

    others = ()  # files that are no images

    def __init__(self, cfg: SampleConfig, captioner: Captioner):
        self.split = fitting_split(cfg, captioner.meta, captioner.data, cfg.split)
        folder = cfg.images or self.split.meta.images or str(self.split.folder / "images")
        self.folder = Path(folder.replace("{split}", cfg.split))
        images, references = self.split.references()
        self.items = []
        for number, (image, captions) in enumerate(zip(images, references, strict=True)):
            path = self.folder / image["file_name"]
            item = {"number": number, "image_id": image["id"], "file_name": image["file_name"]}
            item["path"] = str(path) if path.is_file() else ""
            self.items.append(item | {"references": captions, "facts": image.get("facts")})

    def signature(self) -> dict:
        images = str(self.folder)
        return {"data": self.split.meta.files, "split": self.split.name, "images": images}

    def embeddings(self, batches: list[list[dict]]) -> Iterator[tuple[torch.Tensor, dict]]:
        """Yield the embeddings of each batch, and the reason for each image that has none."""
        for batch in batches:
            yield self.split.embedding(np.array([item["number"] for item in batch])), {}


class FileSource:
    """Image files, through the checkpoint's encoder. Raises UserError if that does not fit."""

    def __init__(self, cfg: SampleConfig, captioner: Captioner):
        from parts.encoder import Encoder, find_images

        self.cfg, meta = cfg, captioner.meta
        files, self.others = find_images(cfg.image)
        # Names below the one folder that was given, or as given: no two images have the same.
        folder = f"{Path(cfg.image[0])}/" if len(cfg.image) == 1 else ""
        self.items = [
            {"number": i, "image_id": i, "file_name": path.removeprefix(folder), "path": path,
             "references": []}
            for i, path in enumerate(map(str, files))
        ]  # fmt: skip
        if not meta.encoder:
            raise UserError(
                f"{cfg.ckpt} was trained on embeddings of your own, which no encoder here can "
                f"make: use --split"
            )
        self.encoder = Encoder(
            cfg.clip or meta.encoder, meta.features, meta.grid, captioner.device.torch_device
        )
        gives = f"{self.encoder.n_positions} x {self.encoder.embedding_dim} ({self.encoder.kind})"
        needs = f"{meta.n_positions} x {meta.embedding_dim} ({meta.encoder_kind})"
        if gives != needs:
            raise UserError(
                f"{self.encoder.name} gives {meta.features} embeddings of {gives}, "
                f"{cfg.ckpt} needs {needs}, from {meta.encoder}"
            )

    def signature(self) -> dict:
        paths = [item["path"] for item in self.items]
        stats = [os.stat(path) for path in paths if os.path.exists(path)]
        made = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        return {"encoder": self.encoder.digest(), "images": paths, "made": made}

    def embeddings(self, batches: list[list[dict]]) -> Iterator[tuple[torch.Tensor, dict]]:
        """Yield the embeddings of each batch, and the reason for each file that has none."""
        files = [[(item["path"],) for item in batch] for batch in batches]
        return self.encoder.stream(files, workers=min(self.cfg.workers, max(0, len(files) - 1)))


# ---------------------------------------------------------------------------------------------
# Results


class Results:
    """Entries in the items' order, saved next to `out` as they come; not saved if it is None.

    signature: what they depend on. Saved entries of another signature are not resumed.
    """

    def __init__(self, out: Path | None, signature: dict):
        self.entries: list[dict] = []
        self.path = None
        if not out:
            return
        self.path = out.with_name(f"{out.name}.partial.jsonl")
        header = json.dumps(signature, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else [""]
        if lines[0] == header:
            with contextlib.suppress(ValueError):  # a torn line and what follows is made again
                for line in lines[1:-1]:
                    self.entries.append(json.loads(line))
        saved = [header, *map(json.dumps, self.entries)]
        write_text(self.path, "".join(f"{line}\n" for line in saved))

    def add(self, entries: list[dict]) -> None:
        self.entries += entries
        if self.path:
            append(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))

    def finish(self) -> None:
        """Delete the saved entries: the output files hold them now."""
        if self.path:
            self.path.unlink()


def score(predictions: list[dict], cfg: SampleConfig, training: Path) -> dict:
    """Return the results line of all captions; add each one's own scores to its prediction.

    training: annotations of the training captions, if there are any, which are not novel.
    """
    hypotheses = {p["image_id"]: p["caption"] for p in predictions}
    references = {p["image_id"]: p["references"] for p in predictions}
    known = []
    if training.is_file():
        captions, _ = metrics.read_references(training)
        known = metrics.token_strings(captions.values(), tokens=cfg.tokens)
    options = {"java": cfg.java, "tokens": cfg.tokens}
    scores, per_image = metrics.evaluate(hypotheses, references, known, **options)
    for name in predictions[0].get("scores", {}):  # CLIP's
        scores[name] = float(np.mean([p["scores"][name] for p in predictions]))
    for p in predictions:
        own = per_image[p["image_id"]]
        three = {"bleu": own["Bleu_4"], "rouge_l": own["ROUGE_L"], "cider": own["CIDEr"]}
        p["scores"] = three | p.get("scores", {})
    if cfg.rerank != "none":
        scores["rerank"] = f"{cfg.rerank} + {cfg.rerank_weight} log p"
    if all("facts" in p for p in predictions):
        from parts import shapes  # the built-in scenes, whose facts are known

        for p in predictions:
            stated = sorted(shapes.stated_facts(p["caption"]))
            p["facts"] = {"stated": stated, "true": p["facts"]["true"]}
        true_facts = [p["facts"]["true"] for p in predictions]
        scores["facts"] = shapes.score_facts(list(hypotheses.values()), true_facts)
    return scores


def output_path(cfg: SampleConfig) -> Path | None:
    """Return where predictions.json goes, None if nowhere. Raise UserError for a folder."""
    for path in (cfg.out_json, cfg.out_csv):
        if path and Path(path).is_dir():
            raise UserError(f"{path} is a folder: give the name of a file")
    if cfg.split and not cfg.out_json:
        return Path(cfg.ckpt).parent / cfg.split / "predictions.json"
    return Path(cfg.out_json) if cfg.out_json else None


def write_files(cfg: SampleConfig, out: Path | None, predictions: list[dict]) -> None:
    """Write predictions.json and .csv, as far as they are asked for."""
    files = {}
    if out:
        files[out] = json.dumps(predictions)
    if out or cfg.out_csv:
        files[cfg.out_csv or out.with_suffix(".csv")] = as_csv(predictions)
    for path, text in files.items():
        write_text(path, text)
    if files:
        print(f"wrote {' and '.join(map(str, files))}")


def as_csv(predictions: list[dict]) -> str:
    """Return a table: ids, captions, references, and each caption's scores."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("bleu", "rouge_l", "cider")
    writer.writerow(("image_id", "file_name", "caption", "references", *columns))
    for p in predictions:
        values = [p.get("scores", {}).get(name) for name in columns]
        figures = ["" if value is None else f"{value:.4f}" for value in values]
        references = " | ".join(p["references"])
        writer.writerow([p["image_id"], p["file_name"], p["caption"], references, *figures])
    # File names that are not UTF-8 hold surrogates, which cannot be written.
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def write_gallery(folder: Path, predictions: list[dict], title: str, tracker: Tracker) -> None:
    """Write gallery.html, and add it to the tracked run of the checkpoint."""
    page = folder / "gallery.html"
    missing = gallery.write(predictions, page, title=title)
    print(f"wrote {page}" + (f", {len(missing)} images not found" if missing else ""))
    tracker.artifact(page)
    tracker.close()


if __name__ == "__main__":
    run(lambda: main(configure(SampleConfig, sys.argv[1:], __doc__, files=False)))
