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
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import gallery
import metrics
from configurator import ConfigError, configure, from_dict, one_of, within
from data import Meta, Split
from decode import Caption, Decoding, generate, load_captioner
from parts.common import UserError, append, owning, printable, run, sha256, write_text
from parts.device import Device, lay_out_by_columns
from parts.neighbours import ImageText, Neighbours
from parts.tracking import Tracker

# How the files begin that it may replace, its own and empty ones: not a user's captions in val.csv.
OURS = re.compile(rb'\Z|\[\]|\[{"image_id|image_id,|<!doctype html>\n<!-- The page that gallery')


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Decoding):
    METHODS = f"{Decoding.METHODS} nearest"
    # -- input ----------------------------------------------------------------------------
    ckpt: str  # a checkpoint that train.py wrote, or a folder that parts/export.py wrote
    split: str = ""  # caption this split, and score the captions; empty, without image: val
    image: tuple[str, ...] = ()  # or these image files, and all images in these folders
    data: str = ""  # the dataset directory; empty: the one that the checkpoint was trained on
    other_dataset: bool = False  # caption a split of a dataset that it was not trained on
    images: str = ""  # folder of the split's images, for the gallery; empty: prepare.py's
    clip: str = ""  # the encoder's name or folder; empty: the checkpoint's
    prompt: str = ""  # text that every caption continues
    # -- choosing among captions ----------------------------------------------------------
    # --method=nearest borrows a caption of the nearest training images. --rerank orders n_best by
    # agreement with each other, with the captions of those images, or with the image
    neighbours: int = 20  # nearest training images
    pick: str = "consensus"  # the caption that nearest borrows: consensus random
    rerank: str = "none"  # none consensus neighbours clip
    rerank_weight: float = 0.0  # weight of log p, added to the agreement
    tokens: str = "words"  # what agreement and scores count: words characters
    clip_score: bool = False  # score by CLIP too
    # -- output ---------------------------------------------------------------------------
    out_json: str = ""  # empty: <the checkpoint's folder>/<split>/predictions.json
    out_csv: str = ""  # empty: the same with .csv
    gallery: bool = False  # write a page: gallery.html, or next to out_json and named like it
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
        one_of(self, "pick", "consensus random")
        within(self, "neighbours", 1, {"consensus": 1000, "random": 10**6}[self.pick])
        within(self, "rerank_weight", 0)
        if self.split and self.image:
            raise ConfigError("give either --split=<name> or --image <files and folders>")
        if not self.image and not self.split:
            object.__setattr__(self, "split", "val")  # the class is frozen
        borrows = self.method == "nearest" or self.rerank == "neighbours"
        if borrows and self.split == "train":
            raise ConfigError("split: captions are borrowed from `train`: choose another", "split")
        if self.method == "nearest" and (self.prompt or self.attention):
            raise ConfigError("method: nearest takes no prompt and no attention", "method")
        shown = self.split or self.gallery or self.out_json
        for name, useful, needed in (
            ("rerank", self.n_best > 1, "--n_best=2 or more"),
            ("rerank_weight", self.rerank != "none", "--rerank"),
            ("neighbours", borrows, "--rerank=neighbours"),
            ("pick", self.method == "nearest", "--method=nearest"),
            ("java", self.split, "--split"),
            ("track", self.gallery, "--gallery"),
            ("attention", shown, "--gallery or --out_json"),
        ):
            if not useful and getattr(self, name) != getattr(SampleConfig, name):
                raise ConfigError(f"{name}: does nothing without {needed}", name)


def main(cfg: SampleConfig) -> dict:
    """Caption what `cfg` names. Return the scores; without references, only those by CLIP."""
    if cfg.java and (missing := metrics.java_missing(cfg.tokens)):
        raise UserError(missing)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("sample.py runs as one process, not under torchrun")
    exported = Path(cfg.ckpt) / "model.safetensors"
    if exported.is_file():
        cfg = replace(cfg, ckpt=str(exported))
    for path in (cfg.out_json, cfg.out_csv):
        if path.endswith("/") or os.path.isdir(path):
            raise UserError(f"{path} is a folder: give the name of a file")
    page = Path("gallery.html")
    if cfg.out_json:
        page = Path(cfg.out_json).with_suffix(".html")
    elif cfg.split:
        out = Path(cfg.ckpt).parent / cfg.split / "predictions.json"
        page = out.with_name("gallery.html")
        cfg = replace(cfg, out_json=str(out))
    if cfg.out_json and not cfg.out_csv:
        cfg = replace(cfg, out_csv=str(Path(cfg.out_json).with_suffix(".csv")))
    if cfg.out_json and os.path.abspath(cfg.out_json) == os.path.abspath(cfg.out_csv):
        raise UserError(f"out_json and out_csv are both {cfg.out_csv}: give two names")
    with contextlib.ExitStack() as stack:
        for path in filter(None, (cfg.out_json, cfg.out_csv, cfg.gallery and page)):
            stack.enter_context(owning(Path(f"{path}.lock"), f"sample.py is writing {path}"))
            if not os.path.isfile(path):
                continue
            with open(path, "rb") as file:
                if not OURS.match(file.read(64)):  # the file may be large
                    raise UserError(f"{path} is not sample.py's: move it, or give another name")
        return caption_and_score(cfg, page)


def caption_and_score(cfg: SampleConfig, page: Path) -> dict:
    """Caption and score, while `main` holds the locks of the output files."""
    tracker = Tracker(cfg.track, None, Path(cfg.ckpt).parent)
    captioner = Captioner(cfg)
    source = SplitSource(cfg, captioner) if cfg.split else FileSource(cfg, captioner)
    results = Results(cfg.out_json, captioner.signature() | source.signature())
    if first := len(results.entries):
        print(f"resuming after {first} images in {results.path}")
    begin = time.perf_counter()
    caption_all(cfg, captioner, source, results)
    seconds = time.perf_counter() - begin

    # -- score and write
    predictions = [entry for entry in results.entries if "skipped" not in entry]
    skipped = [entry["skipped"] for entry in results.entries if "skipped" in entry]
    scores = {}
    if by_clip := [p["scores"] for p in predictions if "scores" in p]:
        scores = {name: float(np.mean([s[name] for s in by_clip])) for name in by_clip[0]}
    if cfg.split and any(p["references"] for p in predictions):
        training = []
        if not cfg.other_dataset:  # novel is what the model's own training captions lack
            training = captioner.training[1]
        scores = score(predictions, cfg, training) | scores
    for line in [*skipped, *source.others]:
        print(printable(f"skipped {line}"), file=sys.stderr)
    files = {cfg.out_json: json.dumps(predictions), cfg.out_csv: as_csv(predictions)}
    for path, content in files.items():
        if path:
            write_text(path, content)
            print(f"wrote {path}")
    results.finish()
    if cfg.gallery and predictions:
        title = f"{captioner.meta.dataset} {cfg.split}".strip()
        missing = gallery.write(predictions, page, title=title)
        print(f"wrote {page}")
        if missing:
            print(f"{len(missing)} images not found: set --images to show them in the gallery")
        tracker.artifact(page)
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
    done = len(results.entries)
    items = source.items[done:]
    batches = [items[i : i + cfg.batch_size] for i in range(0, len(items), cfg.batch_size)]
    disable = bool(cfg.image) or None  # image files have a line each instead
    bar = tqdm(total=len(source.items), initial=done, unit="image", disable=disable)
    for batch, (embeddings, bad) in zip(batches, source.embeddings(batches), strict=True):
        skipped = [{"skipped": f"{batch[i]['path']}: {reason}"} for i, reason in bad.items()]
        readable = [item for i, item in enumerate(batch) if i not in bad]
        predictions = captioner.caption(embeddings, readable)
        results.add(predictions + skipped)
        if cfg.image:
            for p in predictions:
                for caption in p.get("n_best", [p]):
                    print(printable(f"{p['path']}: {caption['caption']}"))
        bar.update(len(batch))
    bar.close()


# ---------------------------------------------------------------------------------------------
# From embeddings to captions


class Captioner:
    """A checkpoint, ready to caption."""

    def __init__(self, cfg: SampleConfig):
        self.cfg = cfg
        self.model, self.tokenizer, content = load_captioner(cfg.ckpt)
        self.meta = from_dict(Meta, content["meta"], f"{cfg.ckpt}: meta")
        trained_on = content["config"].get("data") or f"data/{self.meta.dataset}"
        self.data = Path(cfg.data or str(trained_on))
        self.device = Device(cfg.device, cfg.dtype)
        if self.device.type == "cpu":
            lay_out_by_columns(self.model)
        self.model.to(self.device.torch_device)
        if cfg.method == "nearest" or cfg.rerank in ("consensus", "neighbours"):
            embeddings = self.split("train").embeddings
            if cfg.rerank != "consensus":
                self.neighbours = Neighbours(embeddings, cfg.neighbours)
        self.clip = None
        if cfg.rerank == "clip" or cfg.clip_score:
            self.clip = ImageText(self.meta, cfg.clip, self.device.torch_device)

    def split(self, name: str) -> Split:
        """Return a split of the dataset. Raise UserError if it does not fit the checkpoint, or if
        the checkpoint was trained on another dataset: that may have had these images in training.
        """
        split = Split(self.data, name)
        if differences := self.meta.differences(split.meta):
            raise UserError(f"{self.data} does not fit {self.cfg.ckpt}: it has {differences}")
        if not self.cfg.other_dataset:
            hint = "add --other_dataset to caption this one all the same"
            split.meta.refuse_other(self.meta, self.cfg.ckpt, hint)
        return split

    @functools.cached_property
    def training(self) -> tuple[list, list]:
        """The captions of each training image, as texts and as token strings."""
        path = self.data / "train.json"
        if not path.is_file():
            return [], []
        references, _ = metrics.read_references(path)
        captions = list(references.values())  # in the images' order: all of them have captions
        return captions, metrics.token_strings(captions, tokens=self.cfg.tokens)

    def captions_of(self, images: list[int]) -> list[list[str]]:
        """Return all captions of training images, as texts and as token strings."""
        return [[c for i in images for c in captions[i]] for captions in self.training]

    @functools.cached_property
    def cider(self) -> metrics.CiderD:
        """CIDEr-D with the training captions' document frequencies: half a minute for COCO's."""
        return metrics.CiderD(self.training[1], tokenize=str.split)

    def signature(self) -> dict:
        """Return all that the captions depend on, besides the images."""
        settings = asdict(self.cfg)
        for name in "out_json out_csv gallery track java batch_size workers".split():
            del settings[name]  # changes no caption
        settings["ckpt"] = sha256(Path(self.cfg.ckpt))
        settings["device"] = str(self.device.torch_device)
        settings["dtype"] = str(self.device.dtype)
        if self.clip:
            settings["clip"] = self.clip.encoder.digest()
        return settings

    def caption(self, embeddings: torch.Tensor, items: list[dict]) -> list[dict]:
        """Return entries of predictions.json for images, from their embeddings (B, P, D)."""
        if not items:
            return []
        embeddings = embeddings.to(self.device.torch_device)
        if self.cfg.method == "nearest":
            pairs = zip(items, self.neighbours(embeddings), strict=True)
            predictions = [{"caption": self.borrow(*pair)} for pair in pairs]
        else:
            predictions = self.decode(embeddings, items)
        predictions = [item | p for item, p in zip(items, predictions, strict=True)]
        for p in predictions:
            del p["number"]
        if self.cfg.clip_score:
            self.add_clip_scores(embeddings, predictions)
        return predictions

    def borrow(self, item: dict, neighbours: list[int]) -> str:
        """Return one of the captions of an image's neighbours."""
        captions, strings = self.captions_of(neighbours)
        if self.cfg.pick == "random":
            rng = np.random.default_rng((self.cfg.seed, item["number"]))
            return captions[rng.integers(len(captions))]
        return captions[self.cider.agreement(strings).argmax()]

    def decode(self, embeddings: torch.Tensor, items: list[dict]) -> list[dict]:
        """Return the model's best caption of each image, and what the gallery shows of it."""
        numbers = [item["number"] for item in items]
        with self.device.autocast():
            captions = generate(
                self.model, embeddings, self.tokenizer, self.cfg, self.cfg.prompt, numbers,
                self.meta.longest_caption,
            )  # fmt: skip
        if self.cfg.rerank != "none":
            captions = self.rerank(embeddings, items, captions)
        predictions = list(map(self.prediction, captions))
        if self.cfg.attention:
            maps = self.attention(embeddings, [best.ids for best, *_ in captions])
            side = math.isqrt(self.meta.n_positions) * self.model.cfg.is_grid
            uncropped = self.meta.encoder_kind == "siglip"
            for p, attention in zip(predictions, maps, strict=True):
                p |= {"attention": attention, "grid": side, "uncropped": uncropped}
        return predictions

    def rerank(self, embeddings, items, captions: list[list[Caption]]) -> list[list[Caption]]:
        """Return each image's captions in the order of agreement + rerank_weight * log p."""
        texts = [[self.tokenizer.decode(caption.ids) for caption in own] for own in captions]
        strings = metrics.token_strings(texts, tokens=self.cfg.tokens)
        if self.cfg.rerank == "clip":
            images = self.clip.images(embeddings, [item["path"] for item in items])
            pairs = zip(self.clip.texts(texts), images, strict=True)
            agreement = [own @ image for own, image in pairs]
        elif self.cfg.rerank == "neighbours":
            borrowed = [self.captions_of(images)[1] for images in self.neighbours(embeddings)]
            agreement = list(map(self.cider.agreement, strings, borrowed))
        else:
            agreement = list(map(self.cider.agreement, strings))
        ranked = []
        for own, values in zip(captions, agreement, strict=True):
            logprobs = np.array([caption.logprob for caption in own])
            order = np.argsort(-values - self.cfg.rerank_weight * logprobs, kind="stable")
            ranked.append([own[i] for i in order])
        return ranked

    def add_clip_scores(self, embeddings: torch.Tensor, predictions: list[dict]) -> None:
        """Add CLIPScore and, if there are references, RefCLIPScore to each prediction."""
        images = self.clip.images(embeddings, [p["path"] for p in predictions])
        groups = self.clip.texts([[p["caption"], *p["references"]] for p in predictions])
        for p, image, texts in zip(predictions, images, groups, strict=True):
            p["scores"] = metrics.clip_score(image, texts[0], texts[1:])

    def prediction(self, captions: list[Caption]) -> dict:
        """Return an image's captions, the best first, for predictions.json."""
        n_best = [
            {"caption": self.tokenizer.decode(caption.ids), "logprob": round(caption.logprob, 4)}
            for caption in captions
        ]
        best = captions[0]
        given = len(best.ids) + best.ended - len(best.logprobs)  # tokens of the prompt
        prediction = {
            "caption": n_best[0]["caption"],
            "tokens": self.tokenizer.pieces(best.ids),
            "logprobs": [0.0] * given + [round(logprob, 4) for logprob in best.logprobs],
        }
        if not best.ended:
            prediction["cut"] = True
        if len(captions) > 1:
            prediction["n_best"] = n_best
        return prediction

    @torch.inference_mode()
    def attention(self, embeddings: torch.Tensor, captions: list[list[int]]) -> list[list]:
        """Return, for each caption's tokens, the weights of the P prefix positions in the last
        layer, averaged over the heads. Their sum is below 1: the rest goes to the caption itself.
        """
        inputs = [torch.tensor([self.tokenizer.bos, *ids[:-1]]) for ids in captions]
        tokens = pad_sequence(inputs, batch_first=True).to(embeddings.device)  # (B, S)
        segments = torch.ones_like(tokens)
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        x, mask = self.model.embed_rows(embeddings, tokens, segments, positions)
        *blocks, last = self.model.transformer.h
        for block in blocks:
            x = block(x, mask)
        q, k, _ = last.attn.split_heads(last.ln_1(x))
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1).mean(1)  # (B, T, T)
        P = self.model.cfg.prefix_length
        weights = weights[:, P:, :P].cpu().double().round(decimals=4)
        return [row[: len(ids)].tolist() for row, ids in zip(weights, captions, strict=True)]


# ---------------------------------------------------------------------------------------------
# What is captioned: items with number, image_id, file_name, path, references and perhaps facts


class SplitSource:
    """The images of a dataset's split."""

    others = ()  # files that are no images

    def __init__(self, cfg: SampleConfig, captioner: Captioner):
        self.split = captioner.split(cfg.split)
        folder = cfg.images or self.split.meta.images or str(self.split.folder / "images")
        images, references = self.split.references()
        self.items = []
        for number, (image, captions) in enumerate(zip(images, references, strict=True)):
            # val_images moved some of train to val, but not their files
            own = folder.replace("{split}", image.get("split", cfg.split))
            path = Path(own, image["file_name"])
            item = {"number": number, "image_id": image["id"], "file_name": image["file_name"]}
            item |= {"path": "", "references": captions}
            if path.is_file():
                item["path"] = str(path)
            if image.get("facts"):
                item["facts"] = {"true": image["facts"]}
            self.items.append(item)

    def signature(self) -> dict:
        return {"dataset": self.split.meta.files}

    def embeddings(self, batches: list[list[dict]]) -> Iterator[tuple[torch.Tensor, dict]]:
        """Yield the embeddings of each batch, and the reason for each image that has none."""
        for batch in batches:
            yield self.split.embedding(np.array([item["number"] for item in batch])), {}


class FileSource:
    """Image files, through the checkpoint's encoder. Raises UserError if that does not fit."""

    def __init__(self, cfg: SampleConfig, captioner: Captioner):
        from parts.encoder import Encoder, find_images

        meta = captioner.meta
        self.workers = cfg.workers
        files, self.others = find_images(cfg.image)
        # Names below the one folder that was given, or as given: no two images have the same.
        folder = f"{Path(cfg.image[0])}/" if len(cfg.image) == 1 else ""
        self.items = []
        for number, path in enumerate(map(str, files)):
            item = {"number": number, "image_id": number, "file_name": path.removeprefix(folder)}
            self.items.append(item | {"path": path, "references": []})
        if not meta.encoder:
            raise UserError(f"{cfg.ckpt} takes embeddings of your own, not images: use --split")
        name = cfg.clip or meta.encoder
        self.encoder = Encoder(name, meta.features, meta.grid, captioner.device.torch_device)
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
        return {"encoder": self.encoder.digest(), "files": paths, "made": made}

    def embeddings(self, batches: list[list[dict]]) -> Iterator[tuple[torch.Tensor, dict]]:
        """Yield the embeddings of each batch, and the reason for each file that has none."""
        files = [[(item["path"],) for item in batch] for batch in batches]
        return self.encoder.stream(files, self.workers)


# ---------------------------------------------------------------------------------------------
# Results


class Results:
    """Entries of the items, appended to <out>.partial.jsonl batch by batch; not if it is empty.

    signature: what they depend on. Saved entries of another signature are not resumed.
    """

    def __init__(self, out: str, signature: dict):
        self.entries: list[dict] = []
        self.path = None
        if not out:
            return
        self.path = Path(f"{out}.partial.jsonl")
        lines = [json.dumps(signature, sort_keys=True)]
        if self.path.is_file():
            # What follows the last newline is an interrupted write, or nothing.
            saved = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            if saved[:1] == lines:
                lines = saved
        self.entries = [entry for line in lines[1:] for entry in json.loads(line)]
        write_text(self.path, "".join(f"{line}\n" for line in lines))

    def add(self, entries: list[dict]) -> None:
        self.entries += entries
        if self.path:
            append(self.path, json.dumps(entries) + "\n")

    def finish(self) -> None:
        """Delete the saved entries: the output files hold them now."""
        if self.path:
            self.path.unlink()


def score(predictions: list[dict], cfg: SampleConfig, training: list[list[str]]) -> dict:
    """Return the results line of all captions; add each one's own scores to its prediction."""
    hypotheses = {p["image_id"]: p["caption"] for p in predictions}
    references = {p["image_id"]: p["references"] for p in predictions}
    options = {"java": cfg.java, "tokens": cfg.tokens}
    line, per_image = metrics.evaluate(hypotheses, references, training, **options)
    for p in predictions:
        own = per_image[p["image_id"]]
        three = {"bleu": own["Bleu_4"], "rouge_l": own["ROUGE_L"], "cider": own["CIDEr"]}
        p["scores"] = three | p.get("scores", {})
    if cfg.rerank != "none":
        line["rerank"] = f"{cfg.rerank} + {cfg.rerank_weight} log p"
    if all("facts" in p for p in predictions):
        from parts import shapes  # the built-in scenes, whose facts are known

        true_facts = [p["facts"]["true"] for p in predictions]
        for p in predictions:
            p["facts"]["stated"] = sorted(shapes.stated_facts(p["caption"]))
        line["facts"] = shapes.score_facts(list(hypotheses.values()), true_facts)
    return line


def as_csv(predictions: list[dict]) -> str:
    """Return a table: ids, captions, references, and each caption's scores."""
    text = io.StringIO()
    columns = "image_id file_name caption references bleu rouge_l cider".split()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for p in predictions:
        scores = {name: f"{value:.4f}" for name, value in p.get("scores", {}).items()}
        writer.writerow(p | scores | {"references": " | ".join(p["references"])})
    # File names that are not UTF-8 hold surrogates, which cannot be written.
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    run(lambda: main(configure(SampleConfig, sys.argv[1:], __doc__, files=False)))
