"""What a GPU does with this code, measured in a few minutes: modes of bench.py.

    python bench.py gpu --minutes=5 --out=out/bench_gpu.jsonl
    python bench.py parity                                      # the same run on CPU and GPU

`gpu` goes through SECTIONS, the most valuable first, as long as there is time. Each prints its
table and adds a line of JSON to `--out` when it ends; one that fails is reported, the next ones
still run, and the command ends with status 1. Nothing is needed but the code: data, weights and
photos are invented, and a model trained for a moment writes captions that end by themselves.
`--quick` runs all of it with tiny sizes, on a CPU too.
"""

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bench
import train
from bench import interleave, show, speeds, summary
from configurator import Config, within
from data import Meta, Order, Split, write_array, write_split
from decode import Decoding, generate, load_captioner
from parts.common import UserError, append, read_log, write_text
from parts.device import Device
from parts.encoder import Encoder
from parts.sources import Record
from prepare import train_tokenizer

# ---------------------------------------------------------------------------------------------
# The runner


@dataclass(frozen=True)
class GpuBench:
    minutes: float = 5.0  # a section begins only if it should end within them
    out: str = "out/bench_gpu.jsonl"  # gets a line of JSON per section
    sections: str = ""  # only these, separated by spaces; empty: all
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "auto"  # of autocast: auto bfloat16 float16 float32
    quick: bool = False  # tiny sizes: does it run?
    readme: str = ""  # measure nothing: fill this file's tables from `out`

    def __post_init__(self):
        within(self, "minutes", 0.0, 600.0)
        unknown = set(self.sections.split()) - set(SECTIONS)
        if unknown:
            raise UserError(f"sections: no {' '.join(unknown)}; there are {' '.join(SECTIONS)}")


class Lab:
    """What the sections share: device, sizes, a folder for what they make, and what failed."""

    def __init__(self, device: Device, quick: bool, folder: Path):
        self.device, self.quick, self.folder = device, quick, folder
        self.size = bench.TrainBench(n_layer=12, n_head=12, n_embd=768, vocab_size=8192)
        self.images = {(10, 5): 256, (10, 1): 1024, (50, 5): 128, (50, 1): 256}  # (P, R): of a step
        self.turns, self.steps = 5, 4  # a turn is some steps, so that the GPU never waits
        if quick:
            self.size = replace(self.size, n_layer=1, n_head=2, n_embd=32, vocab_size=512)
            self.images = dict.fromkeys(self.images, 4)
            self.turns, self.steps = 1, 2
        self.data, self.ckpt = folder / "data", folder / "run/ckpt.pt"
        self.failures: list[str] = []

    def attempt(self, name: str, work: Callable):
        """Return what `work()` returns, or None after printing why it failed. Free its memory."""
        result = None
        try:
            result = work()
        except Exception:  # noqa: BLE001 - whatever it is, what follows is still measured
            self.failures.append(name)
            print(f"FAILED: {name}\n{traceback.format_exc()}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def compile(self, function):
        """Return it as train.py compiles it; without a GPU, only traced."""
        torch._dynamo.config.recompile_limit = 64  # all sections compile the same function
        backend = "inductor" if self.device.type == "cuda" else "eager"
        return torch.compile(function, dynamic=True, backend=backend)

    def warm_up(self, name: str, work: Callable) -> float | None:
        """Call work(0) twice. Return the MB that the second call held at most beyond what was held
        before, 0 on a CPU; None if it failed."""

        def twice() -> float:
            begin = time.perf_counter()
            work(0)
            print(f"  {name}: first turn {time.perf_counter() - begin:.1f} s", flush=True)
            if self.device.type != "cuda":
                return 0.0
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work(0)
            return (torch.cuda.max_memory_allocated() - before) / 2**20

        return self.attempt(name, twice)


def dtype_of(device: Device) -> str:
    """Return the name of the device's precision, as a setting has it."""
    return str(device.dtype).removeprefix("torch.")


def gpu(cfg: GpuBench) -> dict:
    """Run the sections that fit into the time. Return their results by name."""
    begin = time.monotonic()
    out = Path(cfg.out)
    if cfg.readme:
        return fill(Path(cfg.readme), out)
    device = Device(cfg.device, cfg.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"hardware": bench.hardware(device), "dtype": dtype_of(device)}
    print(f"{about['hardware']}, {about['dtype']}", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(device, cfg.quick, Path(folder))
        for name in cfg.sections.split() or SECTIONS:
            seconds, section = SECTIONS[name]
            left = 60 * cfg.minutes - (time.monotonic() - begin)
            if left < seconds and not cfg.quick:
                print(f"\n== {name}: skipped, {left:.0f} s left, it takes {seconds}", flush=True)
                continue
            print(f"\n== {name}, {left:.0f} s left", flush=True)
            started = time.monotonic()
            result = lab.attempt(name, partial(section, lab))
            took = time.monotonic() - started
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            results[name] = result
            row = {"section": name, "took_s": took, "graphs": graphs, "result": result}
            append(out, json.dumps(about | row) + "\n")
            print(f"   {name} took {took:.1f} s; {graphs} graphs compiled so far", flush=True)
    return about | {"sections": results, "failed": lab.failures}


# ---------------------------------------------------------------------------------------------
# The machine


def machine(lab: Lab) -> dict:
    """Measure the rate of a matrix product and the bandwidth of a copy: the two bounds."""
    rate, copied = lab.device.matmul_rate(), bench.copied_per_second(lab.device)
    print(f"   {rate / 1e12:.1f} TFLOP/s, copies {copied / 1e9:.0f} GB/s")
    return {"matmul_tflops": rate / 1e12, "copy_gb_per_s": copied / 1e9}


# ---------------------------------------------------------------------------------------------
# Training


def training(lab: Lab, P: int) -> list[dict]:
    """Time a step of ours, compiled and not, of padded separate examples, and of ClipCap's way."""
    trainees = [
        bench.Trainee(name, bench.Case(lab.size, P, 5, ""), lab.device)
        for name in bench.CONTESTANTS
    ]
    ours, padded, theirs = trainees
    entrants = {
        "ours": (ours, ours.model),
        "ours compiled": (ours, lab.compile(ours.model)),
        "padded": (padded, padded.model),
        "padded compiled": (padded, lab.compile(padded.model)),
        "transformers": (theirs, theirs.model),
    }
    cases = []
    for R in (5, 1):
        images = lab.images[P, R]
        split = bench.Synthetic(ours.model.cfg, 8 * images, R)
        order = Order(0, split.lengths, images)
        print(f"P = {P}, {R} captions per image, {images} images per step", flush=True)

        # -- a first turn of each, which compiles; one that fails is left out
        usable, peaks = {}, {}
        for name, entrant in entrants.items():
            first = bench.turns_of(split, order, 1, lab.steps, *entrant)
            peak = lab.warm_up(f"P = {P}, R = {R}, {name}", first)
            if peak is not None:
                usable[name], peaks[name] = entrant, peak

        # -- and the race
        rows, rate = bench.race(lab.device, usable, split, order, lab.turns, lab.steps)
        for row in rows:
            row["peak_mb"] = peaks[row["contestant"]]
        cases.append(
            {"P": P, "R": R, "images": images, "matmul_tflops": rate / 1e12, "contestants": rows}
        )
    return cases


def profile(lab: Lab) -> dict:
    """Return and print the ten kernels that take most of a training step, compiled and not."""
    trainee = bench.Trainee("ours", bench.Case(lab.size, 10, 5, ""), lab.device)
    split = bench.Synthetic(trainee.model.cfg, 8 * lab.images[10, 5], 5)
    order = Order(0, split.lengths, lab.images[10, 5])
    activity = torch.profiler.ProfilerActivity.CPU
    time_of = "self_cpu_time_total"  # microseconds
    if lab.device.type == "cuda":
        activity = torch.profiler.ProfilerActivity.CUDA
        time_of = "self_device_time_total"
    tables = {}
    for name, model in (("compiled", lab.compile(trainee.model)), ("eager", trainee.model)):
        work = bench.turns_of(split, order, 3, lab.steps, trainee, model)
        wall = interleave(lab.device, {name: work}, 3)[name]
        with torch.profiler.profile(activities=[activity]) as profiler:
            interleave(lab.device, {name: work}, 1)  # with one to warm up: two turns
        kernels = sorted(
            (
                (getattr(event, time_of), event.count, event.key)
                for event in profiler.key_averages()
                if getattr(event, time_of) > 0 and not event.is_user_annotation
            ),
            reverse=True,
        )
        steps = 2 * lab.steps
        busy = sum(k[0] for k in kernels) / 1e3 / steps
        step = 1e3 * statistics.median(wall) / lab.steps
        print(f"{name}: {step:.1f} ms per step, kernels {busy:.1f} ms, "
              f"{sum(k[1] for k in kernels) // steps} of them")  # fmt: skip
        rows = []
        for total, count, key in kernels[:10]:
            ms = total / 1e3 / steps
            rows.append({"kernel": key, "ms_per_step": ms, "per_step": count / steps})
            print(f"  {ms:7.2f} ms  {ms / busy:4.0%}  {count / steps:6.0f} x  {key[:90]}")
        tables[name] = {"ms_per_step": step, "kernel_ms": busy, "kernels": rows}
    return tables


# ---------------------------------------------------------------------------------------------
# A run of train.py, and decoding with its checkpoint


def invent(folder: Path, images: int, vocab_size: int) -> None:
    """Write a dataset of invented captions, which a model learns in a few hundred steps.

    An image has one of 200 topics, which its embedding shows. The topic says which forty words its
    captions use and how long they are: 5 to 17 words, of one or two tokens.
    """
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((200, 512))
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words = np.array(["".join(three) for three in rng.choice(syllables, (200 * 40, 3))])
    frequencies = 1 / np.arange(1, 41)
    frequencies /= frequencies.sum()
    splits = {}
    embeddings = {}
    for split, n in (("train", images), ("val", max(8, images // 8))):
        topic = rng.integers(200, size=n)
        records = []
        for number in range(n):
            lengths = 5 + topic[number] % 12 + rng.integers(2, size=5)
            chosen = words[40 * topic[number] + rng.choice(40, lengths.sum(), p=frequencies)]
            parts = np.split(chosen, lengths.cumsum()[:-1])
            records.append(Record(number, f"{split}{number}.jpg", [" ".join(p) for p in parts]))
        splits[split] = records
        noise = rng.standard_normal((n, 1, 512))
        embeddings[split] = (topics[topic][:, None] + 0.3 * noise).astype(np.float16)
    tokenizer = train_tokenizer([c for r in splits["train"] for c in r.captions], vocab_size)
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    counts = {}
    for split, records in splits.items():
        write_array(folder / f"{split}_embeddings.npy", embeddings[split])
        counts[split] = write_split(folder, split, records, tokenizer)
    meta = Meta(
        dataset="invented", source="", captions="", images="", encoder="", features="pooled",
        grid=0, n_positions=1, embedding_dim=512, normalize=True, lowercase=False,
        vocab_size=len(tokenizer), splits=counts,
    )  # fmt: skip
    meta.write(folder)


def settings(lab: Lab, **changes) -> dict:
    """Return the settings of a run on invented captions, with the model that `training` times."""
    size = lab.size
    return dict(
        dataset="invented", data=str(lab.data), out_dir=str(lab.folder / "run"), n_prefix=10,
        n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd, block_size=66, dropout=0.1,
        batch_size=lab.images[10, 5], device=str(lab.device.torch_device),
        dtype=dtype_of(lab.device),
    ) | changes  # fmt: skip


def run(lab: Lab) -> dict:
    """Train by train.py itself. Return the speed that its log shows and its last scores."""
    images, steps = (64, 6) if lab.quick else (8192, 200)
    invent(lab.data, images, lab.size.vocab_size)
    changes = dict(max_iters=steps, eval_interval=steps, warmup_iters=steps // 10)
    changes |= dict(log_interval=max(1, steps // 20), eval_images=256)
    cfg = Config(**settings(lab, compile=lab.device.type == "cuda", **changes))
    scores = lab.attempt("train.py", lambda: train.main(cfg))
    if scores is None:  # what follows needs a checkpoint
        cfg = replace(cfg, compile=False)
        scores = train.main(cfg)
    rows = [row for row in read_log(lab.folder / "run/log.jsonl") if "loss" in row]
    names = "ms_per_step captions_per_s mfu waiting".split()
    figures = {name: summary(row[name] for row in rows[2:]) for name in names}  # compiled by then
    figures |= {"loss": rows[-1]["loss"], "scores": scores, "compiled": cfg.compile}
    print(f"  {show(figures['ms_per_step'])} ms per step, MFU {show(figures['mfu'], '.1%')}, "
          f"waiting for batches {show(figures['waiting'], '.1%')}")  # fmt: skip
    return figures


def decoding(lab: Lab) -> list[dict]:
    """Compare greedy and beam search with transformers': bench.py's own, with `run`'s model."""
    return bench.decode(
        bench.DecodeBench(
            ckpt=str(lab.ckpt), data=str(lab.data), images=1024, rounds=1, turns=3,
            batches="4 8" if lab.quick else "64 1 1024 256",
            device=str(lab.device.torch_device), dtype=dtype_of(lab.device),
        )
    )["cases"]  # fmt: skip


def scst(lab: Lab) -> dict:
    """Time a self-critical step: bench.py's own comparison, with the checkpoint of `run`."""
    return bench.self_critical(
        bench.SelfCriticalBench(
            ckpt=str(lab.ckpt), data=str(lab.data), batch_size=4 if lab.quick else 64,
            turns=lab.turns, device=str(lab.device.torch_device), dtype=dtype_of(lab.device),
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Encoding


def encode(lab: Lab) -> dict:
    """Time a ViT-B/32 with random weights: the model alone, and from JPEG files, which 16 threads
    read and resize."""
    import transformers
    from PIL import Image

    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                image_size=32, patch_size=16)  # fmt: skip
    config = transformers.CLIPVisionConfig(**tiny if lab.quick else {"patch_size": 32})
    side, batch = config.image_size, 8 if lab.quick else 256
    folder = lab.folder / "vit"
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    encoder = Encoder(str(folder), device=lab.device.torch_device)
    rng = np.random.default_rng(0)
    files = []
    for i in range(64):
        files.append((folder / f"{i}.jpg",))
        small = Image.fromarray(rng.integers(256, size=(15, 20, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(files[-1][0], quality=90)
    batches = [files * (batch // 64) or files[:batch]] * 4
    pixels, _ = encoder.read(batches[0])

    def alone(turn: int) -> None:
        for _ in batches:
            encoder.encode(pixels).cpu()

    def from_files(turn: int) -> None:
        for _ in encoder.stream(batches, 16):
            pass

    contestants = {"ours": alone, "from files": from_files}
    return speeds(interleave(lab.device, contestants, 3), 4 * batch)


SECTIONS = {  # name: (seconds it takes at most, function); `run` compiles for `training` too
    "machine": (5, machine),
    "run": (60, run),
    "decoding": (40, decoding),
    "training": (40, partial(training, P=10)),
    "profile": (15, profile),
    "grid": (70, partial(training, P=50)),
    "scst": (30, scst),
    "encode": (30, encode),
}


# ---------------------------------------------------------------------------------------------
# The README's tables

BEGIN, END = "<!-- bench.py gpu -->", "<!-- end of bench.py gpu -->"


def fill(readme: Path, out: Path) -> dict:
    """Put the newest figures of `out` between the two marks in a README. Raise UserError if it
    has no marks, or if there are no figures."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{readme} lacks the lines {BEGIN} and {END}")
    if not out.is_file():
        raise UserError(f"{out} not found: run `python bench.py gpu` first")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = {row["section"]: row["result"] for row in rows if row["result"] is not None}
    about = rows[-1]
    lines = [f"Measured on {about['hardware']}, {about['dtype']}: `python bench.py gpu`.", ""]
    if own := found.get("run"):
        how = "compiled" if own["compiled"] else "not compiled"
        lines += [
            f"`train.py` itself (12 layers, 768 wide, V = 8,192, P = 10, 256 images with five "
            f"captions each, {how}): {own['captions_per_s']['median']:,.0f} captions/s, MFU "
            f"{own['mfu']['median']:.0%}.",
            "",
        ]
    cases = [*found.get("training", []), *found.get("grid", [])]
    if cases:
        lines += training_table(cases)
    lines += decoding_table(found.get("decoding", []))
    write_text(readme, "\n".join([before + begin, *lines, end + after]))
    return {"readme": str(readme), "sections": list(found)}


def training_table(cases: list[dict]) -> list[str]:
    """Return a table of training steps, one row per P and R."""
    lines = [
        "| P | R | images | captions/s | ms per step | MFU | MFU, not compiled | speed vs padded, "
        "compiled | speed vs ClipCap's way |",
        "|" + "---|" * 9,
    ]
    for case in cases:
        by_name = {row["contestant"]: row for row in case["contestants"]}
        best = by_name.get("ours compiled", by_name["ours"])
        cells = [case["P"], case["R"], case["images"]]
        cells.append(f"{best['captions_per_s']['median']:,.0f}")
        cells.append(show(best["ms_per_step"]))
        cells += [f"{row['mfu']['median']:.0%}" for row in (best, by_name["ours"])]
        for name in ("padded compiled", "transformers"):
            ratio = "failed"
            if name in by_name:
                medians = [row["ms_per_step"]["median"] for row in (by_name[name], best)]
                ratio = f"{medians[0] / medians[1]:.2f}"
            cells.append(ratio)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def decoding_table(cases: list[dict]) -> list[str]:
    """Return a table of decoding, one row per method and batch."""
    lines = [
        "| captions/s | ours | `transformers` | ratio | same captions | of the bandwidth |",
        "|" + "---|" * 6,
    ]
    for case in cases:
        ours, theirs = case["contestants"]
        speed = [f"{row['captions_per_s']['median']:,.0f}" for row in (ours, theirs)]
        cells = [f"{case['method']}, batch {case['batch']}", *speed]
        cells += [show(theirs["times_ours"], ".2f"), f"{case['same']:.1%}"]
        cells.append(f"{case['of_bandwidth']:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


# ---------------------------------------------------------------------------------------------
# The same run on a CPU and on a GPU


@dataclass(frozen=True)
class ParityBench:
    steps: int = 20  # whose losses are compared
    device: str = "auto"  # what is compared with the CPU
    quick: bool = False  # a tiny model and few images

    def __post_init__(self):
        within(self, "steps", 1, 1000)


def parity(cfg: ParityBench) -> dict:
    """Compare a CPU and a GPU in float32: losses, captions, and a run that is killed and resumed.

    What differs is printed, and by how much. Two runs on the GPU show its own noise.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # before the GPU's first use: float32 means float32
    device = Device(cfg.device, "float32")
    print(bench.hardware(device), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(device, cfg.quick, Path(folder))
        if not cfg.quick:
            lab.size = replace(lab.size, n_layer=6, n_head=8, n_embd=512, vocab_size=2048)
            lab.images = dict.fromkeys(lab.images, 64)
        invent(lab.data, 64 if cfg.quick else 2048, lab.size.vocab_size)
        parts = {
            "losses": partial(same_losses, lab, cfg.steps),
            "captions": partial(same_captions, lab),
            "resume": partial(same_after_a_kill, lab),
            "waits": partial(waits, lab),
        }
        results = {name: lab.attempt(name, part) for name, part in parts.items()}
    return {"hardware": bench.hardware(device), **results, "failed": lab.failures}


def short(lab: Lab, name: str, **changes) -> dict:
    """Return settings of a short run in the folder `name`, without the compiler."""
    every_step = dict(compile=False, log_interval=1, eval_images=16)
    return settings(lab, out_dir=str(lab.folder / name), **every_step, **changes)


def trained(settings: dict) -> tuple[list[float], dict]:
    """Train. Return the loss of each step and the last weights."""
    cfg = Config(**settings)
    train.main(cfg)
    losses = [row["loss"] for row in read_log(cfg.run_dir / "log.jsonl") if "loss" in row]
    return losses, torch.load(cfg.run_dir / "last.pt", map_location="cpu")["model"]


def largest_difference(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def same_losses(lab: Lab, steps: int) -> dict:
    """Compare the loss of each step, without dropout: each device draws its own."""
    changes = dict(max_iters=steps, eval_interval=steps, dropout=0.0)
    cpu, _ = trained(short(lab, "cpu", **changes) | {"device": "cpu"})
    one, _ = trained(short(lab, "one", **changes))
    two, _ = trained(short(lab, "two", **changes))
    for step, row in enumerate(zip(cpu, one, two, strict=True), 1):
        print(f"  step {step:2}: CPU {row[0]:.7f}, here {row[1]:.7f}, again {row[2]:.7f}")
    result = {"cpu": largest_difference(cpu, one), "again": largest_difference(one, two)}
    print(f"losses of {steps} steps differ by at most {result['cpu']:.1e} of the CPU's; "
          f"a second run here differs by {result['again']:.1e}", flush=True)  # fmt: skip
    return result


def same_captions(lab: Lab) -> dict:
    """Caption the val images on both, with a model that was trained for a moment."""
    steps = 6 if lab.quick else 300
    trained(short(lab, "run", max_iters=steps, eval_interval=steps))
    split = Split(lab.data, "val")
    embeddings = split.embedding(np.arange(len(split)))
    result = {}
    for how in (Decoding(max_len=40), Decoding(method="beam", beams=5, max_len=40)):
        found = []
        for place in ("cpu", lab.device.torch_device):
            model, tokenizer, _ = load_captioner(str(lab.ckpt))
            model.to(place)
            found.append(
                [c for part in embeddings.split(64)
                 for (c,) in generate(model, part.to(place), tokenizer, how)]
            )  # fmt: skip
        pairs = list(zip(*found, strict=True))
        differ = [i for i, (a, b) in enumerate(pairs) if a.ids != b.ids]
        off = max(abs(a.logprob - b.logprob) for a, b in pairs if a.ids == b.ids)
        print(f"{how.method}: {len(pairs) - len(differ)} of {len(pairs)} captions are the same; "
              f"their log p differs by at most {off:.1e}", flush=True)  # fmt: skip
        for i in differ[:10]:
            a, b = pairs[i]
            print(f"  image {i}, CPU {a.logprob:.6f}: {tokenizer.decode(a.ids)}")
            print(f"  image {i}, here {b.logprob:.6f}: {tokenizer.decode(b.ids)}")
        result[how.method] = {"images": len(pairs), "differ": len(differ), "logprob": off}
    return result


def same_after_a_kill(lab: Lab) -> dict:
    """Kill train.py between two checkpoints, resume, and compare with a run that was left alone."""
    changes = dict(max_iters=60, eval_interval=10)
    whole, weights = trained(short(lab, "whole", **changes))
    again, _ = trained(short(lab, "again", **changes))
    interrupted = short(lab, "parts", **changes)
    flags = [f"--{name}={value}" for name, value in interrupted.items()]
    command = [sys.executable, train.__file__, *flags]
    log = lab.folder / "parts/log.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    logged = 0
    while process.poll() is None and logged < 25:
        time.sleep(0.002)
        if log.is_file():
            logged = log.read_text().count('"loss"')
    process.kill()
    struck = process.wait() == -signal.SIGKILL
    kept = torch.load(lab.folder / "parts/last.pt", map_location="cpu")["step"]
    losses, resumed = trained(interrupted | {"resume": True})
    result = {
        "struck": struck,
        "logged": logged,
        "kept": kept,
        "losses": largest_difference(whole, losses),
        "weights": max((weights[k] - resumed[k]).abs().max().item() for k in weights),
        "again": largest_difference(whole, again),
    }
    print(f"killed after {logged} steps ({struck}), resumed after {kept}: losses differ by at most "
          f"{result['losses']:.1e}, weights by {result['weights']:.1e}; "
          f"a second run left alone by {result['again']:.1e}", flush=True)  # fmt: skip
    return result


def waits(lab: Lab) -> dict:
    """Count how often the CPU waits for the GPU in ten updates, without a log line."""
    training = train.Training(Config(**settings(lab, compile=False, ema=0.9)), lab.device)
    steps = list(training.batches(range(12)))

    def update(steps) -> None:
        for micro_batches, counts in steps:
            training.update(micro_batches, counts, 1e-3)
            training.progress.step += 1
            training.average.update(training.progress.step)

    update(steps[:2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if lab.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        update(steps[2:])
        if lab.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    texts = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    print(f"{len(texts)} synchronisations in 10 updates {texts[:3]}", flush=True)
    training.read_norms()
    return {"synchronisations": len(texts), "updates": 10}


MODES = {"gpu": (GpuBench, gpu), "parity": (ParityBench, parity)}
