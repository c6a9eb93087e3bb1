"""What a training run prints and logs: a bar or plain lines, log.jsonl, and a tracker."""

import json
import time
from collections import Counter

from tqdm import tqdm

from parts.common import append, read_log, write_text
from parts.tracking import Tracker


class Log:
    """The progress bar, log.jsonl and the tracker; silent on every rank but the first."""

    def __init__(self, cfg, device, model, step: int, resumes: bool, tracker: Tracker):
        self.device, self.model, self.tracker = device, model, tracker
        self.peak = device.matmul_rate() * device.world  # FLOP/s, the most that was measured
        # None: a bar on a terminal, plain lines in a file.
        self.bar = tqdm(total=cfg.max_iters, initial=step, unit="step",
                        disable=None if device.is_first else True)  # fmt: skip
        self.path = cfg.run_dir / "log.jsonl"
        device.on_first(lambda: write_text(self.path, lines_until(self.path, step, resumes)))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to measure anew, after a line, an evaluation or a save."""
        self.begin = time.perf_counter()
        self.steps = 0
        self.waited = 0.0  # seconds, for batches
        self.counts = Counter()  # sums of each step's global counts

    def count(self, counts: dict, waited: float) -> None:
        """Note a step's global counts and the seconds that it waited for its batch."""
        self.steps += 1
        self.waited += waited
        self.counts.update(counts)
        self.bar.update()

    def line(self, step: int, loss: float, norm: float, lr: float) -> None:
        """Log a step's figures, and the speed since the last line."""
        seconds = time.perf_counter() - self.begin
        images = self.counts.pop("images")
        captions = self.counts.pop("captions")
        targets = self.counts.pop("targets")
        flops = training_flops(self.model, images, targets)
        # A run that beats the peak shows that the machine was busy when the peak was measured.
        self.peak = max(self.peak, flops / seconds)
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "ms_per_step": 1e3 * seconds / self.steps,
            "captions_per_s": captions / seconds,
            "tokens_per_s": targets / seconds,
            "mfu": flops / seconds / self.peak,
            "waiting": self.waited / seconds,
        }
        # What self-critical training counts besides: sums over its sampled captions.
        more = {name: total / captions for name, total in self.counts.items()}
        self.write(row | more)
        text = "".join(f"{name} {value:.3f} · " for name, value in more.items())
        text += (
            "loss {loss:.3f} · norm {grad_norm:.2f} · lr {lr:.1e} · {ms_per_step:.0f} ms · "
            "{captions_per_s:.0f} captions/s · {tokens_per_s:.0f} tokens/s · MFU {mfu:.0%}"
        ).format(**row)
        if self.bar.disable:
            self.say(f"step {step}: {text}")
        else:
            self.bar.set_postfix_str(text)
        self.restart_clock()

    def evaluation(self, step: int, scores: dict, samples: list[str]) -> None:
        """Log an evaluation's figures and print its samples. Measure the peak once more."""
        self.peak = max(self.peak, self.device.matmul_rate(2) * self.device.world)
        self.write({"step": step, **scores, "samples": samples})
        figures = " · ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.say("\n".join([f"step {step}: {figures}", *samples]))

    def write(self, row: dict) -> None:
        if self.device.is_first:
            append(self.path, json.dumps(row) + "\n")
            self.tracker.log(row)

    def say(self, text: str) -> None:
        if self.device.is_first:
            self.bar.write(text)

    def close(self, best_path, best: tuple[float, float]) -> None:
        """End the bar and the tracked run, which keeps a copy of ckpt.pt."""
        self.bar.close()
        if self.device.is_first:
            self.tracker.artifact(best_path)
            self.tracker.close()
            print(f"best CIDEr {best[0]:.4f} in {best_path}")


def lines_until(path, step: int, resumes: bool = True) -> str:
    """Return the lines that a run keeps: none if it is new; if it is resumed, those up to `step`,
    since it writes the later ones again."""
    if not resumes or not path.is_file():
        return ""
    return "".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step)


def training_flops(model, images: int, tokens: int) -> float:
    """Return the useful floating-point operations of one training step.

    Six for each weight that a position passes through (two forward, four backward; Kaplan et
    al. 2020, arXiv:2001.08361), four if it is frozen. Attention's own few per cent and padding are
    left out.
    """
    cfg = model.cfg
    # 12 C^2 weights per layer: 4 C^2 in attention, 8 C^2 in the MLP
    decoder = 12 * cfg.n_embd**2 * cfg.n_layer * (images * cfg.prefix_length + tokens)
    mapper = sum(p.numel() for p in model.mapper.parameters() if p.dim() == 2)
    head = cfg.vocab_size * cfg.n_embd * tokens
    each = 4 + 2 * model.lm_head.weight.requires_grad
    return float(each * (decoder + head) + 6 * mapper * images * cfg.n_positions)
