"""Caption a dataset's split, or any image files and folders, with a trained checkpoint.

    python sample.py --ckpt out/shapes/ckpt.pt --split test --method beam
    python sample.py --ckpt out/coco/ckpt.pt --image photo.jpg another.png folder/
    python sample.py --ckpt out/coco/ckpt.pt --image dog.jpg --method sample --top_p 0.9 --n_best 5

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
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import gallery
import metrics
from configurator import ConfigError, configure, one_of, within
from data import Meta, Split
from decode import Caption, Decoding, generate, load_captioner
from parts import checkpoint
from parts.common import UserError, append, owning, printable, run, sha256, write_text
from parts.device import Device, lay_out_by_columns
from parts.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Decoding):
    # -- what -----------------------------------------------------------------------------
    ckpt: str  # a checkpoint that train.py wrote
    split: str = ""  # caption this split, and score the captions; empty, without image: val
    image: tuple[str, ...] = ()  # or these image files, and all images in these folders
    data: str = ""  # the dataset directory; empty: the one that the checkpoint was trained on
    other_dataset: bool = False  # caption a split of a dataset that it was not trained on
    images: str = ""  # folder of the split's images, for the gallery; empty: prepare.py's
    clip: str = ""  # the encoder's name or folder; empty: the checkpoint's
    prompt: str = ""  # text that every caption continues
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
        if self.split and self.image:
            raise ConfigError("give either --split=<name> or --image <files and folders>")
        if not self.image and not self.split:
            object.__setattr__(self, "split", "val")  # the class is frozen
        shown = self.split or self.gallery or self.out_json
        for name, useless, needed in (
            ("java", self.java and not self.split, "--split"),
            ("track", self.track != "none" and not self.gallery, "--gallery"),
            ("attention", self.attention and not shown, "--gallery or --out_json"),
        ):
            if useless:
                raise ConfigError(f"{name}: does nothing without {needed}", name)


def main(cfg: SampleConfig) -> dict:
    """Caption what `cfg` names. Return the scores, empty for images without references."""
    if cfg.java and (missing := metrics.java_missing()):
        raise UserError(missing)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("sample.py runs as one process, not under torchrun")
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
    scores = score(predictions, cfg.java) if scored else {}
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
        predictions = iter(captioner.caption(embeddings, readable))
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

    def signature(self) -> dict:
        """Return all that the captions depend on, besides the images."""
        return {
            "ckpt": sha256(Path(self.cfg.ckpt)),
            "decoding": {f.name: getattr(self.cfg, f.name) for f in fields(Decoding)},
            "prompt": self.cfg.prompt,
            "attention": self.cfg.attention,
            "device": str(self.device.torch_device),
            "dtype": str(self.device.dtype),
        }

    def caption(self, embeddings: torch.Tensor, items: list[dict]) -> list[dict]:
        """Return predictions of images from their embeddings (B, P, D)."""
        if not items:
            return []
        embeddings = embeddings.to(self.device.torch_device)
        numbers = [item["number"] for item in items]
        with self.device.autocast():
            captions = generate(
                self.model, embeddings, self.tokenizer, self.cfg, self.cfg.prompt, numbers,
                self.meta.longest_caption,
            )  # fmt: skip
        attention = [None] * len(items)
        if self.cfg.attention:
            attention = self.attention(embeddings, [best.ids for best, *_ in captions])
        return [self.prediction(*each) for each in zip(items, captions, attention, strict=True)]

    def prediction(self, item: dict, captions: list[Caption], attention) -> dict:
        """Return an entry of predictions.json: COCO's two keys, and what the gallery shows."""
        texts = [self.tokenizer.decode(caption.ids) for caption in captions]
        entry = {"image_id": item["image_id"], "caption": texts[0]}
        entry |= {name: item[name] for name in ("file_name", "path", "references")}
        entry["tokens"] = self.tokenizer.pieces(captions[0].ids)
        entry["logprobs"] = [round(logprob, 4) for logprob in captions[0].logprobs]
        if not captions[0].ended:
            entry["cut"] = True
        if len(captions) > 1:
            entry["n_best"] = [
                {"caption": text, "logprob": round(caption.logprob, 4)}
                for text, caption in zip(texts, captions, strict=True)
            ]
        if item.get("facts"):
            entry["facts"] = {"true": item["facts"]}
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


class SplitSource:
    """The images of a dataset's split. Raises UserError if it does not fit the checkpoint, or if
    the checkpoint was trained on another dataset: that may have had these images in training."""

    others = ()  # files that are no images

    def __init__(self, cfg: SampleConfig, captioner: Captioner):
        self.split = Split(captioner.data, cfg.split)
        if differences := captioner.meta.differences(self.split.meta):
            raise UserError(f"{self.split.folder} does not fit {cfg.ckpt}: it has {differences}")
        if not cfg.other_dataset:
            changed = self.split.meta.changed_files(captioner.meta)
            hint = "add --other_dataset to caption this one all the same"
            checkpoint.refuse_other_dataset(cfg.ckpt, changed, hint)
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


def score(predictions: list[dict], java: bool) -> dict:
    """Return the scores of all captions; add each one's own to its prediction."""
    hypotheses = {p["image_id"]: p["caption"] for p in predictions}
    references = {p["image_id"]: p["references"] for p in predictions}
    options = {"java": java, "meteor": metrics.java_missing() is None}
    scores, per_image = metrics.score(hypotheses, references, **options)
    for p in predictions:
        own = per_image[p["image_id"]]
        p["scores"] = {"bleu": own["Bleu_4"], "rouge_l": own["ROUGE_L"], "cider": own["CIDEr"]}
    if all("facts" in p for p in predictions):
        from parts import shapes  # the built-in scenes, whose facts are known

        for p in predictions:
            stated = sorted(shapes.stated_facts(p["caption"]))
            p["facts"] = {"stated": stated, "true": p["facts"]["true"]}
        true_facts = [p["facts"]["true"] for p in predictions]
        scores["facts"] = shapes.score_facts(list(hypotheses.values()), true_facts)
    scores["signature"] = metrics.signature(hypotheses, references, **options)
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
    writer.writerow(("image_id", "file_name", "caption", "references", "bleu", "rouge_l", "cider"))
    for p in predictions:
        figures = [f"{value:.4f}" for value in p.get("scores", {}).values()] or [""] * 3
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
