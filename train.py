"""Train a captioner on a dataset that prepare.py made.

    python train.py config/shapes.py
    python train.py config/coco.py --batch_size=256 --learning_rate=5e-4
    torchrun --nproc_per_node=8 train.py config/coco.py
    python train.py config/coco.py --resume

Writes to `out/<dataset>/`: ckpt.pt, the best checkpoint by validation CIDEr, with all that
sample.py needs; last.pt, which --resume continues; log.jsonl, every logged line. Without
--resume, an earlier run's files are moved to `out/<dataset>/previous/`, or `previous-2/` and so on:
nothing is deleted.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import contextlib
import copy
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from configurator import Config, configure, from_dict
from data import Meta, Order, Split, batches, deal
from decode import Caption, Decoding, generate
from model import ClipLM, ModelConfig, cross_entropy, loss_sum
from parts import checkpoint, gpt2
from parts.checkpoint import Progress
from parts.common import UserError, prefetch, run
from parts.device import Device, Signals, keep_freed_memory
from parts.log import Log
from parts.muon import Muon
from parts.tracking import Tracker
from selfcritical import SelfCritical

PREEMPTED = 75  # exit status after a signal: saved, run again with --resume

# ---------------------------------------------------------------------------------------------
# The loop


def main(cfg: Config) -> dict:
    """Train as `cfg` says. Return the scores of the last evaluation."""
    device = Device(cfg.device, cfg.dtype)
    keep_freed_memory()
    with device.owning(cfg.run_dir / "lock", f"train.py is writing {cfg.run_dir}/"):
        scores = train(cfg, device)
    device.close()
    if scores is None:
        sys.exit(PREEMPTED)
    return scores


def train(cfg: Config, device: Device) -> dict | None:
    """Train until `max_iters`. Return the last scores, or None if a signal stopped it.

    All that changes from step to step is in `training`: the weights, the optimizer, and Progress,
    which says where the run is. A resumed run begins with those of last.pt and draws the same
    batches, since a batch depends on the seed and the step alone (data.Order).
    """
    training = Training(cfg, device)
    progress, log = training.progress, training.log
    steps = range(progress.step, cfg.max_iters)
    stream = training.batches(steps)
    while True:
        # -- evaluate and save. After a signal there may be no time to evaluate: save at once. The
        #    resumed run begins with the evaluation that is due.
        stopping = device.any(training.signals.asked)
        scores, is_best = None, False
        if is_evaluation_due(progress, cfg) and not stopping:
            scores, samples = training.evaluator.evaluate()
            stopping = scores is None
        if scores:
            is_best = progress.record(scores)
            log.evaluation(progress.step, scores, samples)
        if scores or stopping:
            training.save(is_best)
            log.restart_clock()
        if progress.evaluated_at == progress.step >= cfg.max_iters:
            log.close(training.best_path, progress.best)
            return progress.scores
        if stopping:
            log.say(f"stopped by a signal after step {progress.step}: run again with --resume")
            log.bar.close()
            log.tracker.close("KILLED")
            return None

        # -- one update: learning rate, forward and backward, clip and step
        lr = learning_rate(progress.step, cfg)
        waiting_since = time.perf_counter()
        micro_batches, counts = next(stream)
        waited = time.perf_counter() - waiting_since
        nll = training.update(micro_batches, counts, lr)
        progress.step += 1
        training.average.update(progress.step)

        # -- log. Only here does the CPU wait for a GPU. In other steps it runs ahead, so that the
        #    GPU always has work. The loss is summed over the ranks only when it is logged.
        log.count(counts, waited)
        if progress.step % cfg.log_interval == 0:
            norm = training.read_norms()
            (nll,) = device.sum(nll.item())
            log.line(progress.step, nll / counts["targets"], norm, lr)


def is_evaluation_due(progress: Progress, cfg: Config) -> bool:
    """Whether an evaluation is due and not yet made: every eval_interval steps and at the end.

    A run that a signal stopped just before an evaluation finds it due when it is resumed.
    """
    if progress.step == progress.evaluated_at:
        return False
    return progress.step % cfg.eval_interval == 0 or progress.step >= cfg.max_iters


def learning_rate(step: int, cfg: Config) -> float:
    """Return the learning rate of a step, counted from 0.

    Linear warmup, then half a cosine down to min_lr at lr_decay_iters (Loshchilov & Hutter 2017,
    arXiv:1608.03983), and constant from there on. With lr_decay=linear, it is constant for the
    first half, then falls linearly. Self-critical training keeps learning_rate instead, unless
    lr_decay_iters is set.
    """
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    if not cfg.decays:
        return cfg.learning_rate
    end = cfg.lr_decay_iters or cfg.max_iters
    decayed = min(1.0, (step - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    share = 0.5 * (1 + math.cos(math.pi * decayed))
    if cfg.lr_decay == "linear":
        share = min(1.0, 2 * (1 - decayed))
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


# ---------------------------------------------------------------------------------------------
# What is trained


class Training:
    """All that a run needs: data, model, optimizer, evaluator and log, new or from last.pt.

    The order matters. `init_from` is read before an earlier run's files are moved, since it may be
    one of them. The average copies the weights once they are loaded, and before the blocks are
    compiled. The first weights depend on the seed alone; then each rank has its own random numbers
    (dropout, noise), and nothing after `resume` draws from them.
    """

    def __init__(self, cfg: Config, device: Device):
        if cfg.objective == "scst":  # samples and gradient must be of one and the same function
            cfg = replace(cfg, dropout=0.0, label_smoothing=0.0, embedding_noise=0.0,
                          word_dropout=0.0)  # fmt: skip
        self.cfg, self.device = cfg, device
        # Scheduler and torchrun may both send a signal: within 5 seconds they count as one.
        self.signals = Signals(echo=5.0 if device.world > 1 else 0.0)
        self.split = Split(cfg.data_dir, "train")
        validation = Split(cfg.data_dir, "val")
        self.order = Order(cfg.seed, self.split.lengths, cfg.batch_size)
        deal(self.order.batch(0), 0, device.world, cfg.gradient_accumulation_steps)  # may refuse
        self.best_path = cfg.run_dir / "ckpt.pt"
        self.last_path = cfg.run_dir / "last.pt"

        # -- the model, the same on every rank, and its optimizer
        torch.manual_seed(cfg.seed)
        self.model = ClipLM(model_config(cfg, self.split.meta)).to(device.torch_device)
        self.model.transformer.requires_grad_(not cfg.freeze_decoder)
        torch.manual_seed(cfg.seed + device.rank)  # dropout differs by rank, first weights do not
        # Matrices decay; biases and layer norms, which only shift and scale, do not.
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        betas = (cfg.beta1, cfg.beta2)
        options = dict(weight_decay=cfg.weight_decay, betas=betas, fused=device.type != "mps")
        if cfg.optimizer == "muon":
            inner = [p for p in self.model.transformer.h.parameters() if p.dim() == 2]
            self.optimizer = Muon(groups, inner, **options)
        else:
            self.optimizer = torch.optim.AdamW(groups, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)
        self.progress = Progress()
        self.norms: list[torch.Tensor] = []  # of the gradients of each step since they were read
        self.nonfinite = 0  # gradients in a row
        self.notes: list[str] = []  # for the user, once there is a log

        # -- resume, or make room for a new run
        averaged: dict = {}
        self.resumes = cfg.resume and self.last_path.is_file()
        if self.resumes:
            averaged = self.resume()
        elif cfg.init_from:
            if cfg.init_from.endswith(".pt") or Path(cfg.init_from).is_file():
                self.load_weights(cfg.init_from, "begin with a checkpoint of this one")
            else:
                gpt2.load_decoder(self.model, cfg.init_from)
            self.progress.evaluated_at = -1  # the weights it begins with are scored first
        self.average = Average(self.model, cfg.ema, averaged)
        self.evaluator = Evaluator(self.average.model, validation, cfg, device, self.signals)
        if len(set(device.gather(self.progress.step))) > 1:
            raise UserError(
                f"{self.last_path} is not the same on every machine: put it on shared storage"
            )
        # -- what training calls: compiled blocks and a compiled loss, if so asked, and the model in
        #    DDP if there are more processes. Checkpoints are of the model: DDP renames its weights.
        self.cross_entropy = cross_entropy
        if device.compiles(cfg.compile):
            self.cross_entropy = compile_parts(self.model)
        self.wrapped = device.wrap(self.model)
        self.self_critical = None
        if cfg.objective == "scst":
            self.self_critical = SelfCritical(self.model, self.split, cfg, device)
        track = cfg.track if device.is_first else "none"
        tracker = Tracker(track, asdict(cfg), cfg.run_dir, cfg.run_dir.name, self.resumes)
        if not self.resumes:
            device.on_first(lambda: checkpoint.move_earlier_run(cfg.run_dir))
        self.log = Log(cfg, device, self.model, self.progress.step, self.resumes, tracker)
        self.introduce()

    def batches(self, steps: range) -> Iterator[tuple[list[dict], dict]]:
        """Yield each step's micro-batches and counts: of the references, or of sampled captions."""
        if self.self_critical:
            return self.self_critical.batches(self.order, steps)
        return batches(self.split, self.order, steps, self.device.rank, self.device.world,
                       self.cfg.gradient_accumulation_steps)  # fmt: skip

    def update(self, micro_batches: list[dict], counts: dict, lr: float) -> torch.Tensor:
        """Take one optimizer step. Return this rank's summed loss, on the device.

        A gradient that is not finite is skipped, on all ranks alike: see `read_norms`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        # -- forward and backward. Gradients add up over the micro-batches, which are processed one
        #    after the other because they would not fit into memory together.
        nll = torch.zeros((), device=self.device.torch_device)
        for i, batch in enumerate(micro_batches):
            batch = self.device.put(batch)
            if self.cfg.embedding_noise:
                batch["embeddings"] = self.add_noise(batch["embeddings"])
            if self.cfg.word_dropout:
                batch["tokens"] = self.drop_words(batch["tokens"])
            # DDP exchanges gradients at the end of every backward pass. Once per step is enough:
            # the micro-batches before the last only add to the gradients of their own rank.
            is_last = i == len(micro_batches) - 1
            skip_sync = self.device.world > 1 and not is_last
            with self.wrapped.no_sync() if skip_sync else contextlib.nullcontext():
                with self.device.autocast():
                    smoothing = self.cfg.label_smoothing
                    loss = loss_sum(self.wrapped, batch, smoothing, self.cross_entropy)
                # The loss is the mean over all target tokens of the global batch, so that 1, 2 or
                # 8 processes and any number of micro-steps compute the same update (but for
                # dropout and noise, which each draws for itself). Each part contributes its sum;
                # DDP will divide by the number of ranks, which is undone here.
                scale = self.device.world / counts["targets"]
                self.scaler.scale(loss * scale).backward()
            nll += loss.detach()

        # -- clip and step. float16 gradients were scaled up to keep small ones from becoming 0,
        #    and are scaled back before their norm is taken; otherwise the scaler does nothing.
        self.scaler.unscale_(self.optimizer)
        limit = self.cfg.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.norms.append(norm)
        # Skip the step if the norm is not finite. A fused optimizer reads `found_inf` on the
        # device, so that the CPU does not wait; an enabled scaler sets it itself. Without either,
        # the CPU looks at the norm.
        fused = self.optimizer.defaults["fused"]
        if fused:
            self.optimizer.found_inf = (~norm.isfinite()).float()
        if fused or self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return nll

    def read_norms(self) -> float:
        """Return the norm of the newest gradient, and say which were not finite since last asked.

        Raises UserError after 20 of them in a row.
        """
        norms = torch.stack(self.norms).tolist()
        self.norms.clear()
        for step, norm in enumerate(norms, self.progress.step - len(norms) + 1):
            if math.isfinite(norm):
                self.nonfinite = 0
                continue
            self.nonfinite += 1
            self.log.say(f"step {step}: the gradient is not finite, skipped")
            if self.nonfinite == 20:
                raise UserError(
                    f"the gradient was not finite {self.nonfinite} times in a row: lower "
                    f"learning_rate and resume from {self.last_path}"
                )
        return norms[-1]

    def add_noise(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Add Gaussian noise, a regulariser for small datasets. Normalised embeddings are scaled
        to length 1 first, so that the noise's size does not depend on the encoder; `ClipLM.project`
        normalises the sum again."""
        x = embeddings.float()
        if self.model.cfg.normalize:
            x = F.normalize(x, dim=-1)
        return x + self.cfg.embedding_noise * torch.randn_like(x)

    def drop_words(self, tokens: torch.Tensor) -> torch.Tensor:
        """Replace a share of the tokens, but no bos, by unk (Bowman et al. 2016, arXiv:1511.06349).
        The model must then rely on the image, not only on the words before: this helps with pairs
        of colour and shape that no training image shows."""
        tokenizer = self.split.tokenizer
        is_dropped = torch.rand(tokens.shape, device=tokens.device) < self.cfg.word_dropout
        return tokens.masked_fill(is_dropped & (tokens != tokenizer.bos), tokenizer.unk)

    # -- last.pt and ckpt.pt --------------------------------------------------------------------

    def save(self, is_best: bool) -> None:
        """Write last.pt, and ckpt.pt if this step was evaluated and is the best so far.

        ckpt.pt holds the averaged weights, if there are any: those that the scores belong to.
        """
        if self.norms:
            self.read_norms()
        random = self.device.gather(self.device.random_states())
        if not self.device.is_first:
            return
        parts = (self.split.tokenizer, self.split.meta, asdict(self.cfg))
        if is_best:
            best = checkpoint.pack(
                self.average.model, *parts, step=self.progress.step, scores=self.progress.scores,
                metrics=metrics.VERSION,
            )  # fmt: skip
            checkpoint.save(self.best_path, best)
        averaged = self.average.model.state_dict() if self.cfg.ema else {}
        last = checkpoint.pack(
            self.model, *parts, **self.progress.as_dict(), random=random, average=averaged,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
        )  # fmt: skip
        checkpoint.save(self.last_path, last)

    def resume(self) -> dict:
        """Continue from last.pt. Return its averaged weights.

        Notes what differs from the run that wrote it, and raises UserError if that is the dataset
        or the architecture.
        """
        hint = "start without --resume to train on this one"
        state = self.load_weights(self.last_path, hint)
        if "optimizer" not in state:
            raise UserError(f"{self.last_path} holds no optimizer: only a last.pt can be resumed")
        ignored = ("resume", "downloads")
        self.notes += checkpoint.changed_settings(state["config"], asdict(self.cfg), ignored)
        before = state["config"].get("optimizer", "adamw")
        if before != self.cfg.optimizer:
            flag = f"--optimizer={before}"
            raise UserError(f"{self.last_path} was written with {flag}: add it to resume")
        groups = self.optimizer.state_dict()["param_groups"]  # this run's weight decay and betas
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        random = state["random"]
        if len(random) == self.device.world:
            self.device.set_random_states(random[self.device.rank])
        wrote = f"{len(random)} x {[*random[0]][-1]}"  # the device's own generator comes last
        own = f"{self.device.world} x {self.device.type}"
        if wrote != own:
            self.notes.append(f"checkpoint from {wrote}, now {own}: random numbers will differ")
        self.progress = Progress.from_dict(state)
        if self.progress.best != Progress.best and not self.best_path.is_file():
            self.progress.evaluated_at, self.progress.best = -1, Progress.best
            self.notes.append(f"{self.best_path} is missing: the best from here on replaces it")
        return state["average"]

    def load_weights(self, path: Path | str, hint: str) -> dict:
        """Load a checkpoint's weights into the model. Return its content.

        Raises UserError if it is of another dataset, with `hint`, or of another architecture.
        """
        content = checkpoint.load(path)
        trained_on = from_dict(Meta, content["meta"], f"{path}: meta")
        self.split.meta.refuse_other(trained_on, path, hint)
        now = asdict(self.model.cfg)
        changed = checkpoint.changed_settings(content["model_config"], now, ignored=("dropout",))
        if changed:
            raise UserError(f"{path} is of another architecture: {'; '.join(changed)}")
        checkpoint.fill(self.model, content["model"], path)
        return content

    def introduce(self) -> None:
        """Say what is trained, where, and what the user may not expect."""
        cfg = self.cfg
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.log.say(
            f"{millions:.1f} M parameters, {len(self.split)} images, {self.order.per_epoch} steps "
            f"per epoch, {self.device.world} x {self.device.torch_device}, {self.device.dtype}"
        )
        if cfg.objective == "scst":
            self.log.say(self.self_critical.signature())
        if self.resumes:
            self.log.say(f"resumed from {self.last_path} at step {self.progress.step}")
        elif cfg.resume:
            self.log.say(f"no {self.last_path} yet: starting from {cfg.init_from or 'scratch'}")
        for name in ("features", "grid", "normalize", "lowercase"):
            prepared = getattr(self.split.meta, name)
            if getattr(cfg, name) != prepared:
                self.notes.append(f"using {name}={prepared}, as {cfg.data_dir} was prepared")
        for note in self.notes:
            self.log.say(f"    note: {note}")


def compile_parts(model: ClipLM, **options):
    """Compile the model's blocks in place, and the loss. Return it. `options` are torch.compile's.

    Each alone: all in one graph takes minutes, or fails (LOG.md).
    """
    for block in model.transformer.h:
        block.compile(dynamic=True, **options)
    return torch.compile(cross_entropy, dynamic=True, **options)


def model_config(cfg: Config, meta: Meta) -> ModelConfig:
    """Return the settings of the model. Raise UserError if block_size is too short."""
    known = asdict(cfg) | asdict(meta)
    config = ModelConfig(**{field.name: known[field.name] for field in fields(ModelConfig)})
    needed = config.prefix_length + meta.longest_caption
    if needed > cfg.block_size:
        raise UserError(
            f"block_size={cfg.block_size} is too short for a prefix of {config.prefix_length} "
            f"and a caption of {meta.longest_caption}: set --block_size={needed}"
        )
    return config


class Average:
    """A copy of the model whose weights are the exponential moving average of the model's.

    Averaged weights caption better than those of any one step (Polyak & Juditsky 1992). They are
    evaluated and saved in ckpt.pt, but never trained: training continues from the model's own. With
    a decay of 0 there is no average: `model` is the model itself. A resumed average starts from
    `weights`.
    """

    def __init__(self, model: ClipLM, decay: float, weights: dict):
        self.decay = decay
        self.source = model
        self.model = copy.deepcopy(model) if decay else model
        if decay and weights:
            self.model.load_state_dict(weights)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after `step` steps."""
        if not self.decay:
            return
        decay = min(self.decay, step / (step + 9))  # at first shorter: first weights are soon gone
        for average, own in zip(self.model.parameters(), self.source.parameters(), strict=True):
            average.lerp_(own, 1 - decay)


# ---------------------------------------------------------------------------------------------
# Evaluation


class Evaluator:
    """Loss over the validation split, and CIDEr of greedy captions of a fixed part of it.

    Each rank takes every world-th batch and image. CIDEr weighs words by how many images of the
    whole split have them in their references: from the part alone it would come out too high.
    """

    BATCH = 64  # images

    def __init__(self, model: ClipLM, split: Split, cfg: Config, device: Device, signals: Signals):
        self.model, self.split, self.device, self.signals = model, split, device, signals
        n = min(cfg.eval_images or len(split), len(split))
        self.images = np.linspace(0, len(split) - 1, n, dtype=np.int64)  # the same every time
        _, self.references = split.references()
        self.cider = metrics.CiderD(self.references)  # of the whole split
        self.n_samples = cfg.samples

    @torch.inference_mode()
    def evaluate(self) -> tuple[dict | None, list[str]]:
        """Return the scores, the same on every rank, and sample captions to print.

        The scores are None if any rank had to stop. They are: val_loss, nats per token;
        shuffled_loss, the same with another image's embedding (if it is no higher, the model
        ignores the image); CIDEr; distinct, the share of different captions among all; ended, the
        share of captions that ended by themselves and were not cut at the longest length.
        """
        self.model.eval()
        sums = self.losses()
        own_captions = self.captions()
        self.model.train()
        if self.device.any(self.signals.asked):
            return None, []
        nll, shuffled, targets = self.device.sum(*sums)
        by_rank = self.device.gather(own_captions)
        captions = {image: caption for part in by_rank for image, (caption,) in part.items()}
        texts = [self.split.tokenizer.decode(captions[image].ids) for image in self.images]
        scores = {
            "val_loss": nll / targets,
            "shuffled_loss": shuffled / targets,
            "CIDEr": float(self.cider.score(self.images, texts).mean()),
            "distinct": len(set(texts)) / len(texts),
            "ended": sum(caption.ended for caption in captions.values()) / len(texts),
        }
        shown = np.linspace(0, len(texts) - 1, min(self.n_samples, len(texts)), dtype=int)
        samples = [f"    {texts[i]}   ⟵ {self.references[self.images[i]][0]}" for i in shown]
        return scores, samples

    def losses(self) -> tuple[float, float, float]:
        """Return this rank's summed loss, the same with each embedding replaced by that of the
        image before, and the number of targets."""
        nll = shuffled = targets = 0.0
        by_length = np.argsort(self.split.lengths, kind="stable")  # similar lengths pad little
        rows = np.array_split(by_length, -(-len(by_length) // self.BATCH))  # none is left alone
        for batch in prefetch(self.split.pack, rows[self.device.rank :: self.device.world]):
            if self.signals.asked:
                break
            batch = self.device.put(batch)
            other = batch | {"embeddings": batch["embeddings"].roll(1, 0)}
            with self.device.autocast():
                nll += loss_sum(self.model, batch).item()
                shuffled += loss_sum(self.model, other).item()
            targets += len(batch["targets"])
        return nll, shuffled, targets

    def captions(self) -> dict[int, list[Caption]]:
        """Return the greedy caption of each of this rank's share of `images`."""
        captions: dict[int, list[Caption]] = {}
        tokenizer = self.split.tokenizer
        longest = self.split.meta.longest_caption
        own = self.images[self.device.rank :: self.device.world]
        for i in range(0, len(own), self.BATCH):
            if self.signals.asked:
                break
            some = own[i : i + self.BATCH]
            embeddings = self.split.embedding(some).to(self.device.torch_device)
            with self.device.autocast():
                best = generate(self.model, embeddings, tokenizer, Decoding(), longest=longest)
            captions.update(zip(some, best, strict=True))
        return captions


if __name__ == "__main__":
    run(lambda: main(configure(Config, sys.argv[1:], __doc__)))
