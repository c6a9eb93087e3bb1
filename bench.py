"""How fast training and decoding are beside what people use: the same work, in turns, in one run.

    python bench.py decode --ckpt out/flickr8k/ckpt.pt      # its weights, its own val images
    python bench.py train                                   # COCO's sizes, synthetic captions
    python bench.py train --quick                           # tiny: does it run?

Contestants alternate, so that a shared machine's moods strike all alike; figures are medians over
the turns, with the least and the most, and ratios are taken turn by turn. The table is followed by
one line of JSON with the same figures. Needs transformers.
"""

import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from configurator import UserError, configure, one_of, run, within
from data import Order, Split
from decode import Decoding, generate
from encoder import extras
from model import ClipLM, ModelConfig
from train import Place, keep_freed_memory, loss_sum

# ---------------------------------------------------------------------------------------------
# Taking turns


def hardware(place: Place) -> str:
    """The machine, in a line."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name(place.device)}" if place.kind == "cuda" else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def in_turn(place: Place, contestants: dict, turns: int) -> dict[str, list[float]]:
    """Seconds of each contestant at each turn. A contestant is called with the turn's number."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in (0, *range(turns)):  # the first time is not counted
        for name, work in contestants.items():
            begin = time.perf_counter()
            work(turn)
            if place.kind == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: took[1:] for name, took in seconds.items()}


def spread(values) -> dict:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(s: dict, form: str = ".1f") -> str:
    return f"{s['median']:{form}} ({s['min']:{form}}–{s['max']:{form}})"


def speeds(seconds: dict, work: int) -> list[dict]:
    """For each contestant: work per second, and how many times as long as ours it took."""
    rows = []
    for name, took in seconds.items():
        ratio = [b / a for a, b in zip(seconds["ours"], took, strict=True)]
        per_second = spread(work / s for s in took)
        rows.append({"contestant": name, "captions_per_s": per_second, "times_ours": spread(ratio)})
        print(f"  {name:<14}{show(per_second):>28} captions/s    x {show(spread(ratio), '.2f')}")
    return rows


# ---------------------------------------------------------------------------------------------
# The peer: transformers' GPT-2 with our weights, fed our prefix as ClipCap feeds it


def as_gpt2(model: ClipLM):
    """A GPT2LMHeadModel with the model's decoder; its biases are zero where we have none."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    cfg, p = model.cfg, model.cfg.dropout
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
            n_layer=cfg.n_layer, n_head=cfg.n_head, activation_function="gelu_new",
            embd_pdrop=p, attn_pdrop=p, resid_pdrop=p, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    ours = model.state_dict()
    for name, value in gpt2.state_dict().items():
        if name in ours:  # their linear layers hold the transpose
            turned = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
            value.copy_(ours[name].T if turned else ours[name])
        else:
            assert name.endswith(".bias"), name
            value.zero_()
    weight = model.lm_head.weight
    return gpt2.to(weight.device, weight.dtype).train(model.training)


@torch.inference_mode()
def their_captions(gpt2, model: ClipLM, embeddings, ids, cfg: Decoding) -> list[list[int]]:
    """The captions that GPT-2's own `generate` finds, greedily or by beam search."""
    bos = gpt2.transformer.wte.weight[ids.bos].expand(len(embeddings), 1, -1)
    fed = torch.cat((model.project(embeddings), bos), 1)
    beams = {}
    if cfg.method == "beam":  # "never" stops exactly, as we do, where there is a penalty
        stop = "never" if cfg.length_penalty > 0 else False
        beams = dict(num_beams=cfg.beams, length_penalty=cfg.length_penalty, early_stopping=stop)
    found = gpt2.generate(
        inputs_embeds=fed, attention_mask=torch.ones(fed.shape[:2], device=fed.device),
        do_sample=False, max_new_tokens=cfg.max_len, min_new_tokens=cfg.min_len,
        no_repeat_ngram_size=cfg.no_repeat_ngram, suppress_tokens=[ids.pad, ids.bos, ids.unk],
        pad_token_id=ids.pad, eos_token_id=ids.eos, **beams,
    )  # fmt: skip
    return [[i for i in row if i not in (ids.pad, ids.eos)] for row in found.tolist()]


# ---------------------------------------------------------------------------------------------
# Decoding


@dataclass(frozen=True)
class DecodeBench:
    ckpt: str  # a checkpoint that train.py wrote; random weights would end no caption
    data: str = ""  # the dataset directory; empty: data/<the checkpoint's dataset>
    images: int = 256  # of its val split
    turns: int = 5  # of each contestant
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "float32"  # of autocast: auto bfloat16 float16 float32
    quick: bool = False  # few images and turns: does it run?

    def __post_init__(self):
        within(self, "images turns", 1, 10**6)
        one_of(self, "dtype", "auto bfloat16 float16 float32")


class Recomputing:
    """The model without a cache: every step is a forward pass over all that was written. What it
    passes for its cache are the tokens so far, so that the very same search runs over it."""

    def __init__(self, model: ClipLM):
        self.model, self.cfg = model, model.cfg

    def prefill(self, embeddings):
        return [(embeddings, embeddings)]

    def step(self, tokens, position: int, prefix, cache=None):
        (images, _), *past = [*(prefix or []), *(cache or [])]  # as in the model, either may begin
        tokens = torch.cat([*(seen for seen, _ in past), tokens[:, None]], 1)  # (N, position + 1)
        embeddings = images.repeat_interleave(len(tokens) // len(images), 0)
        places = torch.arange(position + 1, device=tokens.device).expand_as(tokens)
        last = torch.arange(1, len(tokens) + 1, device=tokens.device) * (position + 1) - 1
        logits = self.model(embeddings, tokens, torch.ones_like(tokens), places, last)
        return logits, [*([] if prefix else [(images, images)]), (tokens, tokens)]


class Counting:
    """The model, noting each call: (rows, tokens of each row, tokens cached, is it a step)."""

    def __init__(self, model: ClipLM):
        self.model, self.cfg, self.calls = model, model.cfg, []

    def prefill(self, embeddings):
        self.calls.append((len(embeddings), self.cfg.prefix_length, 0, False))
        return self.model.prefill(embeddings)

    def step(self, tokens, position: int, prefix, cache=None):
        self.calls.append((len(tokens), 1, position, True))
        return self.model.step(tokens, position, prefix, cache)

    def least_seconds(self, rate: float, bandwidth: float) -> float:
        """What the calls take at a matmul rate (FLOP/s) or a bandwidth (numbers/s), whichever
        bounds each. A call reads the weights once, and the keys and values of its rows."""
        cfg, total = self.cfg, 0.0
        for rows, tokens, cached, step in self.calls:
            weights = 12 * cfg.n_embd**2 * cfg.n_layer + step * cfg.vocab_size * cfg.n_embd
            numbers = weights + rows * cached * 2 * cfg.n_embd * cfg.n_layer
            total += max(2 * weights * rows * tokens / rate, numbers / bandwidth)
        return total


def bandwidth(place: Place, numbers: int) -> float:
    """Numbers/s that a matrix-vector product reads of a matrix as large as the weights."""
    a = torch.randn(numbers // 1024, 1024, device=place.device, dtype=place.dtype)
    took = in_turn(place, {"read": lambda _: a @ a[0]}, 12)["read"]
    return a.numel() / sorted(took)[3]


@torch.inference_mode()
def log_p(model: ClipLM, embedding, ids: list[int], tokenizer, L: int) -> float:
    """log p of a caption, its end included, from one forward pass."""
    tokens = torch.tensor([[tokenizer.bos, *ids][:L]], device=embedding.device)
    where = torch.arange(tokens.size(1), device=embedding.device)
    logits = model(embedding[None], tokens, torch.ones_like(tokens), where[None], where)
    target = torch.tensor([*ids, tokenizer.eos][:L], device=embedding.device)
    return -F.cross_entropy(logits[: len(target)].float(), target, reduction="sum").item()


def decode(cfg: DecodeBench) -> dict:
    """Ours beside transformers' `generate` and our own search without a cache."""
    place, content = Place(cfg.device, cfg.dtype), checkpoint.load(cfg.ckpt)
    model, tokenizer = checkpoint.build(content, cfg.ckpt)
    gpt2 = as_gpt2(model.to(place.device))
    split = Split(Path(cfg.data or f"data/{content['meta']['dataset']}"), "val")
    n, turns = (8, 2) if cfg.quick else (min(cfg.images, len(split)), cfg.turns)
    some = np.linspace(0, len(split) - 1, n).astype(np.int64)
    embeddings, size = split.embedding(some).to(place.device), model.cfg
    L = min(40, size.block_size - size.prefix_length)
    about = {"hardware": hardware(place), "ckpt": cfg.ckpt, "dtype": cfg.dtype, "images": n}
    print(
        f"{about['hardware']}\n{cfg.ckpt}: {size.n_layer} layers, {size.n_embd} wide, "
        f"V = {size.vocab_size}, P = {size.prefix_length}; {n} val images, {cfg.dtype}"
    )

    def ours(images, how: Decoding, model=model):
        with place.autocast():
            return generate(model, images, tokenizer, how)

    def theirs(images, how: Decoding):
        with place.autocast():
            return their_captions(gpt2, model, images, tokenizer, how)

    cases = []
    for how in (Decoding(max_len=L), Decoding(method="beam", beams=5, max_len=L)):
        # -- the same captions?
        parts = embeddings.split(64)
        found = [caption.ids for part in parts for (caption,) in ours(part, how)]
        wanted = [ids for part in parts for ids in theirs(part, how)]
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        print(f"\n{how.method}: {same} of {n} captions are the same as transformers'")
        for i, a, b in zip(range(n), found, wanted, strict=True):
            if a != b:
                p, q = (log_p(model, embeddings[i], ids, tokenizer, L) for ids in (a, b))
                print(f"  image {some[i]}: ours ({p:.5f}): {tokenizer.decode(a)}\n"
                      f"  theirs ({q:.5f}): {tokenizer.decode(b)}")  # fmt: skip

        # -- and how fast?
        for batch in (1, 64, 256):
            parts = embeddings[: 24 if batch == 1 else n].split(batch)
            counting, rates = Counting(model), []
            for part in parts:
                ours(part, how, counting)

            def over(decoder, *rest, parts=parts, how=how):
                return lambda turn: [decoder(part, how, *rest) for part in parts]

            def measure(turn, rates=rates, counting=counting):
                weights = 12 * size.n_embd**2 * size.n_layer + size.vocab_size * size.n_embd
                rates.append((place.matmul_rate(), bandwidth(place, weights)))

            contestants = {"ours": over(ours), "transformers": over(theirs)}
            if batch == 64:
                contestants["without cache"] = over(ours, Recomputing(model))
            seconds = in_turn(place, contestants | {"machine": measure}, turns)
            del seconds["machine"]
            least = counting.least_seconds(*map(statistics.median, zip(*rates, strict=True)))
            share = spread(least / s for s in seconds["ours"])
            print(f"{how.method}, batch {batch}: at {show(share, '.0%')} of the machine's bound")
            rows = speeds(seconds, sum(map(len, parts)))
            cases.append({"method": how.method, "batch": batch, "same": same / n,
                          "share_of_bound": share, "contestants": rows})  # fmt: skip
    return about | {"cases": cases}


# ---------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class TrainBench:
    batch_size: int = 64  # images a step
    n_layer: int = 6  # decoder blocks
    n_head: int = 8  # attention heads of a block
    n_embd: int = 512  # width of the decoder
    vocab_size: int = 8192  # subwords
    turns: int = 5  # of each contestant
    device: str = "auto"  # auto cpu mps cuda cuda:1
    quick: bool = False  # a tiny model and batch, two turns: does it run?

    def __post_init__(self):
        within(self, "batch_size n_layer n_head n_embd turns", 1, 10**6)
        within(self, "vocab_size", 8, 10**6)


@dataclass(frozen=True)
class Case:
    """One comparison: a model and a kind of data. P = 10 of a pooled embedding, or a grid of 50."""

    bench: TrainBench
    P: int
    R: int  # captions of an image
    dtype: str

    def model(self) -> ClipLM:
        grid, b = self.P == 50, self.bench
        torch.manual_seed(0)
        return ClipLM(
            ModelConfig(
                vocab_size=b.vocab_size, features="grid" if grid else "pooled",
                embedding_dim=768 if grid else 512, n_positions=self.P if grid else 1,
                n_prefix=self.P, n_layer=b.n_layer, n_head=b.n_head, n_embd=b.n_embd,
                block_size=self.P + 56, dropout=0.1,
            )
        )  # fmt: skip


class Synthetic(Split):
    """What Split holds, made up: random ids and embeddings, and captions of COCO's lengths."""

    def __init__(self, size: ModelConfig, images: int, R: int):
        rng, n = np.random.default_rng(0), images * R
        lengths = 7 + rng.gamma(5, 1, n)  # with the tail: 12.1 tokens, deviation 2.4, at most 50
        tail = rng.random(n) < 0.01
        lengths[tail] = 16 + rng.exponential(6, tail.sum())
        lengths = 1 + lengths.round().clip(5, 50).astype(np.int64)  # bos
        self.tokenizer = SimpleNamespace(pad=0, bos=1, eos=2, unk=3)
        self.tokens = rng.integers(4, size.vocab_size, lengths.sum())
        self.captions = np.concatenate(([0], lengths.cumsum()))
        self.tokens[self.captions[:-1]] = self.tokenizer.bos
        self.rows = self.captions[::R]
        self.lengths, self.n_captions = np.diff(self.rows), np.full(images, R)
        self.clipcap_width = min(int(lengths.mean() + 10 * lengths.std()), int(lengths.max()))
        shape = images, size.n_positions, size.embedding_dim
        self.embeddings = rng.standard_normal(shape, np.float32).astype(np.float16)

    def captions_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the captions of these images."""
        return (rows[:, None] * self.n_captions[0] + np.arange(self.n_captions[0])).flatten()

    def separate(self, captions: np.ndarray, width: int = 0) -> dict:
        """Captions as examples of their own, (N, S), padded to the longest or to `width`; targets
        are -100 at padding. Each has a copy of its image's embedding."""
        pieces = [self.tokens[self.captions[c] : self.captions[c + 1]] for c in captions]
        width = width or max(map(len, pieces))
        tokens = np.full((len(pieces), width), self.tokenizer.pad)
        targets = np.full((len(pieces), width), -100)
        for i, piece in enumerate(pieces):
            tokens[i, : len(piece)] = piece
            targets[i, : len(piece)] = [*piece[1:], self.tokenizer.eos]
        embeddings = self.embedding(captions // self.n_captions[0])
        return {"embeddings": embeddings, "tokens": torch.from_numpy(tokens),
                "targets": torch.from_numpy(targets)}  # fmt: skip


PRECISIONS = ("float32", "bfloat16")
CONTESTANTS = ("ours", "padded", "transformers")


class Trainee:
    """A model, its optimizer and its loss.

    ours: packed rows, images of like length in a batch, as train.py has them.
    padded: the same model on separate examples, padded to the longest of their batch.
    transformers: GPT-2 on separate examples, padded to the one length that ClipCap gives all, ten
        standard deviations above the mean.
    """

    def __init__(self, name: str, case: Case, place: Place):
        keep_freed_memory()  # as train.py does
        self.name, self.place = name, place
        self.model = case.model().to(place.device)
        self.gpt2, params = None, list(self.model.parameters())
        if name == "transformers":
            self.gpt2 = as_gpt2(self.model)
            del self.model.transformer, self.model.lm_head
            params = [*self.model.mapper.parameters(), *self.gpt2.parameters()]
        self.params = params
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, fused=place.kind != "mps")

    def batch(self, split: Synthetic, order: Order, turn: int) -> tuple[dict, int]:
        """A batch and how many targets it has. Separate examples meet at random."""
        rows = order.batch(turn)
        if self.name == "ours":
            return split.pack(rows), int(split.lengths[rows].sum())
        n = len(rows) * split.n_captions[0]
        drawn = np.random.default_rng(0).permutation(len(split.captions) - 1)
        captions = drawn[turn * n : (turn + 1) * n]
        width = split.clipcap_width if self.name == "transformers" else 0
        return split.separate(captions, width), int(np.diff(split.captions)[captions].sum())

    def loss(self, batch: dict):
        """Cross-entropy, summed over the targets."""
        if self.name == "ours":
            return loss_sum(self.model, batch)
        embeddings, tokens, targets = batch["embeddings"], batch["tokens"], batch["targets"]
        if self.name == "padded":
            places = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
            every = torch.arange(tokens.numel(), device=tokens.device)
            logits = self.model(embeddings, tokens, torch.ones_like(tokens), places, every)
        else:
            prefix, words = self.model.project(embeddings), self.gpt2.transformer.wte(tokens)
            mask = F.pad(targets >= 0, (prefix.size(1), 0), value=True)
            fed = torch.cat((prefix.to(words.dtype), words), 1)
            logits = self.gpt2(inputs_embeds=fed, attention_mask=mask).logits[:, prefix.size(1) :]
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")

    def step(self, batch: dict, targets: int) -> None:
        with self.place.autocast():
            loss = self.loss(self.place.put(batch))
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peak_memory(name: str, case: Case) -> float:
    """MB that three steps take at most, beyond the libraries; run in a process of its own."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - none has it for free

    def peak() -> float:
        if place.kind == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        if status.is_file():  # Linux: there getrusage would count the parent's memory as well
            lines = status.read_text().splitlines()
            return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes

    place = Place(case.bench.device, case.dtype)
    before, trainee = peak(), Trainee(name, case, place)
    split = Synthetic(case.model().cfg, 3 * case.bench.batch_size, case.R)
    order = Order(0, split.lengths, case.bench.batch_size)
    for step in range(3):
        trainee.step(*trainee.batch(split, order, step))
    return peak() - before


def peaks_of(cases: list[Case]) -> list[list[float]]:
    """The peak memory of each contestant in each case."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as fresh:
        return [[fresh.submit(peak_memory, name, case).result() for name in CONTESTANTS]
                for case in cases]  # fmt: skip


def compare(case: Case, peaks: list[float]) -> dict:
    """Times a step of each, as many captions a step, and their losses on the very same batch."""
    bench = case.bench
    place = Place(bench.device, case.dtype)
    trainees = [Trainee(name, case, place) for name in CONTESTANTS]
    split = Synthetic(case.model().cfg, max(32, bench.turns) * bench.batch_size, case.R)
    order = Order(0, split.lengths, bench.batch_size)
    rows = order.batch(0)
    losses, same = [], (split.pack(rows), split.separate(split.captions_of(rows)))
    for t in trainees:
        for model in filter(None, (t.model, t.gpt2)):
            model.eval()  # no dropout
        with torch.no_grad(), place.autocast():
            batch = place.put(same[t.name != "ours"])
            losses.append(t.loss(batch).item() / split.lengths[rows].sum())
        for model in filter(None, (t.model, t.gpt2)):
            model.train()

    def work(t: Trainee):
        if t.name == "ours":  # packs as it goes; the others find their batches ready
            return lambda turn: t.step(*t.batch(split, order, turn))
        ready = [t.batch(split, order, turn) for turn in range(bench.turns)]
        return lambda turn: t.step(*ready[turn])

    rates: list[float] = []
    contestants = {t.name: work(t) for t in trainees}
    contestants["machine"] = lambda turn: rates.append(place.matmul_rate())
    seconds = in_turn(place, contestants, bench.turns)
    del seconds["machine"]
    counts = [int(split.lengths[order.batch(turn)].sum()) for turn in range(bench.turns)]
    flops = [trainees[0].model.flops(bench.batch_size, n, n) for n in counts]
    rate = statistics.median(rates)
    mfu = spread(f / s / rate for f, s in zip(flops, seconds["ours"], strict=True))
    print(
        f"\nP = {case.P}, {case.R} captions an image, {case.dtype}: MFU {show(mfu, '.0%')} of "
        f"{rate / 1e9:.0f} GFLOP/s; {show(spread(1e3 * s for s in seconds['ours']))} ms/step"
    )
    rows = speeds(seconds, case.R * bench.batch_size)
    for row, loss, peak in zip(rows, losses, peaks, strict=True):
        row |= {"loss": loss, "peak_mb": peak}
    print("  loss " + ", ".join(f"{x:.6f}" for x in losses)
          + "; peak memory " + ", ".join(f"{x:.0f}" for x in peaks) + " MB")  # fmt: skip
    return {"P": case.P, "captions_an_image": case.R, "dtype": case.dtype, "mfu": mfu,
            "matmul_gflops": rate / 1e9, "contestants": rows}  # fmt: skip


def train(cfg: TrainBench) -> dict:
    """Our step beside the same model on padded examples, and beside transformers' GPT-2."""
    if cfg.quick:
        cfg = replace(cfg, batch_size=16, n_layer=2, n_head=2, n_embd=64, vocab_size=1000, turns=2)
    about = {
        "hardware": hardware(Place(cfg.device, "float32")),
        "batch_size": cfg.batch_size,
        "n_layer": cfg.n_layer,
        "n_embd": cfg.n_embd,
        "vocab_size": cfg.vocab_size,
    }
    print(f"{about['hardware']}\n{cfg.n_layer} layers, {cfg.n_embd} wide, V = {cfg.vocab_size}, "
          f"{cfg.batch_size} images a step")  # fmt: skip
    cases = [Case(cfg, *rest) for rest in itertools.product((10, 50), (5, 1), PRECISIONS)]
    cases = cases[:: 7 if cfg.quick else 1]  # the first and the last
    peaks = peaks_of(cases)
    return about | {"cases": [compare(*each) for each in zip(cases, peaks, strict=True)]}


# ---------------------------------------------------------------------------------------------

MODES = {"train": (TrainBench, train), "decode": (DecodeBench, decode)}


def main(argv: list[str]) -> dict:
    """Runs `bench.py <mode> [--flags]`. Returns what the last line says."""
    if not argv or argv[0] not in MODES:
        help_asked = {"-h", "--help"} & set(argv)
        if help_asked:
            print(__doc__.strip())
            raise SystemExit(0)
        raise UserError("bench.py: say what to measure, `train` or `decode`, before any --flag")
    settings, mode = MODES[argv[0]]
    cfg = configure(settings, argv[1:], __doc__, files=False)
    extras()
    result = mode(cfg)
    print(json.dumps({"bench": argv[0], **result}))
    return result


if __name__ == "__main__":
    run(main, sys.argv[1:])
