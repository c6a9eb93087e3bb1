"""Benchmark training and decoding against the usual alternatives, interleaved.

    python bench.py decode --ckpt out/flickr8k/ckpt.pt      # its weights, its own val images
    python bench.py train                                   # COCO's sizes, synthetic captions
    python bench.py train --quick                           # tiny: does it run?
    python bench.py train --like=clipcap --batch_size=8     # GPT-2 small, 40 captions per step
    python bench.py scst --ckpt out/flickr8k/ckpt.pt        # a self-critical step
    python bench.py gpu                                     # what a GPU does (bench_gpu.py)
    python bench.py parity                                  # the same run on CPU and GPU

Contestants alternate, so that machine noise affects all equally. Figures are medians over the
turns, with minimum and maximum; ratios are taken turn by turn. The last line has the same figures
as JSON. Needs transformers.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before what takes seconds
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from configurator import Config, configure, one_of, within
from data import Order, Split
from decode import Decoding, default_max_len, generate, load_captioner
from model import ClipLM, ModelConfig, loss_sum
from parts.common import UserError, run
from parts.device import Device, keep_freed_memory, lay_out_by_columns
from parts.encoder import extras
from parts.gpt2 import as_gpt2
from parts.log import training_flops
from selfcritical import SelfCritical

# ---------------------------------------------------------------------------------------------
# Measuring


def hardware(device: Device) -> str:
    """Return a line that describes the machine."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device.torch_device)}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peak_mb(device: Device) -> float:
    """Return the most memory that this process has held so far: the GPU's, or else its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes
    lines = status.read_text().splitlines()  # on Linux, getrusage would count the parent's too
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def interleave(device: Device, contestants: dict, turns: int) -> dict[str, list[float]]:
    """Call each contestant with the number of each turn. Return their seconds at each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in (0, *range(turns)):  # the first time is not counted
        for name, work in contestants.items():
            begin = time.perf_counter()
            work(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: times[1:] for name, times in seconds.items()}


def summary(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(figures: dict[str, float], form: str = ".1f") -> str:
    return f"{figures['median']:{form}} ({figures['min']:{form}}–{figures['max']:{form}})"


def speeds(seconds: dict[str, list[float]], captions: int) -> list[dict]:
    """Return and print each contestant's captions per second, and its time divided by ours."""
    rows = []
    for name, times in seconds.items():
        ratio = summary(b / a for a, b in zip(seconds["ours"], times, strict=True))
        per_second = summary(captions / time_ for time_ in times)
        rows.append({"contestant": name, "captions_per_s": per_second, "times_ours": ratio})
        print(f"  {name:<16}{show(per_second):>28} per s    x {show(ratio, '.2f')}")
    return rows


# ---------------------------------------------------------------------------------------------
# The peer: transformers' GPT-2 with our weights, fed our prefix as ClipCap feeds it


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


# ---------------------------------------------------------------------------------------------
# Decoding


@dataclass(frozen=True)
class DecodeBench:
    ckpt: str  # a checkpoint that train.py wrote; with random weights, no caption would end
    data: str = ""  # the dataset directory; empty: data/<the checkpoint's dataset>
    images: int = 256  # of its val split
    batches: str = "1 64 256"  # images per batch
    rounds: int = 24  # batches per turn, as far as there are images
    turns: int = 5  # of each contestant
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "float32"  # of autocast: auto bfloat16 float16 float32
    quick: bool = False  # few images and turns: does it run?

    def __post_init__(self):
        within(self, "images rounds turns", 1, 10**6)
        one_of(self, "dtype", "auto bfloat16 float16 float32")


class Recomputing:
    """The model without a cache: each step is a forward pass over all tokens so far.

    The very same search runs over it: in place of the keys and of the values, both, it hands out
    the embeddings as `prefix_kv` and the tokens as the cache.
    """

    def __init__(self, model: ClipLM):
        self.model = model
        self.cfg = model.cfg

    def prefill(self, embeddings):
        return [(embeddings, embeddings)]

    def step(self, tokens, position: int, prefix_kv, cache=None):
        # As in the model, the cache begins with the prefix if there is no prefix_kv.
        (embeddings, _), *past = [*(prefix_kv or []), *(cache or [])]
        tokens = torch.cat([*(pair[0] for pair in past), tokens[:, None]], 1)  # (N, position + 1)
        N, t = tokens.shape
        positions = torch.arange(t, device=tokens.device).expand_as(tokens)
        last = torch.arange(1, N + 1, device=tokens.device) * t - 1
        repeated = embeddings.repeat_interleave(N // len(embeddings), 0)
        logits = self.model(repeated, tokens, torch.ones_like(tokens), positions, last)
        begins = [] if prefix_kv else [(embeddings, embeddings)]
        return logits, [*begins, (tokens, tokens)]


def decode(cfg: DecodeBench) -> dict:
    """Compare our decoding with transformers' `generate`, with our own without a cache, and with
    the time that it takes to read what must be read."""
    device = Device(cfg.device, cfg.dtype)
    model, tokenizer, content = load_captioner(cfg.ckpt)
    if device.type == "cpu":
        lay_out_by_columns(model)
    gpt2 = as_gpt2(model.to(device.torch_device))
    split = Split(Path(cfg.data or f"data/{content['meta']['dataset']}"), "val")
    n = min(cfg.images, len(split))
    if cfg.quick:
        n = 8
        cfg = replace(cfg, turns=2)
    numbers = np.linspace(0, len(split) - 1, n).astype(np.int64)
    embeddings = split.embedding(numbers).to(device.torch_device)
    size = model.cfg
    L = default_max_len(size, 0)
    bandwidth = copied_per_second(device)
    about = {"hardware": hardware(device), "ckpt": cfg.ckpt, "dtype": cfg.dtype, "images": n}
    print(
        f"{about['hardware']}\n{cfg.ckpt}: {size.n_layer} layers, {size.n_embd} wide, "
        f"V = {size.vocab_size}, P = {size.prefix_length}; {n} val images, {cfg.dtype}"
    )

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

    cases = []
    for batch, how in itertools.product(
        map(int, cfg.batches.split()),
        (Decoding(max_len=L), Decoding(method="beam", beams=5, max_len=L)),
    ):
        names = ["ours", "transformers"]
        if batch == 64 and device.type == "cpu":
            names.append("without cache")
        parts = embeddings[: cfg.rounds * batch].split(batch)
        written: dict = {}
        contestants = {name: partial(captions, name, how, parts, written) for name in names}
        seconds = interleave(device, contestants, cfg.turns)
        pairs = list(zip(written["ours"], written["transformers"], strict=True))
        differ = [i for i, (own, theirs) in enumerate(pairs) if own != theirs]
        least = sum(least_bytes(model, written["ours"][i : i + batch], how, device.dtype)
                    for i in range(0, len(pairs), batch))  # fmt: skip
        of_bandwidth = least / bandwidth / statistics.median(seconds["ours"])
        print(
            f"\n{how.method}, batch {batch}: {len(pairs) - len(differ)} of {len(pairs)} captions "
            f"are the same as transformers'; ours reads {of_bandwidth:.1%} of what it could"
        )
        rows = speeds(seconds, len(pairs))
        for i in differ[:10]:
            print(f"  image {numbers[i]}, ours: {tokenizer.decode(pairs[i][0])}")
            print(f"  image {numbers[i]}, theirs: {tokenizer.decode(pairs[i][1])}")
        cases.append({"method": how.method, "batch": batch, "same": 1 - len(differ) / len(pairs),
                      "of_bandwidth": of_bandwidth, "contestants": rows})  # fmt: skip
    return about | {"cases": cases}


def copied_per_second(device: Device) -> float:
    """Return the bytes per second that a copy in the device's memory reads and writes."""
    a = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8,
                   device=device.torch_device)  # fmt: skip
    b = torch.empty_like(a)
    seconds = interleave(device, {"copy": lambda turn: b.copy_(a)}, 10)["copy"]
    return 2 * len(a) / statistics.median(seconds)


def least_bytes(model: ClipLM, captions: list, how: Decoding, dtype: torch.dtype) -> int:
    """Return the bytes that decoding a batch, which ends in these captions, must read.

    Each step reads the weights once, and the keys and values of the images that have not ended;
    an image's beams share its prefix's.
    """
    cfg = model.cfg
    beams = how.beams if how.method == "beam" else 1
    weights = sum(p.numel() for p in model.transformer.parameters())  # the head is wte
    lengths = np.array([len(ids) for ids in captions])
    numbers = 0
    for t in range(min(int(lengths.max()) + 1, how.max_len)):
        images = int((lengths >= t).sum())
        tokens = images * (cfg.prefix_length + beams * (t + 1))
        numbers += weights + 2 * cfg.n_layer * cfg.n_embd * tokens
    return numbers * dtype.itemsize


# ---------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class TrainBench:
    batch_size: int = 64  # images per step
    n_layer: int = 6  # decoder blocks
    n_head: int = 8  # attention heads per block
    n_embd: int = 512  # width of the decoder
    vocab_size: int = 8192  # subwords
    like: str = "coco"  # or clipcap: GPT-2 small in place of these sizes, and only P = 10, R = 5
    turns: int = 5  # of each contestant
    device: str = "auto"  # auto cpu mps cuda cuda:1
    quick: bool = False  # a tiny model and batch, two turns: does it run?

    def __post_init__(self):
        one_of(self, "like", "coco clipcap")
        within(self, "batch_size n_layer n_head n_embd turns", 1, 10**6)
        within(self, "vocab_size", 8, 10**6)


@dataclass(frozen=True)
class Case:
    """One comparison: P = 10 for a pooled embedding or 50 for a grid, R captions per image."""

    bench: TrainBench
    P: int
    R: int
    dtype: str


class Synthetic:
    """A split of random ids and embeddings, with captions of COCO's lengths; attributes as in
    data.Split."""

    pack = Split.pack
    caption_tokens = Split.caption_tokens
    embedding = Split.embedding

    def __init__(self, size: ModelConfig, images: int, R: int):
        rng = np.random.default_rng(0)
        n = images * R
        lengths = 7 + rng.gamma(5, 1, n)  # with the tail: mean 12.1 tokens, std 2.4, at most 50
        in_tail = rng.random(n) < 0.01
        lengths[in_tail] = 16 + rng.exponential(6, in_tail.sum())
        lengths = 1 + lengths.round().clip(5, 50).astype(np.int64)  # bos
        self.tokenizer = SimpleNamespace(pad=0, bos=1, eos=2, unk=3)
        self.tokens = rng.integers(4, size.vocab_size, lengths.sum())
        self.caption_start = np.concatenate(([0], lengths.cumsum()))
        self.tokens[self.caption_start[:-1]] = self.tokenizer.bos
        self.image_start = self.caption_start[::R]
        self.lengths = np.diff(self.image_start)
        self.n_captions = np.full(images, R)
        self.R = R
        self.clipcap_width = min(int(lengths.mean() + 10 * lengths.std()), int(lengths.max()))
        shape = images, size.n_positions, size.embedding_dim
        self.embeddings = rng.standard_normal(shape, np.float32).astype(np.float16)

    def captions_of(self, images: np.ndarray) -> np.ndarray:
        return (images[:, None] * self.R + np.arange(self.R)).flatten()

    def separate(self, captions: np.ndarray, width: int = 0) -> dict:
        """Return captions as examples of their own, each with its image's embedding.

        Tokens and targets (N, S) are padded to the longest caption, or to `width`; targets are
        -100 at padding.
        """
        bounds = zip(self.caption_start[captions], self.caption_start[captions + 1], strict=True)
        pieces = [self.tokens[begin:end] for begin, end in bounds]
        width = width or max(map(len, pieces))
        tokens = np.full((len(pieces), width), self.tokenizer.pad)
        targets = np.full((len(pieces), width), -100)
        for i, piece in enumerate(pieces):
            tokens[i, : len(piece)] = piece
            targets[i, : len(piece)] = [*piece[1:], self.tokenizer.eos]
        embeddings = self.embedding(captions // self.R)
        return {"embeddings": embeddings, "tokens": torch.from_numpy(tokens),
                "targets": torch.from_numpy(targets)}  # fmt: skip


CONTESTANTS = ("ours", "padded", "transformers")


class Trainee(torch.nn.Module):
    """A model, its optimizer and its loss.

    ours: packed rows, in batches of images of similar length, as in train.py.
    padded: the same model on separate examples, padded to the longest of their batch.
    transformers: GPT-2 on separate examples, all padded to one length as ClipCap does, ten
        standard deviations above the mean.
    """

    def __init__(self, name: str, case: Case, device: Device):
        super().__init__()
        keep_freed_memory()  # as train.py does
        self.name = name
        self.device = device
        features = dict(features="pooled", embedding_dim=512, n_positions=1)
        if case.P == 50:
            features = dict(features="grid", embedding_dim=768, n_positions=50)
        cfg = case.bench
        size = ModelConfig(
            vocab_size=cfg.vocab_size, n_prefix=case.P, n_layer=cfg.n_layer, n_head=cfg.n_head,
            n_embd=cfg.n_embd, block_size=case.P + 56, dropout=0.1, **features,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = ClipLM(size).to(device.torch_device)
        self.run = self.model  # what is called: it may be compiled
        if name == "transformers":
            self.gpt2 = as_gpt2(self.model)
            del self.model.transformer, self.model.lm_head
        fused = device.type != "mps"
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, fused=fused)

    def batch(self, split: Synthetic, order: Order, turn: int) -> tuple[dict, int]:
        """Return a batch and how many targets it has. Separate examples are drawn at random."""
        images = order.batch(turn)
        if self.name == "ours":
            return split.pack(images), int(split.lengths[images].sum())
        n = len(images) * split.R
        shuffled = np.random.default_rng(0).permutation(len(split.caption_start) - 1)
        captions = shuffled[turn * n : (turn + 1) * n]
        width = split.clipcap_width if self.name == "transformers" else 0
        return split.separate(captions, width), int(np.diff(split.caption_start)[captions].sum())

    def loss(self, batch: dict) -> torch.Tensor:
        """Return the cross-entropy, summed over the targets."""
        if self.name == "ours":
            return loss_sum(self.run, batch)
        embeddings, tokens, targets = batch["embeddings"], batch["tokens"], batch["targets"]
        if self.name == "padded":
            positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
            everywhere = torch.arange(tokens.numel(), device=tokens.device)
            segments = torch.ones_like(tokens)
            logits = self.run(embeddings, tokens, segments, positions, everywhere)
        else:
            prefix = self.model.project(embeddings)
            words = self.gpt2.transformer.wte(tokens)
            inputs = torch.cat((prefix.to(words.dtype), words), 1)
            P = prefix.size(1)
            mask = F.pad(targets >= 0, (P, 0), value=True)
            logits = self.gpt2(inputs_embeds=inputs, attention_mask=mask).logits[:, P:]
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")

    def step(self, batch: dict, targets: int) -> None:
        with self.device.autocast():
            loss = self.loss(self.device.put(batch))
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peak_memory(name: str, case: Case) -> float:
    """Return the MB that three steps take at most, beyond the libraries, in a fresh process."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - all contestants pay for it

    device = Device(case.bench.device, case.dtype)
    before = peak_mb(device)
    trainee = Trainee(name, case, device)
    split = Synthetic(trainee.model.cfg, 3 * case.bench.batch_size, case.R)
    order = Order(0, split.lengths, case.bench.batch_size)
    for step in range(3):
        trainee.step(*trainee.batch(split, order, step))
    return peak_mb(device) - before


def compare(case: Case, peaks: list[float]) -> dict:
    """Time a step of each contestant, as many captions per step, and compare their losses on the
    same captions without dropout."""
    bench = case.bench
    device = Device(bench.device, case.dtype)
    trainees = [Trainee(name, case, device) for name in CONTESTANTS]
    images = max(32, bench.turns) * bench.batch_size
    split = Synthetic(trainees[0].model.cfg, images, case.R)
    order = Order(0, split.lengths, bench.batch_size)

    # -- the same loss?
    images = order.batch(0)
    packed, separate = split.pack(images), split.separate(split.captions_of(images))
    losses = []
    for trainee in trainees:
        batch = packed if trainee.name == "ours" else separate
        trainee.eval()  # no dropout
        with torch.no_grad(), device.autocast():
            losses.append(trainee.loss(device.put(batch)).item() / split.lengths[images].sum())
        trainee.train()

    # -- and how fast?
    entrants = {trainee.name: (trainee, trainee.model) for trainee in trainees}
    print(f"\nP = {case.P}, {case.R} captions per image, {case.dtype}")
    rows, rate = race(device, entrants, split, order, bench.turns)
    for row, loss, peak in zip(rows, losses, peaks, strict=True):
        row |= {"loss": loss, "peak_mb": peak}
        print(f"  {row['contestant']:<16}loss {loss:.6f}, peak memory {peak:.0f} MB")
    return {"P": case.P, "captions_an_image": case.R, "dtype": case.dtype, "mfu": rows[0]["mfu"],
            "matmul_gflops": rate / 1e9, "contestants": rows}  # fmt: skip


def race(
    device: Device, entrants: dict, split: Synthetic, order: Order, turns: int, steps: int = 1
) -> tuple[list[dict], float]:
    """Time turns of some training steps. Return each contestant's figures, and the machine's rate.

    entrants: name -> a Trainee, and what it calls: its model, or that model compiled.
    """
    rates: list[float] = []
    contestants = {
        name: turns_of(split, order, turns, steps, *each) for name, each in entrants.items()
    }
    contestants["machine"] = lambda turn: rates.append(device.matmul_rate())
    seconds = interleave(device, contestants, turns)
    del seconds["machine"]
    rate = statistics.median(rates)
    images = steps * order.batch_size
    ours, _ = entrants["ours"]
    flops = []
    for turn in range(turns):
        numbers = [order.batch(i) for i in batches_of(turn, steps, order)]
        tokens = split.lengths[np.concatenate(numbers)].sum()
        flops.append(training_flops(ours.model, images, int(tokens)))
    print(f"of {rate / 1e12:.2f} TFLOP/s, steps of {order.batch_size} images:")
    rows = speeds(seconds, images * split.R)
    for row in rows:
        times = seconds[row["contestant"]]
        row["ms_per_step"] = summary(1e3 * x / steps for x in times)
        row["mfu"] = summary(f / x / rate for f, x in zip(flops, times, strict=True))
        print(
            f"  {row['contestant']:<16}{show(row['ms_per_step'])} ms per step, "
            f"MFU {show(row['mfu'], '.1%')}"
        )
    return rows, rate


def batches_of(turn: int, steps: int, order: Order) -> list[int]:
    """Return the numbers of a turn's batches; after an epoch they begin anew."""
    return [i % order.per_epoch for i in range(turn * steps, (turn + 1) * steps)]


def turns_of(split: Synthetic, order: Order, turns: int, steps: int, trainee: Trainee, model):
    """Return a function of the turn that takes some steps through `model`: compiled or not."""
    ready = {
        i: trainee.batch(split, order, i)
        for turn in range(turns)
        for i in batches_of(turn, steps, order)
    }

    def work(turn: int) -> None:
        trainee.run = model
        for i in batches_of(turn, steps, order):
            trainee.step(*ready[i])

    return work


def train(cfg: TrainBench) -> dict:
    """Compare our step with the same model on padded examples, and with transformers' GPT-2."""
    P, R = (10, 50), (5, 1)
    if cfg.like == "clipcap":
        cfg = replace(cfg, n_layer=12, n_head=12, n_embd=768, vocab_size=50257)
        P, R = (10,), (5,)
    if cfg.quick:
        cfg = replace(cfg, batch_size=16, n_layer=2, n_head=2, n_embd=64, vocab_size=1000, turns=2)
    about = {"hardware": hardware(Device(cfg.device, "float32"))}
    about |= {
        name: getattr(cfg, name) for name in ("batch_size", "n_layer", "n_embd", "vocab_size")
    }
    print(f"{about['hardware']}\n{cfg.n_layer} layers, {cfg.n_embd} wide, V = {cfg.vocab_size}, "
          f"{cfg.batch_size} images per step")  # fmt: skip
    product = itertools.product(P, R, ("float32", "bfloat16"))
    cases = [Case(cfg, *rest) for rest in product]
    if cfg.quick:
        cases = [cases[0], cases[-1]]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        peaks = [[fresh.submit(peak_memory, name, case).result() for name in CONTESTANTS]
                 for case in cases]  # fmt: skip
    return about | {"cases": [compare(*each) for each in zip(cases, peaks, strict=True)]}


# ---------------------------------------------------------------------------------------------
# Self-critical training


@dataclass(frozen=True)
class SelfCriticalBench:
    ckpt: str  # a checkpoint that train.py wrote; with random weights, no caption would end
    data: str = ""  # the dataset directory; empty: data/<the checkpoint's dataset>
    batch_size: int = 16  # images per step
    samples: int = 5  # captions of each
    turns: int = 9  # of each contestant
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "float32"  # of autocast: auto bfloat16 float16 float32

    def __post_init__(self):
        within(self, "batch_size turns", 1, 10**6)
        within(self, "samples", 2, 1000)
        one_of(self, "dtype", "auto bfloat16 float16 float32")


def usual_rollout(critic: SelfCritical, images: np.ndarray, step: int) -> dict:
    """Return samples as they are usually trained on: each decoded with an own prefix, a greedy
    caption as the baseline, and one padded row per sample, for ClipLM.forward and loss_sum."""
    K, split, tokenizer = critic.cfg.scst_samples, critic.split, critic.split.tokenizer
    repeated = np.repeat(images, K)
    embeddings = split.embedding(repeated)
    on_device = embeddings.to(critic.device.torch_device)
    greedy = Decoding(max_len=critic.max_len)
    sampling = replace(greedy, method="sample", min_len=0, seed=step)
    with critic.device.autocast():
        best = generate(critic.model, on_device[::K], tokenizer, greedy)
        drawn = generate(critic.model, on_device, tokenizer, sampling, numbers=range(len(repeated)))
    best, drawn = ([caption.ids for (caption,) in found] for found in (best, drawn))
    rewards = critic.cider.score(
        np.concatenate((repeated, images)), [tokenizer.decode(ids) for ids in (*drawn, *best)]
    )
    advantages = rewards[: len(drawn)] - np.repeat(rewards[len(drawn) :], K)
    width = 1 + max(map(len, drawn))
    shape = len(drawn), width
    tokens, targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
    for i, ids in enumerate(drawn):
        tokens[i, : len(ids) + 1] = [tokenizer.bos, *ids]
        targets[i, : len(ids) + 1] = [*ids, tokenizer.eos]
        weights[i, : len(ids) + 1] = advantages[i]
    return {
        "embeddings": embeddings,
        "tokens": torch.from_numpy(tokens),
        "segments": torch.ones(shape, dtype=torch.long),
        "positions": torch.arange(width).expand(shape),
        "targets_at": torch.arange(len(drawn) * width),
        "targets": torch.from_numpy(targets.ravel()),
        "weights": torch.from_numpy(weights.ravel().astype(np.float32)),
    }


def self_critical(cfg: SelfCriticalBench) -> dict:
    """Compare a self-critical step with a cross-entropy step of the same images and all their
    references, and with the usual way to take it."""
    device = Device(cfg.device, cfg.dtype)
    keep_freed_memory()
    model, _, content = load_captioner(cfg.ckpt)  # in eval mode: no dropout in any of them
    model.to(device.torch_device)
    name = content["meta"]["dataset"]
    split = Split(Path(cfg.data or f"data/{name}"), "train")
    settings = Config(
        dataset=name, objective="scst", init_from=cfg.ckpt, scst_samples=cfg.samples,
        batch_size=cfg.batch_size,
    )  # fmt: skip
    critic = SelfCritical(model, split, settings, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type != "mps")
    order = Order(0, split.lengths, cfg.batch_size)
    parts: dict[str, list[float]] = {"sampling": [], "reward": []}

    def timed(name: str, function):
        def call(*args):
            begin = time.perf_counter()
            result = function(*args)
            parts[name].append(time.perf_counter() - begin)
            return result

        return call

    critic.sample = timed("sampling", critic.sample)
    critic.cider.score = timed("reward", critic.cider.score)

    def step(rows: dict) -> None:
        with device.autocast():
            loss = loss_sum(model, device.put(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    contestants = {
        "ours": lambda turn: step(critic.rollout(order.batch(turn), turn)[0]),
        "cross-entropy": lambda turn: step(split.pack(order.batch(turn))),
        "usual way": lambda turn: step(usual_rollout(critic, order.batch(turn), turn)),
    }
    about = {"hardware": hardware(device), "ckpt": cfg.ckpt, "dtype": cfg.dtype}
    print(f"{about['hardware']}\n{cfg.ckpt}: {cfg.batch_size} images x {cfg.samples} samples")
    seconds = interleave(device, contestants, cfg.turns)
    rows = speeds(seconds, cfg.batch_size * cfg.samples)
    # The usual way is not timed in parts, but scores by the same function: every second reward.
    sampling, reward = parts["sampling"][1:], parts["reward"][2::2]
    shares = {
        "sampling": summary(a / b for a, b in zip(sampling, seconds["ours"], strict=True)),
        "reward": summary(a / b for a, b in zip(reward, seconds["ours"], strict=True)),
    }
    for name, share in shares.items():
        print(f"  {name:<14}{show(share, '.0%')} of our step")
    return about | {"contestants": rows, "shares": shares}


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
        raise UserError(
            "bench.py: say what to measure, `train`, `decode`, `scst`, `gpu` or `parity`, "
            "before any --flag"
        )
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
