"""What a GPU does with this code, measured in a few minutes: modes of bench.py.

    python bench.py gpu --minutes=8 --out=out/bench_gpu.jsonl
    python bench.py parity                                      # the same run on CPU and GPU

`gpu` goes through SECTIONS, the most valuable first, as long as there is time. Each prints its
table and adds a line of JSON to `--out` when it ends; one that fails is reported, the next ones
still run, and the command ends with status 1. Nothing is needed but the code: data, weights and
photos are invented, and a model trained briefly writes captions that end by themselves.
`--quick` runs all of it with tiny sizes, on a CPU too.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bench
import train
from configurator import Config, refuse
from data import Split
from decode import Decoding, generate, load_captioner
from parts.common import UserError, append, read_log, write_text
from parts.device import Device
from parts.encoder import Encoder

# ---------------------------------------------------------------------------------------------
# The runner


@dataclass(frozen=True, kw_only=True)
class GpuBench(bench.Bench):
    minutes: float = 8.0  # a section begins only if it should end within them
    out: str = "out/bench_gpu.jsonl"  # gets a line of JSON per section
    sections: str = ""  # only these, separated by spaces; empty: all
    dtype: str = "auto"  # of autocast: auto bfloat16 float16 float32
    readme: str = ""  # measure nothing: fill this file's tables from `out`

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.sections.split()) - set(SECTIONS)
        if unknown:
            refuse("sections", f"some of {' '.join(SECTIONS)}", " ".join(unknown))


class Lab:
    """What the sections share: the device, the decoder, a folder, and what failed."""

    def __init__(self, cfg: bench.Bench, dtype: str, folder: Path, **sizes):
        self.device = Device(cfg.device, dtype)
        self.folder, self.data, self.ckpt = folder, folder / "data", f"{folder}/run/ckpt.pt"
        self.failed: list[str] = []
        self.dtype = str(self.device.dtype).removeprefix("torch.")
        common = dict(device=str(self.device.torch_device), quick=cfg.quick)
        sizes |= dict(dtypes=(self.dtype,), compile=True, steps=4)
        self.size = bench.TrainBench(**common, **sizes).resized()
        self.trained = common | dict(ckpt=self.ckpt, data=str(self.data), dtype=self.dtype)


def gpu(cfg: GpuBench) -> dict:
    """Run the sections that fit into the time. Return their rows by name."""
    begin = time.monotonic()
    out = Path(cfg.out)
    if cfg.readme:
        return fill_readme(Path(cfg.readme), out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(n_layer=12, n_head=12, n_embd=768, batch_size=256)
        lab = Lab(cfg, cfg.dtype, Path(folder), **sizes)
        about = {"hardware": bench.hardware(lab.device), "dtype": lab.dtype}
        print(*about.values(), sep=", ")
        for name in cfg.sections.split() or SECTIONS:
            seconds, section = SECTIONS[name]
            left = 60 * cfg.minutes - (time.monotonic() - begin)
            if left < seconds and not cfg.quick:
                print(f"\n== {name}: skipped, {left:.0f} s left, it takes {seconds}", flush=True)
                continue
            print(f"\n== {name}, {left:.0f} s left", flush=True)
            started = time.monotonic()
            results[name] = bench.attempt(name, partial(section, lab), lab.failed)
            took = time.monotonic() - started
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            row = {"section": name, "quick": cfg.quick, "took_s": took, "graphs": graphs}
            append(out, json.dumps(about | row | {"rows": results[name]}) + "\n")
            print(f"   {name} took {took:.1f} s; {graphs} graphs compiled so far", flush=True)
    return about | {"sections": results, "failed": lab.failed}


BEGIN, END = "<!-- bench.py gpu -->", "<!-- end of bench.py gpu -->"


def fill_readme(readme: Path, out: Path) -> dict:
    """Put the newest tables of `out` between the two marks in a README: those of the last row's
    hardware, precision and sizes. Raise UserError if there are no marks, or no figures."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{readme} lacks the lines {BEGIN} and {END}")
    text = out.read_text(encoding="utf-8") if out.is_file() else ""
    rows = [row for row in map(json.loads, text.splitlines()) if row["rows"]]
    if not rows:
        raise UserError(f"no figures in {out}: run `python bench.py gpu` first")
    setups = [(row["hardware"], row["dtype"], row.get("quick", False)) for row in rows]
    hardware, dtype, quick = setups[-1]
    pairs = zip(rows, setups, strict=True)
    found = {row["section"]: row["rows"] for row, setup in pairs if setup == setups[-1]}
    command = "python bench.py gpu" + " --quick" * quick
    lines = [f"Measured on {hardware}, {dtype}: `{command}`."]
    for name, measured in found.items():
        if name != "profile":
            lines += [f"\n*{name.capitalize()}*\n", bench.table(measured)]
    write_text(readme, "\n".join([before + begin, *lines, "", end + after]))
    return {"readme": str(readme), "sections": list(found)}


# ---------------------------------------------------------------------------------------------
# The sections: each returns rows, and prints its table


def machine(lab: Lab) -> list[dict]:
    """Measure the rate of a matrix product and the bandwidth of a copy: the two bounds."""
    rate, copied = lab.device.matmul_rate(), bench.copied_per_second(lab.device)
    return bench.shown([{"matmul_tflops": rate / 1e12, "copy_gb_per_s": copied / 1e9}])


def run(lab: Lab) -> list[dict]:
    """Train by train.py itself, with a batch of images and with one of twice as many. Return the
    speed that its log shows, without the first third, and its last scores."""
    steps = 6 if lab.size.quick else 200
    compiles = lab.device.type == "cuda"
    names = "captions_per_s ms_per_step mfu waiting".split()
    rows = []
    for images in (lab.size.batch_size, 2 * lab.size.batch_size):
        size = replace(lab.size, batch_size=images)
        changes = dict(log_interval=steps // 6, dropout=0.1)
        practise = partial(bench.practise, size, lab.folder, steps, **changes)
        done = bench.attempt("train.py", partial(practise, compile=compiles), lab.failed)
        cfg, scores = done or practise(compile=False)  # the next sections need a checkpoint
        lines = [line for line in read_log(cfg.run_dir / "log.jsonl") if "loss" in line]
        figures = {name: bench.summary([line[name] for line in lines[2:]]) for name in names}
        about = {"images": images, "compiled": cfg.compile}
        rows.append(about | figures | {"loss": lines[-1]["loss"]} | scores)
    return bench.shown(rows)


def decoding(lab: Lab) -> list[dict]:
    """Compare greedy and beam search with transformers': bench.py's own, with `run`'s model."""
    batches = (4, 8) if lab.size.quick else (64, 1, 1024, 256)
    cfg = bench.DecodeBench(**lab.trained, images=1024, rounds=1, turns=3, batches=batches)
    return bench.decode(cfg)["rows"]


def training(lab: Lab, P: int) -> list[dict]:
    """Time steps of ours, compiled and not, of padded separate examples, and of ClipCap's way."""
    rows = []
    for R, images in BATCHES[P].items():
        result = bench.train(replace(lab.size, P=(P,), R=(R,), batch_size=images))
        rows += result["rows"]
        lab.failed += result["failed"]
    return rows


def scst(lab: Lab) -> list[dict]:
    """Time a self-critical step: bench.py's own comparison, with `run`'s model."""
    images = min(64, lab.size.batch_size)
    cfg = bench.SelfCriticalBench(**lab.trained, batch_size=images, turns=lab.size.turns)
    return bench.self_critical(cfg)["rows"]


def profile(lab: Lab) -> dict:
    """Return the ten kernels that take most of two training steps, compiled and not."""
    names = ("ours", "ours compiled")
    return {name: bench.attempt(name, partial(kernels, lab, name), lab.failed) for name in names}


def kernels(lab: Lab, name: str) -> str:
    """Return and print the profiler's table of two steps. If the CPU needs as long to start a step
    as the step takes, the GPU waits for it."""
    activity, time_of = torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"
    if lab.device.type == "cuda":
        activity, time_of = torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"
    cfg = Config(**bench.settings_of(lab.size, lab.data, dropout=0.1))
    trainee = bench.Trainee(name, cfg, 1, 1)
    (seconds,) = bench.interleave(lab.device, {name: trainee.turn}, 1)[name]
    begin = time.perf_counter()
    trainee.turn(0)
    started = time.perf_counter() - begin
    with torch.profiler.profile(activities=[activity]) as profiler:
        bench.interleave(lab.device, {name: trainee.turn}, 1)
    text = profiler.key_averages().table(sort_by=time_of, row_limit=10)
    print(f"{name}: {1e3 * seconds:.1f} ms per step, started in {1e3 * started:.1f}", flush=True)
    print(text, flush=True)
    return text


def encode(lab: Lab) -> list[dict]:
    """Time a ViT-B/32 with random weights: the model alone, and from a JPEG file, which 16 threads
    read and resize again and again, each a batch at a time."""
    import transformers
    from PIL import Image

    options, batch, n = dict(patch_size=32), 256, 16  # a batch per thread
    if lab.size.quick:
        options = dict(hidden_size=48, num_hidden_layers=2, image_size=32, patch_size=16)
        batch, n = 8, 4
    config = transformers.CLIPVisionConfig(**options)
    side = config.image_size
    sides = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    folder = lab.folder / "vit"
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(**sides).save_pretrained(folder)
    encoder = Encoder(str(folder), device=lab.device.torch_device)
    rng = np.random.default_rng(0)
    photo = folder / "photo.jpg"
    small = Image.fromarray(rng.integers(256, size=(15, 20, 3), dtype=np.uint8))
    small.resize((640, 480), Image.Resampling.BICUBIC).save(photo, quality=90)
    batches = [[(photo,)] * batch] * n
    pixels, _ = encoder.read(batches[0])

    def alone(turn: int) -> None:
        for _ in batches:
            encoder.encode(pixels).cpu()

    def from_files(turn: int) -> None:
        for _ in encoder.stream(batches, 16):
            pass

    seconds = bench.interleave(lab.device, {"ours": alone, "from files": from_files}, 3)
    return bench.shown(bench.speeds(f"ViT-B/32, {batch} images", seconds, n * batch))


BATCHES = {10: {5: 256, 1: 1024}, 50: {5: 192, 1: 512}}  # P -> R -> images per step
SECTIONS = {  # name: (seconds it takes at most, function); `run` compiles for `training` too
    "machine": (5, machine),
    "run": (110, run),
    "decoding": (40, decoding),
    "training": (115, partial(training, P=10)),
    "profile": (10, profile),
    "grid": (150, partial(training, P=50)),
    "scst": (20, scst),
    "encode": (45, encode),
}


# ---------------------------------------------------------------------------------------------
# The same run on a CPU and on a GPU


def parity(cfg: bench.Bench) -> dict:
    """Compare a CPU and a GPU in float32: losses, captions, and a run that is killed and resumed.

    What differs is printed, and by how much. Two runs on the GPU show its own noise.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # before the GPU's first use: float32 means float32
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(cfg, "float32", Path(folder), vocab_size=2048)
        results["hardware"] = bench.hardware(lab.device)
        print(results["hardware"], flush=True)
        for part in (same_losses, same_captions, same_after_a_kill, waits):
            results[part.__name__] = bench.attempt(part.__name__, partial(part, lab), lab.failed)
            print(f"{part.__name__}: {results[part.__name__]}", flush=True)
    return results | {"failed": lab.failed}


def short(lab: Lab, name: str, steps: int, **changes) -> dict:
    """Return settings of a short run in the folder `name`, without the compiler."""
    every = dict(max_iters=steps, eval_interval=steps, log_interval=1, eval_images=16)
    every |= dict(out_dir=f"{lab.folder}/{name}", compile=False)
    return bench.settings_of(lab.size, lab.data, **every | changes)


def trained(settings: dict) -> tuple[np.ndarray, dict]:
    """Train. Return the loss of each step and the last weights."""
    cfg = Config(**settings)
    train.main(cfg)
    losses = [row["loss"] for row in read_log(cfg.run_dir / "log.jsonl") if "loss" in row]
    return np.array(losses), torch.load(cfg.run_dir / "last.pt", map_location="cpu")["model"]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest relative difference of two runs' losses."""
    return float(np.max(np.abs(a - b) / a))


def same_losses(lab: Lab) -> dict:
    """Compare the loss of each step, without dropout: each device has its own random numbers."""
    cpu, _ = trained(short(lab, "cpu", 20, dropout=0.0, device="cpu"))
    one, _ = trained(short(lab, "one", 20, dropout=0.0))
    two, _ = trained(short(lab, "two", 20, dropout=0.0))
    return {"steps": 20, "cpu": difference(cpu, one), "again": difference(one, two)}


def same_captions(lab: Lab) -> dict:
    """Caption the val images on both, with a model that was trained briefly."""
    trained(short(lab, "run", 6 if lab.size.quick else 300))
    split = Split(lab.data, "val")
    embeddings = split.embedding(np.arange(len(split)))
    result = {}
    for how in (Decoding(max_len=40), Decoding(method="beam", beams=5, max_len=40)):
        both = []
        for place in ("cpu", lab.device.torch_device):
            model, tokenizer, _ = load_captioner(lab.ckpt)
            model.to(place)
            captions = []
            for part in embeddings.split(64):
                captions += [best for (best,) in generate(model, part.to(place), tokenizer, how)]
            both.append(captions)
        pairs = list(zip(*both, strict=True))
        differ = [(a, b) for a, b in pairs if a.ids != b.ids]
        off = [abs(a.logprob - b.logprob) for a, b in pairs if a.ids == b.ids]
        for a, b in differ[:10]:
            print(f"  CPU {a.logprob:.6f}: {tokenizer.decode(a.ids)}")
            print(f"  GPU {b.logprob:.6f}: {tokenizer.decode(b.ids)}")
        result[how.method] = {
            "images": len(pairs),
            "differ": len(differ),
            "logprob": max(off, default=None),
        }
    return result


def same_after_a_kill(lab: Lab) -> dict:
    """Kill train.py between two checkpoints, resume, and compare with a run that was left alone."""
    whole, weights = trained(short(lab, "whole", 60, eval_interval=10))
    again, _ = trained(short(lab, "again", 60, eval_interval=10))
    interrupted = short(lab, "parts", 60, eval_interval=10)
    flags = [f"--{name}={value}" for name, value in interrupted.items()]
    log = lab.folder / "parts/log.jsonl"
    process = subprocess.Popen([sys.executable, train.__file__, *flags], stdout=subprocess.DEVNULL)
    logged = 0
    while process.poll() is None and logged < 25:
        time.sleep(0.002)
        if log.is_file():
            logged = log.read_text().count('"loss"')
    process.kill()
    was_killed = process.wait() == -signal.SIGKILL
    saved_step = torch.load(lab.folder / "parts/last.pt", map_location="cpu")["step"]
    losses, resumed = trained(interrupted | {"resume": True})
    return {
        "was_killed": was_killed,
        "logged": logged,
        "saved_step": saved_step,
        "losses": difference(whole, losses),
        "weights": max((weights[k] - resumed[k]).abs().max().item() for k in weights),
        "again": difference(whole, again),
    }


def waits(lab: Lab) -> dict:
    """Count how often the CPU waits for the GPU in ten updates, without a log line."""
    training = train.Training(Config(**short(lab, "waits", 12, ema=0.9)), lab.device)
    steps = list(training.batches(range(12)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, (micro_batches, counts) in enumerate(steps, 1):
            training.update(micro_batches, counts, 1e-3)
            training.progress.step += 1
            training.average.update(step)
            if step == 2 and lab.device.type == "cuda":  # the first two may
                torch.cuda.set_sync_debug_mode("warn")
    if lab.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    texts = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    training.read_norms()
    return {"synchronisations": len(texts), "updates": 10, "first": texts[:3]}


MODES = {"gpu": (GpuBench, gpu), "parity": (bench.Bench, parity)}
