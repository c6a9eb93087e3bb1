"""Benchmark training and decoding against the usual alternatives, interleaved.

    python bench.py train                                   # COCO's sizes, invented captions
    python bench.py train --quick                           # tiny: does it run?
    python bench.py train --like=clipcap --batch_size=8     # GPT-2 small, 40 captions per step
    python bench.py scst --batch_size=16 --turns=5          # a self-critical step
    python bench.py scst --ckpt out/flickr8k/ckpt.pt        # its weights, its own images
    python bench.py decode --ckpt out/flickr8k/ckpt.pt      # likewise
    python bench.py gpu                                     # what a GPU does (bench_gpu.py)
    python bench.py parity                                  # the same run on CPU and GPU

Contestants alternate, so that machine noise affects all equally. Figures are medians over the
turns, with minimum and maximum; ratios are taken turn by turn. The last line has the same figures
as JSON. Needs transformers.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import gc
import itertools
import json
import multiprocessing
import platform
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train as training
from configurator import Config, configure, one_of, within
from data import Meta, Order, Split, pack_rows, write_array, write_split
from decode import Decoding, default_max_len, generate, load_captioner
from model import ClipLM, cross_entropy, loss_sum
from parts.common import UserError, extras, run
from parts.device import Device, keep_freed_memory, lay_out_by_columns
from parts.gpt2 import as_gpt2
from parts.log import training_flops
from parts.sources import Record
from prepare import train_tokenizer
from selfcritical import SelfCritical

# ---------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True, kw_only=True)
class Bench:
    device: str = "auto"  # auto cpu mps cuda cuda:1
    quick: bool = False  # tiny sizes: does it run?

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int:
                within(self, name, 1, 10**6)
        if hasattr(self, "dtype"):
            one_of(self, "dtype", "auto bfloat16 float16 float32")


@dataclass(frozen=True, kw_only=True)
class TrainBench(Bench):
    batch_size: int = 64  # images per step
    images: int = 2048  # of train, at least: among few, none has captions as long as COCO's
    n_layer: int = 6  # decoder blocks
    n_head: int = 8  # attention heads per block
    n_embd: int = 512  # width of the decoder
    vocab_size: int = 8192  # subwords
    like: str = "coco"  # or clipcap: GPT-2 small in place of these sizes, and only P = 10, R = 5
    P: tuple[int, ...] = (10, 50)  # prefix embeddings: 10 of a pooled embedding, 50 of a grid
    R: tuple[int, ...] = (5, 1)  # captions per image
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of autocast
    steps: int = 1  # per turn: several, so that a GPU never waits
    compile: bool = False  # time compiled models too
    turns: int = 5  # of each contestant

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "like", "coco clipcap")
        within(self, "vocab_size", 256)

    def resized(self) -> "TrainBench":
        """Return the settings with tiny sizes if it is quick, or with GPT-2 small's."""
        sizes = {}
        if self.quick:
            sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=512)
            sizes |= dict(batch_size=8, images=128, turns=2)
        elif self.like == "clipcap":
            sizes = dict(P=(10,), R=(5,), n_layer=12, n_head=12, n_embd=768, vocab_size=50257)
        return replace(self, **sizes)


@dataclass(frozen=True, kw_only=True)
class CheckpointBench(Bench):
    data: str = ""  # the dataset directory; empty: data/<the checkpoint's dataset>
    dtype: str = "float32"  # of autocast: auto bfloat16 float16 float32
    turns: int = 5  # of each contestant


@dataclass(frozen=True, kw_only=True)
class SelfCriticalBench(CheckpointBench):
    ckpt: str = ""  # one that train.py wrote; empty: train's model learns invented captions first
    batch_size: int = 16  # images per step
    samples: int = 5  # captions of each


@dataclass(frozen=True, kw_only=True)
class DecodeBench(CheckpointBench):
    ckpt: str  # a checkpoint that train.py wrote; with random weights, no caption would end
    images: int = 256  # of its val split
    batches: tuple[int, ...] = (1, 64, 256)  # images per batch
    rounds: int = 24  # batches per turn, as far as there are images


# ---------------------------------------------------------------------------------------------
# Measuring


def hardware(device: Device) -> str:
    """Return a line that describes the machine."""
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = (*names, name)[0]
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device.torch_device)}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def interleave(
    device: Device, contestants: dict, turns: int, alike: bool = True
) -> dict[str, np.ndarray]:
    """Call each contestant with the number of each turn. Return their seconds (turns,).

    The first turn runs once before, since what is new takes longer. If the turns are not alike, a
    GPU takes all of them once before: a length that is new to cuDNN or the compiler costs time.
    """
    uncounted = 1 if alike or device.type != "cuda" else turns
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in (*range(uncounted), *range(turns)):
        for name, work in contestants.items():
            begin = time.perf_counter()
            work(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(times[uncounted:]) for name, times in seconds.items()}


def attempt(name: str, work: Callable, failed: list[str]):
    """Return what `work()` returns, or None after printing why it failed. Free its memory."""
    result = None
    try:
        result = work()
    except Exception:  # noqa: BLE001 - whatever it is, what follows is still measured
        failed.append(name)
        print(f"FAILED: {name}\n{traceback.format_exc()}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def summary(values) -> dict[str, float]:
    median, least, most = np.quantile(values, (0.5, 0, 1)).tolist()
    return {"median": median, "min": least, "max": most}


def speeds(case: str, seconds: dict[str, np.ndarray], items: int) -> list[dict]:
    """Return a row per contestant: its captions or images per second, `items` in a turn, and its
    time divided by ours."""
    rows = []
    for name, times in seconds.items():
        row = {"case": case, "contestant": name, "per_s": summary(items / times)}
        rows.append(row | {"times_ours": summary(times / seconds["ours"])})
    return rows


def show(value) -> str:
    """Return a number with four digits or more, a summary as median (minimum–maximum)."""
    if isinstance(value, dict):
        median, least, most = map(show, value.values())
        return f"{median} ({least}–{most})"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def table(rows: list[dict]) -> str:
    """Return rows as a Markdown table, with a column per key of the first row."""
    names = list(rows[0])
    cells = [[name.replace("_", " ") for name in names]]
    cells += [[show(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(names))
    return "\n".join(lines)


def shown(rows: list[dict]) -> list[dict]:
    """Print rows as a table. Return them."""
    print(f"\n{table(rows)}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------
# Invented captions, and runs of train.py on them


def invent(
    folder: Path, images: int, vocab_size: int, R: int = 5, positions: int = 1, width: int = 512
) -> None:
    """Write a dataset of invented captions, R per image, as long as COCO's.

    An image has one of 200 topics, which its embedding (positions, width) shows. The topic says
    which forty tokens its captions use and how long they are, so that a model soon learns to end.
    A dataset that is there already is kept.
    """
    if folder.is_dir():
        return
    rng = np.random.default_rng(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words = ["".join(three) for three in rng.choice(syllables, (vocab_size, 3))]
    tokenizer = train_tokenizer(words, vocab_size)
    begins = [i for i in range(len(tokenizer)) if tokenizer.sp.id_to_piece(i).startswith("\u2581")]
    tokens_of = rng.choice(begins, (200, 40))
    length_of = 8 + rng.gamma(4, 1, 200)  # with the tail: mean 12.1 tokens, std 2.4, at most 50
    frequencies = 1 / np.arange(1, 41)
    frequencies /= frequencies.sum()
    embedding_of = rng.standard_normal((200, positions, width)).astype(np.float16)
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    counts = {}
    for split, n in (("train", images), ("val", max(8, images // 8))):
        topic = rng.integers(200, size=n)
        lengths = length_of[topic, None] + rng.integers(-1, 2, size=(n, R))
        in_tail = rng.random(lengths.shape) < 0.01
        lengths[in_tail] = 16 + rng.exponential(6, in_tail.sum())
        lengths = lengths.round().clip(5, 50).astype(np.int64)
        records = []
        for i in range(n):
            ids = rng.choice(tokens_of[topic[i]], lengths[i].sum(), p=frequencies)
            captions = [part.tolist() for part in np.split(ids, lengths[i].cumsum()[:-1])]
            texts = tokenizer.sp.decode(captions)
            records.append(Record(i, f"{split}{i}.jpg", texts, tokens=captions))
        noise = 0.3 * rng.standard_normal((n, 1, width))
        embeddings = embedding_of[topic] + noise.astype(np.float16)
        write_array(folder / f"{split}_embeddings.npy", embeddings)
        counts[split] = write_split(folder, split, records, tokenizer)
    features = "grid" if positions > 1 else "pooled"
    meta = Meta(
        dataset="invented", source="", captions="", images="", encoder="", features=features,
        grid=0, n_positions=positions, embedding_dim=width, normalize=True, lowercase=False,
        vocab_size=len(tokenizer), splits=counts,
    )  # fmt: skip
    meta.write(folder)


def settings_of(
    cfg: TrainBench, data: Path, P: int = 10, R: int = 5, batches: int = 32, **changes
) -> dict:
    """Invent captions for `batches` batches in `data`. Return train.py's settings of a run on them
    with this decoder."""
    shape = (50, 768) if P == 50 else (1, 512)
    invent(data, batches * cfg.batch_size, cfg.vocab_size, R, *shape)
    return dict(
        dataset="invented", data=str(data), n_prefix=P, block_size=P + 56, n_layer=cfg.n_layer,
        n_head=cfg.n_head, n_embd=cfg.n_embd, batch_size=cfg.batch_size, device=cfg.device,
        dtype=cfg.dtypes[0], eval_images=256,
    ) | changes  # fmt: skip


def practise(cfg: TrainBench, folder: Path, steps: int, **changes) -> tuple[Config, dict]:
    """Let train.py learn invented captions for `steps`. Return its settings and last scores."""
    changes |= dict(max_iters=steps, eval_interval=steps, warmup_iters=steps // 10)
    run_config = Config(**settings_of(cfg, folder / "data", out_dir=f"{folder}/run", **changes))
    return run_config, training.main(run_config)


# ---------------------------------------------------------------------------------------------
# Training: contestants take steps on as many captions

CONTESTANTS = ("ours", "padded", "transformers")


class Trainee:
    """A contestant: a model, its optimizer, and the batches of its turns.

    ours: packed rows, in batches of images of similar length, as in train.py.
    padded: the same model on separate examples, padded to the longest of their batch.
    transformers: GPT-2 on separate examples, all padded to one length as ClipCap does, ten
        standard deviations above the mean.

    Separate examples are those of random images. "ours compiled" and "padded compiled" have
    compiled blocks and a compiled loss, which on a CPU are only traced.
    """

    def __init__(self, name: str, cfg: Config, turns: int, steps: int):
        keep_freed_memory()  # as train.py does
        way, _, compiled = name.partition(" ")
        self.device = Device(cfg.device, cfg.dtype)
        self.split = split = Split(cfg.data_dir, "train")
        torch.manual_seed(0)
        with self.device.torch_device:  # a GPU draws the weights sooner than a CPU
            self.model = ClipLM(training.model_config(cfg, split.meta))
        self.rows = split.pack
        if way == "padded":
            self.rows = partial(separate_rows, split)
        if way == "transformers":
            self.model = ClipCap(self.model)
            lengths = np.diff(split.caption_start)
            width = min(int(lengths.mean() + 10 * lengths.std()), int(lengths.max()))
            self.rows = partial(separate_rows, split, width=width)
        self.cross_entropy = cross_entropy
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # all cases compile the same functions
            backend = "inductor" if self.device.type == "cuda" else "eager"
            self.cross_entropy = training.compile_parts(self.model, backend=backend)
        self.optimizer = adamw(self.model, self.device, 1e-4)
        self.order = Order(0, split.lengths, cfg.batch_size)
        batches = []
        for step in range(turns * steps):
            images = self.order.batch(step)  # of similar length
            if way != "ours":
                images = np.random.default_rng(step).permutation(len(split))[: len(images)]
            batches.append(self.rows(images))
        self.turns = [batches[i * steps : (i + 1) * steps] for i in range(turns)]

    def turn(self, turn: int) -> None:
        for batch in self.turns[turn]:
            update(self.model, self.optimizer, batch, self.device, self.cross_entropy)

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss on the same captions for all contestants, without dropout."""
        images = self.order.batch(0)
        self.model.eval()
        with self.device.autocast():
            loss = loss_sum(self.model, self.device.put(self.rows(images)))
        self.model.train()
        return loss.item() / int(self.split.lengths[images].sum())

    def flops(self) -> np.ndarray:
        """Return the useful operations of each turn; those of separate examples are as many."""
        tokens = [sum(len(batch["targets"]) for batch in turn) for turn in self.turns]
        images = self.order.batch_size * len(self.turns[0])
        return np.array([training_flops(self.model, images, n) for n in tokens])


class ClipCap(torch.nn.Module):
    """GPT-2 with our weights, fed our prefix as ClipCap feeds it. Called as ClipLM is."""

    def __init__(self, model: ClipLM):
        super().__init__()
        self.gpt2 = as_gpt2(model)
        self.prefix = model
        del model.transformer, model.lm_head  # what is left is the mapper

    def forward(self, embeddings, tokens, segments, positions, targets_at):
        prefix = self.prefix.project(embeddings)
        words = self.gpt2.transformer.wte(tokens)
        inputs = torch.cat((prefix.to(words.dtype), words), 1)
        P = prefix.size(1)
        mask = F.pad(segments == 1, (P, 0), value=True)
        logits = self.gpt2(inputs_embeds=inputs, attention_mask=mask).logits[:, P:]
        return logits.flatten(0, 1)  # (N * S, V): targets_at is all of them


def separate_rows(split: Split, images: np.ndarray, width: int = 0) -> dict[str, torch.Tensor]:
    """Return a padded row for each caption of the images, in place of `Split.pack`'s one per
    image."""
    captions = np.concatenate([split.caption_tokens(image) for image in images])
    embeddings = split.embedding(np.repeat(images, split.n_captions[images]))
    return {"embeddings": embeddings, **pad_rows(captions, split.tokenizer, width)}


def pad_rows(captions: np.ndarray, tokenizer, width: int = 0) -> dict[str, torch.Tensor]:
    """Return a padded row per caption, as the usual loss takes them: with a target everywhere.

    `captions` are ids end to end, bos caption bos caption ...; rows are as long as the longest, or
    `width`. The targets of padding are -100, which do not count.
    """
    starts = np.flatnonzero(captions == tokenizer.bos)
    rows = pack_rows(captions, np.diff(starts, append=len(captions)), tokenizer)
    missing = max(0, width - rows["tokens"].size(1))
    for name in ("tokens", "segments", "positions"):
        rows[name] = F.pad(rows[name], (0, missing))
    targets = torch.full(rows["tokens"].shape, -100)
    targets[rows["segments"] == 1] = rows["targets"]
    return rows | {"targets": targets.flatten(), "targets_at": torch.arange(targets.numel())}


def adamw(model: torch.nn.Module, device: Device, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type != "mps")


def update(
    model: torch.nn.Module, optimizer, batch: dict, device: Device, cross_entropy=cross_entropy
) -> None:
    """Take a training step, as train.py does."""
    with device.autocast():
        loss = loss_sum(model, device.put(batch), cross_entropy=cross_entropy)
    (loss / len(batch["targets"])).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.found_inf = (~norm.isfinite()).float()  # skips a gradient that is not finite
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_mib(device: Device) -> float:
    """Return the most memory that this process has held so far: the GPU's, or else its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes
    lines = status.read_text().splitlines()  # on Linux, getrusage would count the parent's too
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def peak_memory(name: str, cfg: Config, steps: int, in_fresh_process: bool) -> float:
    """Return the MiB that a contestant and three turns take at most, beyond the libraries.

    A GPU's peak can be reset. On a CPU, only a fresh process shows it.
    """
    if in_fresh_process:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(peak_memory, name, cfg, steps, False).result()
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - all contestants pay for it

    device = Device(cfg.device, cfg.dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib(device)
    trainee = Trainee(name, cfg, 3, steps)
    for turn in range(3):
        trainee.turn(turn)
    return peak_mib(device) - before


def compare(bench: TrainBench, cfg: Config, R: int, failed: list[str]) -> list[dict]:
    """Return a row per contestant: speed, loss on the same captions, memory. One that fails in
    its first turns, in which compiled models compile, is left out; without ours, all are."""
    title = f"P = {cfg.n_prefix}, R = {R}, {cfg.batch_size} images, {cfg.dtype}"
    device = Device(cfg.device, cfg.dtype)
    peaks: dict[str, float] = {}
    trainees = {}

    def prepared(name: str) -> Trainee:
        is_alone = device.type != "cuda" and not bench.quick
        peaks[name] = peak_memory(name, cfg, bench.steps, is_alone)
        return Trainee(name, cfg, bench.turns, bench.steps)

    for name in (*CONTESTANTS, *("ours compiled", "padded compiled") * bench.compile):
        if trainee := attempt(f"{title}, {name}", partial(prepared, name), failed):
            trainees[name] = trainee
    if "ours" not in trainees:
        return []
    losses = {name: trainee.loss() for name, trainee in trainees.items()}
    rates: list[float] = []
    contestants = {name: trainee.turn for name, trainee in trainees.items()}
    contestants["machine"] = lambda turn: rates.append(device.matmul_rate())
    seconds = interleave(device, contestants, bench.turns, alike=False)
    del seconds["machine"]
    rows = speeds(title, seconds, bench.steps * cfg.batch_size * R)
    for row in rows:
        name = row["contestant"]
        row["ms_per_step"] = summary(1e3 * seconds[name] / bench.steps)
        row["mfu"] = summary(trainees["ours"].flops() / seconds[name] / np.median(rates))
        row["loss"] = losses[name]
        row["peak_mib"] = peaks[name]
    return shown(rows)


def train(cfg: TrainBench) -> dict:
    """Compare our step with the same model on padded examples, and with transformers' GPT-2."""
    cfg = cfg.resized()
    about = {"hardware": hardware(Device(cfg.device, "float32"))}
    about |= {name: getattr(cfg, name) for name in ("n_layer", "n_embd", "vocab_size")}
    print(*about.values(), sep=", ")
    rows: list[dict] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for P, R, dtype in itertools.product(cfg.P, cfg.R, cfg.dtypes):
            data = Path(folder, f"{P}x{R}")
            batches = max(16, cfg.images // cfg.batch_size)
            settings = settings_of(cfg, data, P, R, batches, dtype=dtype, dropout=0.1)
            rows += compare(cfg, Config(**settings), R, failed)
    return about | {"rows": rows, "failed": failed}


# ---------------------------------------------------------------------------------------------
# Self-critical training

PRACTICE = 60  # steps, after which sampled captions are about as long as the invented ones


def usual_rollout(critic: SelfCritical, images: np.ndarray, step: int) -> dict:
    """Return samples as they are usually trained on: each decoded with its own prefix, a greedy
    caption as the baseline, and a padded row per sample, for ClipLM.forward and loss_sum."""
    K, split, tokenizer = critic.cfg.scst_samples, critic.split, critic.split.tokenizer
    repeated = np.repeat(images, K)
    embeddings = split.embedding(repeated)
    on_device = embeddings.to(critic.device.torch_device)
    greedy = Decoding(max_len=critic.max_len)
    sampling = replace(greedy, method="sample", min_len=0, seed=step)
    with critic.device.autocast():
        best = generate(critic.model, on_device[::K], tokenizer, greedy)
        drawn = generate(critic.model, on_device, tokenizer, sampling)
    ids = [caption.ids for (caption,) in (*drawn, *best)]
    texts = [tokenizer.decode(each) for each in ids]
    rewards = critic.cider.score(np.concatenate((repeated, images)), texts)
    advantages = rewards[: len(drawn)] - np.repeat(rewards[len(drawn) :], K)
    captions = np.concatenate([[tokenizer.bos, *each] for each in ids[: len(drawn)]])
    rows = pad_rows(captions, tokenizer)
    weights = np.repeat(advantages.astype(np.float32), rows["tokens"].size(1))
    return {"embeddings": embeddings, **rows, "weights": torch.from_numpy(weights)}


def self_critical(cfg: SelfCriticalBench) -> dict:
    """Compare a self-critical step and its parts with a cross-entropy step of the same images and
    all their references, and with the usual way to take it; all without dropout."""
    device = Device(cfg.device, cfg.dtype)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        if not cfg.ckpt:
            where = dict(device=cfg.device, dtypes=(cfg.dtype,), quick=cfg.quick)
            sizes = TrainBench(batch_size=16, **where).resized()
            practise(sizes, Path(folder), PRACTICE, optimizer="muon")
            cfg = replace(cfg, ckpt=f"{folder}/run/ckpt.pt", data=f"{folder}/data")
        model, _, content = load_captioner(cfg.ckpt)
        dataset = content["meta"]["dataset"]
        split = Split(Path(cfg.data or f"data/{dataset}"), "train")
        settings = Config(dataset=dataset, scst_samples=cfg.samples)
        critic = SelfCritical(model.to(device.torch_device), split, settings, device)
    order = Order(0, split.lengths, cfg.batch_size)
    optimizer = adamw(model, device, 0.0)  # it does all its work, but the samples stay the same
    step = partial(update, model, optimizer, device=device)
    batches = [order.batch(turn) for turn in range(cfg.turns)]
    embeddings = [split.embedding(images) for images in batches]
    rollouts = [critic.rollout(images, turn)[0] for turn, images in enumerate(batches)]
    contestants = {
        "ours": lambda i: step(critic.rollout(batches[i], i)[0]),
        "its sampling": lambda i: critic.sample(embeddings[i], batches[i], i),
        "its sampling and reward": lambda i: critic.rollout(batches[i], i),
        "its gradient": lambda i: step(rollouts[i]),
        "cross-entropy": lambda i: step(split.pack(batches[i])),
        "usual way": lambda i: step(usual_rollout(critic, batches[i], i)),
    }
    about = {"hardware": hardware(device), "ckpt": cfg.ckpt, "dtype": cfg.dtype}
    seconds = interleave(device, contestants, cfg.turns, alike=False)
    title = f"{model.cfg.n_layer} layers, {model.cfg.n_embd} wide"
    items = cfg.batch_size * cfg.samples
    rows = speeds(f"{title}, {cfg.batch_size} images x {cfg.samples}", seconds, items)
    sampled = sum(len(drawn["targets"]) for drawn in rollouts) / (len(rollouts) * items)
    references = float(np.diff(split.caption_start).mean())
    about |= {"sampled_tokens": sampled, "reference_tokens": references}
    print(about)
    return about | {"rows": shown(rows)}


# ---------------------------------------------------------------------------------------------
# Decoding


@torch.inference_mode()
def their_captions(gpt2, model: ClipLM, embeddings, tokenizer, cfg: Decoding) -> list[list[int]]:
    """Return the captions that GPT-2's own `generate` finds, greedily or by beam search."""
    bos = gpt2.transformer.wte.weight[tokenizer.bos].expand(len(embeddings), 1, -1)
    inputs = torch.cat((model.project(embeddings), bos), 1)
    beams = {}
    if cfg.method == "beam":  # "never" stops exactly, as we do, if there is a penalty
        stop = "never" if cfg.length_penalty > 0 else False
        beams = dict(num_beams=cfg.beams, length_penalty=cfg.length_penalty, early_stopping=stop)
    written = gpt2.generate(
        inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], device=inputs.device),
        do_sample=False, max_new_tokens=cfg.max_len, min_new_tokens=cfg.min_len,
        no_repeat_ngram_size=cfg.no_repeat_ngram,
        suppress_tokens=[tokenizer.pad, tokenizer.bos, tokenizer.unk],
        pad_token_id=tokenizer.pad, eos_token_id=tokenizer.eos, **beams,
    )  # fmt: skip
    ends = (tokenizer.pad, tokenizer.eos)
    return [[i for i in row if i not in ends] for row in written.tolist()]


class Recomputing:
    """The model without a cache: each step is a forward pass over all tokens so far.

    The very same search runs over it: in place of one layer's keys and values, it hands out the
    embeddings and the tokens.
    """

    def __init__(self, model: ClipLM):
        self.model = model
        self.cfg = model.cfg

    def prefill(self, embeddings):
        nothing = embeddings.new_empty(len(embeddings), 0, dtype=torch.long)
        return [(embeddings, nothing)]

    def step(self, tokens, position: int, prefix_kv, cache=None):
        ((embeddings, before),) = cache or prefix_kv
        tokens = torch.cat((before, tokens[:, None]), 1)  # (N, position + 1)
        index = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
        positions = index[:1].expand_as(tokens)
        last = index[:, -1]
        logits = self.model(embeddings, tokens, torch.ones_like(tokens), positions, last)
        return logits, [(embeddings, tokens)]


def decode(cfg: DecodeBench) -> dict:
    """Compare our decoding with transformers' `generate`, with our own without a cache, and with
    the time that it takes to read what must be read."""
    device = Device(cfg.device, cfg.dtype)
    model, tokenizer, content = load_captioner(cfg.ckpt)
    if device.type == "cpu":
        lay_out_by_columns(model)
    gpt2 = as_gpt2(model.to(device.torch_device))
    split = Split(Path(cfg.data or f"data/{content['meta']['dataset']}"), "val")
    if cfg.quick:
        cfg = replace(cfg, images=8, turns=2)
    embeddings = split.embedding(np.arange(min(cfg.images, len(split)))).to(device.torch_device)
    bandwidth = copied_per_second(device)
    about = {"hardware": hardware(device), "ckpt": cfg.ckpt, "dtype": cfg.dtype}
    print(*about.values(), sep=", ")

    def ours(images, how: Decoding, model=model) -> list[list[int]]:
        return [caption.ids for (caption,) in generate(model, images, tokenizer, how)]

    decoders = {
        "ours": ours,
        "transformers": lambda images, how: their_captions(gpt2, model, images, tokenizer, how),
        "without cache": partial(ours, model=Recomputing(model)),
    }

    def captions(name: str, how: Decoding, parts, written: dict, turn: int) -> None:
        """Write all captions of a contestant; every turn is the same work."""
        written[name] = []
        for images in parts:
            with device.autocast():
                written[name] += decoders[name](images, how)

    rows = []
    L = default_max_len(model.cfg, 0)
    searches = (Decoding(max_len=L), Decoding(method="beam", beams=5, max_len=L))
    for batch, how in itertools.product(cfg.batches, searches):
        names = ["ours", "transformers"]
        if batch == 64 and device.type == "cpu":
            names.append("without cache")
        parts = embeddings[: cfg.rounds * batch].split(batch)
        written: dict[str, list] = {}
        contestants = {name: partial(captions, name, how, parts, written) for name in names}
        seconds = interleave(device, contestants, cfg.turns)
        own = written["ours"]
        starts = range(0, len(own), batch)
        least = sum(least_bytes(model, own[i : i + batch], how, device.dtype) for i in starts)
        case = speeds(f"{how.method}, batch {batch}", seconds, len(own))
        for row in case:
            name = row["contestant"]
            row["same"] = sum(map(list.__eq__, own, written[name])) / len(own)
            row["of_bandwidth"] = least / bandwidth / np.median(seconds[name])
        rows += shown(case)
    return about | {"rows": rows}


def copied_per_second(device: Device) -> float:
    """Return the bytes per second that a copy in the device's memory reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**26
    a = torch.ones(size, dtype=torch.uint8, device=device.torch_device)
    b = torch.empty_like(a)
    seconds = interleave(device, {"copy": lambda turn: b.copy_(a)}, 10)["copy"]
    return float(2 * len(a) / np.median(seconds))


def least_bytes(model: ClipLM, captions: list, how: Decoding, dtype: torch.dtype) -> int:
    """Return the bytes that decoding a batch, which ends in these captions, must read.

    Each step reads the weights once, and the keys and values of the images that have not ended;
    an image's beams share its prefix's.
    """
    cfg = model.cfg
    beams = how.beams if how.method == "beam" else 1
    weights = sum(p.numel() for p in model.transformer.parameters())  # the head is wte
    lengths = np.array([len(ids) for ids in captions])
    steps = np.arange(min(lengths.max() + 1, how.max_len))
    images = (lengths >= steps[:, None]).sum(1)  # at each step
    tokens = int(images @ (cfg.prefix_length + beams * (steps + 1)))
    numbers = len(steps) * weights + 2 * cfg.n_layer * cfg.n_embd * tokens
    return numbers * dtype.itemsize


# ---------------------------------------------------------------------------------------------

MODES = {
    "train": (TrainBench, train),
    "decode": (DecodeBench, decode),
    "scst": (SelfCriticalBench, self_critical),
}


def main(argv: list[str]) -> dict:
    """Run `bench.py <mode> [--flags]`. Return the content of the last line."""
    import bench_gpu

    modes = MODES | bench_gpu.MODES
    if not argv or argv[0] not in modes:
        if {"-h", "--help"} & set(argv):
            print(__doc__.strip())
            raise SystemExit(0)
        names = ", ".join(f"`{name}`" for name in modes)
        raise UserError(f"bench.py: say what to measure before any --flag: {names}")
    settings, mode = modes[argv[0]]
    cfg = configure(settings, argv[1:], __doc__, files=False)
    extras()
    result = mode(cfg)
    print(json.dumps({"bench": argv[0], **result}))
    if result.get("failed"):
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    run(main, sys.argv[1:])
