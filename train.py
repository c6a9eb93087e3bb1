"""Trains a captioner on a dataset that prepare.py made.

    python train.py config/shapes.py
    python train.py config/coco.py --batch_size=256 --learning_rate=5e-4
    torchrun --nproc_per_node=8 train.py config/coco.py
    python train.py config/coco.py --resume

Writes to `out/<dataset>/`: ckpt.pt, the best by validation CIDEr, with all that sample.py needs;
last.pt, from which --resume goes on; log.jsonl, every line that was logged. Without --resume, an
earlier run's are moved to `out/<dataset>/previous/`.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import metrics
from configurator import Config, UserError, configure, run
from data import Order, Split, ahead, append, batches, write_text
from decode import Decoding, generate
from model import ClipLM, ModelConfig
from track import Tracker

PREEMPTED = 75  # exit status after SIGTERM or SIGINT: saved, run again with --resume

# ---------------------------------------------------------------------------------------------
# Where it runs


def computes_in_bfloat16(kind: str) -> bool:
    """Whether a device does so in hardware, and so faster than in float32."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # PyTorch has no public way
    return kind == "cpu" and asked is not None and asked()


def keep_freed_memory() -> None:
    """Asks the C library to keep what tensors free: pages fresh from the system, at every step,
    take a CPU a twentieth of it (LOG.md). Only glibc (Linux) can be asked."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: only tensors above 1 GB are mapped on their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and freed memory stays, up to 2 GB of it


class Place:
    """Device, precision, and this process's `rank` among `world` (1 without torchrun)."""

    def __init__(self, device: str, dtype: str):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        cuda = torch.cuda.is_available()
        if device == "auto":
            device = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
        if device.startswith("cuda") and not cuda:
            raise UserError(f"device={device}: this PyTorch sees no CUDA device")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        there = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
        there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if device not in there:
            raise UserError(f"device={device}: this PyTorch sees only {' '.join(there)}")
        self.device = torch.device(device)
        self.kind = self.device.type
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
        if dtype == "auto":
            dtype = "bfloat16" if computes_in_bfloat16(self.kind) else "float32"
        self.dtype = getattr(torch, dtype)
        if self.world > 1:
            from torch import _dynamo  # noqa: F401 - imported later, it keeps the group from closing

            dist.init_process_group("cpu:gloo,cuda:nccl" if self.kind == "cuda" else "gloo")

    def leave(self) -> None:
        """Closes the process group: gloo's threads, alive when Python ends, would abort it."""
        if self.world > 1:
            gc.collect()  # nothing may hold the group any more
            dist.destroy_process_group()

    def autocast(self):
        return torch.autocast(self.kind, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, tensors: dict) -> dict:
        if self.kind == "cuda":  # from pinned memory the copy does not hold up the step
            return {
                k: v.pin_memory().to(self.device, non_blocking=True) for k, v in tensors.items()
            }
        return {k: v.to(self.device) for k, v in tensors.items()}

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, item) -> list:
        """Every process's item, by rank."""
        every = [item] * self.world
        if self.world > 1:
            dist.all_gather_object(every, item)
        return every

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product here and now, in the precision of training.

        Matrices grow until a product takes 10 ms, or to the size at which every device is at its
        best: a CPU without bfloat16 takes seconds for what others do in a moment.
        """
        n, took = 128, 0.0
        while took < 0.01 and n < (8192 if self.kind == "cuda" else 1024):
            n *= 2
            took = self.matmul_seconds(n)
        return 2 * n**3 / min(self.matmul_seconds(n) for _ in range(8))

    def matmul_seconds(self, n: int) -> float:
        """Seconds that a product of two (n, n) matrices takes."""
        own = torch.Generator(self.device)  # a resumed run's draws must not depend on this
        a, b = (torch.randn(n, n, device=self.device, generator=own).to(self.dtype) for _ in "ab")
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        return time.perf_counter() - begin


def compiles(cfg: Config, place: Place) -> bool:
    """Whether to use torch.compile: as the config says, else on CUDA, if a compiler is there."""
    names = ("CC", "gcc", "clang", "cc") if place.kind == "cuda" else ("CXX", "g++", "clang++")
    names = [os.environ[names[0]]] if names[0] in os.environ else names[1:]
    there = any(map(shutil.which, names))
    if cfg.compile and not there:
        raise UserError(f"compile=True: no compiler here ({' '.join(names)}): --compile=False")
    return there and place.kind == "cuda" if cfg.compile is None else cfg.compile


# ---------------------------------------------------------------------------------------------
# Loss, learning rate, average


def loss_sum(model, batch: dict, label_smoothing: float = 0.0):
    """Cross-entropy summed over the targets of packed rows, in nats."""
    inputs = {k: v for k, v in batch.items() if k != "targets"}
    logits = model(**inputs).float()  # (M, V)
    return F.cross_entropy(
        logits, batch["targets"], reduction="sum", label_smoothing=label_smoothing
    )


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warmup, then half a cosine down to min_lr (Loshchilov & Hutter 2017)."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.learning_rate - cfg.min_lr)


class Average:
    """Moving average of the weights, begun from `weights` or those of the model; with decay 0,
    the weights themselves."""

    def __init__(self, model: ClipLM, decay: float, weights: dict):
        self.model, self.decay = model, decay
        now = model.state_dict() if decay else {}
        self.weights = {k: v.clone().copy_(weights.get(k, v)) for k, v in now.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, step / (step + 9))  # a young average forgets faster
        now = self.model.state_dict()
        for name, value in self.weights.items():
            value.lerp_(now[name], 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """The model with the averaged weights, for evaluation and for ckpt.pt."""
        if not self.decay:
            yield
            return
        kept = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights)
        yield
        self.model.load_state_dict(kept)


# ---------------------------------------------------------------------------------------------
# Evaluation


class Evaluation:
    """Loss over the validation split, and CIDEr of greedy captions of a fixed part of it."""

    def __init__(self, split: Split, cfg: Config, place: Place, model: ClipLM):
        self.split, self.place, self.model = split, place, model
        n = len(split)
        some = np.linspace(0, n - 1, min(cfg.eval_images or n, n)).astype(np.int64)
        self.images = np.unique(some)  # spread evenly, the same at every evaluation
        references = split.references()[1]
        self.references = [references[i] for i in self.images]
        self.cider = metrics.CiderD(self.references)
        self.decoding = Decoding(max_len=min(40, cfg.block_size - model.cfg.prefix_length))

    @torch.inference_mode()
    def __call__(self, signals: "Signals") -> tuple[dict, list[str]] | None:
        """The figures, and the captions of `images`, the same on every rank. None after a signal:
        a scheduler that has sent one may not wait until the end."""
        place, size, tokenizer = self.place, 64, self.split.tokenizer
        self.model.eval()
        by_length = np.argsort(self.split.lengths, kind="stable")  # like lengths pad little
        parts = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        nll = shuffled = targets = 0.0
        for batch in ahead(self.split.pack(rows) for rows in parts[place.rank :: place.world]):
            if signals.asked:
                break
            batch = place.put(batch)
            targets += len(batch["targets"])
            other = batch | {"embeddings": batch["embeddings"].roll(1, 0)}  # of the image before
            with place.autocast():
                nll += loss_sum(self.model, batch).item()
                shuffled += loss_sum(self.model, other).item()
        mine, captions = self.images[place.rank :: place.world], []
        for i in range(0, len(mine), size):
            if signals.asked:
                break
            embeddings = self.split.embedding(mine[i : i + size]).to(place.device)
            with place.autocast():
                found = generate(self.model, embeddings, tokenizer, self.decoding)
            captions += [tokenizer.decode(best[0].ids) for best in found]
        self.model.train()
        if place.total(signals.asked)[0]:
            return None
        nll, shuffled, targets = place.total(nll, shuffled, targets)
        every = place.gather(captions)
        captions = [every[i % place.world][i // place.world] for i in range(len(self.images))]
        return {
            "val_loss": nll / targets,
            "shuffled_loss": shuffled / targets,  # not above val_loss: the prefix is ignored
            "CIDEr": float(self.cider.score(range(len(captions)), captions).mean()),
            "distinct": len(set(captions)) / len(captions),
        }, captions

    def show(self, captions: list[str], n: int) -> list[str]:
        """`n` captions, each beside a reference."""
        some = np.linspace(0, len(captions) - 1, min(n, len(captions))).astype(int)
        return [f"    {captions[i]}   ⟵ {self.references[i][0]}" for i in some]


# ---------------------------------------------------------------------------------------------
# What is printed and logged


class Log:
    """The progress bar, log.jsonl and the tracker; silent on every rank but the first."""

    def __init__(self, cfg: Config, place: Place, model: ClipLM, step: int):
        self.master, self.model, self.place = place.rank == 0, model, place
        self.peak = place.matmul_rate()
        show = None if self.master else True  # None: a bar on a terminal, plain lines in a file
        self.bar = tqdm(total=cfg.max_iters, initial=step, unit="step", disable=show)
        self.path = cfg.run_dir / "log.jsonl"
        if self.master:
            write_text(self.path, "".join(kept_lines(self.path, step)))
        kind = cfg.track if self.master else "none"
        self.track = Tracker(kind, asdict(cfg), cfg.run_dir, cfg.run_dir.name, resume=step > 0)
        self.begin()

    def begin(self) -> None:
        self.clock, self.steps = time.perf_counter(), 0
        self.counts = dict.fromkeys(("images", "captions", "targets"), 0)
        self.waited = 0.0

    def count(self, counts: dict, waited: float) -> None:
        self.steps += 1
        self.waited += waited
        for name in self.counts:
            self.counts[name] += counts[name]
        self.bar.update()

    def line(self, step: int, loss: float, norm: float, lr: float) -> None:
        """Logs a step's figures, and the speed since the line before."""
        took, n = time.perf_counter() - self.clock, self.counts
        flops = self.model.flops(n["images"], n["targets"], n["targets"])
        row = {
            "step": step, "loss": loss, "grad_norm": norm, "lr": lr,
            "ms_per_step": 1e3 * took / self.steps, "captions_per_s": n["captions"] / took,
            "tokens_per_s": n["targets"] / took,
            "mfu": flops / took / (self.peak * self.place.world), "waiting": self.waited / took,
        }  # fmt: skip
        self.write(row)
        text = (
            f"loss {loss:.3f} · norm {norm:.2f} · lr {lr:.1e} · {row['ms_per_step']:.0f} ms · "
            f"{row['captions_per_s']:.0f} captions/s · {row['tokens_per_s']:.0f} tokens/s · "
            f"MFU {row['mfu']:.0%}"
        )
        if self.bar.disable:
            self.say(f"step {step}: {text}")
        else:
            self.bar.set_postfix_str(text)
        self.begin()

    def scores(self, step: int, scores: dict, samples: list[str]) -> None:
        self.write({"step": step, **scores, "samples": samples})
        self.say(f"step {step}: " + " · ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        for line in samples:
            self.say(line)

    def write(self, row: dict) -> None:
        if self.master:
            append(self.path, json.dumps(row) + "\n")
            self.track.log(row)

    def say(self, text: str) -> None:
        if self.master:
            self.bar.write(text)


def kept_lines(path, step: int) -> list[str]:
    """The lines of a log up to `step`; what came later, or is torn, is written again."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    kept = []
    for line in text.splitlines(keepends=True) if step else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
    return kept


class Signals:
    """SIGTERM and SIGINT ask for a stop after the step; a second one ends the process at once.

    A scheduler may signal torchrun and its processes, and torchrun passes it on to these: what
    comes within `echo` seconds of the first is the same signal.
    """

    def __init__(self, echo: float):
        self.asked, self.since, self.echo = False, math.inf, echo
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame) -> None:
        now = time.monotonic()
        if now > self.since + self.echo:
            os._exit(128 + number)
        self.asked, self.since = True, min(now, self.since)


# ---------------------------------------------------------------------------------------------
# Setting up, saving and resuming


def model_config(cfg: Config, meta: dict, vocab_size: int) -> ModelConfig:
    """The model that the config asks for. Raises UserError where the block is too short."""
    size = ModelConfig(
        vocab_size=vocab_size, features=meta["features"], embedding_dim=meta["embedding_dim"],
        n_positions=meta["n_positions"], normalize=meta["normalize"], n_prefix=cfg.n_prefix,
        mapper=cfg.mapper, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
        block_size=cfg.block_size, dropout=cfg.dropout, bias=cfg.bias,
    )  # fmt: skip
    longest = max(split["longest_caption"] for split in meta["splits"].values())
    if (need := size.prefix_length + longest) > cfg.block_size:
        raise UserError(
            f"block_size={cfg.block_size} is too short for a prefix of "
            f"{size.prefix_length} and a caption of {longest}: set --block_size={need}"
        )
    return size


def generators(place: Place) -> dict:
    """The modules that hold the random states of training: the CPU's, the device's."""
    return {"cpu": torch, place.kind: torch if place.kind == "cpu" else getattr(torch, place.kind)}


def check_resumable(
    state: dict, path, cfg: Config, size: dict, meta: dict, place: Place
) -> list[str]:
    """What differs from the run that wrote it. Raises UserError where it does not fit at all."""
    if "optimizer" not in state:
        raise UserError(f"{path} cannot be resumed from: it holds no optimizer; last.pt does")
    sums = [{k: v["sha256"] for k, v in m["files"].items()} for m in (state["meta"], meta)]
    if sums[0] != sums[1]:
        files = [k for k in sums[1] if sums[0].get(k) != sums[1][k]]
        raise UserError(
            f"{path} was trained on another dataset: {', '.join(files) or 'files'} differ"
        )
    differ = [
        f"{k} was {v}, is {size[k]}"
        for k, v in state["model_config"].items()
        if k != "dropout" and size.get(k) != v
    ]
    if differ:
        raise UserError(f"{path} is of another architecture: {'; '.join(differ)}")
    now, random = asdict(cfg), state["random"]
    notes = [f"{k} was {v}, is {now[k]}" for k, v in state["config"].items()
             if k != "resume" and now.get(k) != v]  # fmt: skip
    if len(random) != place.world or place.kind not in random[0]:
        then = f"{len(random)} x {' '.join(random[0])}"
        notes.append(f"it was of {then}, this is {place.world} x {place.kind}: draws will differ")
    return notes


def set_aside(folder: Path) -> None:
    """Moves the files of an earlier run, that is not to be resumed, to `folder`/previous."""
    aside = folder / "previous"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in ("ckpt.pt", "last.pt", "log.jsonl"):
        if (folder / name).exists():
            os.replace(folder / name, aside / name)
    print(f"{folder} holds an earlier run: its files are now in {aside}; --resume goes on")


# ---------------------------------------------------------------------------------------------
# The loop


def main(cfg: Config) -> dict:
    """Trains as `cfg` says. Returns the last evaluation's figures."""
    place = Place(cfg.device, cfg.dtype)
    keep_freed_memory()
    scores = loop(cfg, place)
    place.leave()
    if scores is None:
        sys.exit(PREEMPTED)
    return scores


def loop(cfg: Config, place: Place) -> dict | None:
    """The last evaluation's figures; None if a signal stopped it."""
    signals = Signals(echo=5.0 if place.world > 1 else 0.0)
    train, val = Split(cfg.data_dir, "train"), Split(cfg.data_dir, "val")
    meta, size = train.meta, model_config(cfg, train.meta, len(train.tokenizer))
    micro = cfg.gradient_accumulation_steps
    order = Order(cfg.seed, train.lengths, cfg.batch_size, place.world * micro)
    best, last = cfg.run_dir / "ckpt.pt", cfg.run_dir / "last.pt"

    torch.manual_seed(cfg.seed)
    model = ClipLM(size).to(place.device)
    torch.manual_seed(cfg.seed + place.rank)  # dropout differs by rank, the first weights do not
    groups = model.optimizer_groups(cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=place.kind != "mps")
    scaler = torch.amp.GradScaler(place.kind, enabled=place.dtype == torch.float16)
    evaluate = Evaluation(val, cfg, place, model)
    step, scored, scores, highest, bad = 0, 0, {}, (-1.0, 0.0), 0  # scored: the last step that was
    state, notes = {}, []
    if cfg.resume and last.is_file():
        state = checkpoint.load(last)
        notes = check_resumable(state, last, cfg, asdict(size), meta, place)
        checkpoint.fill(model, state["model"], last)
        own = optimizer.state_dict()["param_groups"]  # this run's weight decay and betas
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": own})
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == place.world:
            for kind, module in generators(place).items():
                if kind in state["random"][place.rank]:
                    module.set_rng_state(state["random"][place.rank][kind])
        step, scored, scores = state["step"], state["scored"], state["scores"]
        highest = tuple(state["highest"])
    average = Average(model, cfg.ema, state.pop("average", {}))
    state.clear()  # of no more use, and large
    if len(set(place.gather(step))) > 1:
        raise UserError(f"{last} is not the same on every machine: all must share its folder")
    if not cfg.resume and place.rank == 0 and last.is_file():
        set_aside(cfg.run_dir)

    wrapped = model
    if compiles(cfg, place):
        wrapped = torch.compile(wrapped, dynamic=True)
    elif place.kind == "cuda" and cfg.compile is None:
        notes.append("there is no compiler here, so torch.compile is off")
    if place.world > 1:
        wrapped = DistributedDataParallel(wrapped)
    log = Log(cfg, place, model, step)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    log.say(
        f"{count:.1f} M parameters, {len(train)} images, {order.per_epoch} steps an epoch, "
        f"{place.world} x {place.device}, {place.dtype}"
    )
    if cfg.resume:
        log.say(f"resumed from {last} at step {step}" if step else f"no {last} yet: from the start")
    if step > cfg.max_iters:
        notes.append(f"max_iters is {cfg.max_iters}: there is nothing left to do")
    for name in ("features", "grid", "normalize", "lowercase"):
        if (asked := getattr(cfg, name)) != meta[name]:
            notes.append(f"{name} stays {meta[name]}, as {cfg.data_dir} has it, not {asked}")
    for line in notes:
        log.say(f"    note: {line}")

    def save() -> None:
        """last.pt, and ckpt.pt if this step's scores are the best: by CIDEr, then by loss."""
        nonlocal highest
        content = checkpoint.pack(
            model, train.tokenizer, meta, asdict(cfg), step=step, scores=scores
        )
        random = place.gather({k: v.get_rng_state() for k, v in generators(place).items()})
        if scores and scored == step and (scores["CIDEr"], -scores["val_loss"]) > highest:
            highest = scores["CIDEr"], -scores["val_loss"]
            if log.master:
                with average.applied():
                    checkpoint.save(best, content)
        if log.master:
            checkpoint.save(last, content | {
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "average": average.weights, "random": random, "scored": scored,
                "highest": highest,
            })  # fmt: skip

    stream = batches(train, order, step, cfg.max_iters, place.rank, place.world, micro)
    while True:
        # -- evaluate and save; a signal cuts an evaluation off, and the next run begins with it
        found, stopping = None, place.total(signals.asked)[0] > 0
        if step > scored and (step % cfg.eval_interval == 0 or step >= cfg.max_iters):
            with average.applied():
                found = None if stopping else evaluate(signals)
            stopping = not found
        if found:
            (scores, captions), scored = found, step
            log.scores(step, scores, evaluate.show(captions, cfg.samples))
        if found or stopping:
            save()
            log.begin()
        if scored == step >= cfg.max_iters:
            break
        if stopping:
            log.track.close("KILLED")
            log.say(f"stopped by a signal after step {step}: run again with --resume")
            return None

        # -- learning rate
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # -- forward and backward, in micro-steps; the loss is the mean over the whole batch
        asked_at = time.perf_counter()
        parts, counts = next(stream)
        waited = time.perf_counter() - asked_at
        nll = torch.zeros((), device=place.device)
        for i, part in enumerate(parts):
            part = place.put(part)
            if cfg.embedding_noise:
                x = part["embeddings"].float()
                x = F.normalize(x, dim=-1) if size.normalize else x  # the noise's scale is known
                part["embeddings"] = x + cfg.embedding_noise * torch.randn_like(x)
            silent = place.world > 1 and i < len(parts) - 1  # ranks exchange gradients once a step
            with wrapped.no_sync() if silent else contextlib.nullcontext():
                with place.autocast():
                    loss = loss_sum(wrapped, part, cfg.label_smoothing)
                scaler.scale(loss * (place.world / counts["targets"])).backward()
            nll += loss.detach()

        # -- clip and step; a gradient that is not finite is skipped, on all ranks alike
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
        bad = 0 if math.isfinite(norm) else bad + 1
        if not bad or scaler.is_enabled():  # the scaler skips by itself, and lowers its scale
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average.update(step)

        # -- log
        log.count(counts, waited)
        if bad:
            log.say(f"step {step}: the gradient is not finite, skipped")
        if bad >= 20:
            raise UserError(
                f"the gradient was not finite {bad} times in a row: lower learning_rate "
                f"and go on from {last}"
            )
        if step % cfg.log_interval == 0:
            log.line(step, place.total(nll.item())[0] / counts["targets"], norm, lr)
    log.bar.close()
    if log.master:
        log.track.artifact(best)
        log.track.close()
        print(f"best CIDEr {highest[0]:.4f} in {best}")
    return scores


if __name__ == "__main__":
    run(main, configure(Config, sys.argv[1:], __doc__))
