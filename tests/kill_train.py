"""Twenty SIGKILLs of a training run, half of them during a save; in the end all must be equal.

    python tests/kill_train.py                  # one process
    python tests/kill_train.py --processes=2    # under torchrun

Trains on a tiny dataset undisturbed, then again under kills, going on with --resume after each.
Prints when each kill struck and what was lost, and whether the two runs' checkpoints (weights,
optimizer, average, random states, best score) and logged losses are bit-equal.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers import descendants, finish, flags, losses, start, tiny_dataset, wait  # noqa: E402

from configurator import configure  # noqa: E402
from parts.common import run  # noqa: E402

MOMENTS = ("a step", "a save", "a step", "a save", "the start")


@dataclass(frozen=True)
class KillConfig:
    processes: int = 0  # 0: without torchrun
    kills: int = 20
    steps: int = 300  # of the whole run
    seed: int = 0  # of the moments


def kill(process: subprocess.Popen, moment: str, steps: int, chance: random.Random) -> None:
    """Kills at the moment, `steps` after the run resumed, all of its processes."""
    log, out = Path("parts/log.jsonl"), Path("parts")
    before, began = log.stat().st_ino if log.exists() else 0, time.time()

    def resumed() -> bool:  # then the log is a new file
        return log.exists() and log.stat().st_ino != before

    def saving() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            return any(part.stat().st_mtime > began for part in out.glob("*.pt*.part"))
        return False

    if moment == "the start":
        time.sleep(chance.uniform(0, 5))
    while moment != "the start" and process.poll() is None and not resumed():
        time.sleep(0.01)
    members = [process.pid, *descendants(process.pid)]
    if moment != "the start":
        goal = log.read_text().count('"loss"') + steps
        while process.poll() is None and log.read_text().count('"loss"') < goal:
            time.sleep(0.005)
    if moment == "a step":
        time.sleep(chance.uniform(0, 0.1))
    while moment == "a save" and process.poll() is None and not saving():
        time.sleep(0.0002)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(process)


def same(a, b) -> bool:
    """Bit equality of what a checkpoint holds."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(cfg: KillConfig) -> None:
    os.chdir(tempfile.mkdtemp())
    tiny_dataset(Path("data/tiny"))
    args = flags(max_iters=cfg.steps, eval_interval=4, dropout=0.1, ema=0.9, eval_images=2)
    parts = [*args, "--out_dir=parts", "--resume"]
    began = time.time()
    finish(start("train.py", *args, "--out_dir=whole", processes=cfg.processes))
    print(f"undisturbed: {cfg.steps} steps in {time.time() - began:.0f} s", flush=True)
    chance, during = random.Random(cfg.seed), 0
    for number in range(cfg.kills):
        moment = MOMENTS[number % len(MOMENTS)]
        process = start("train.py", *parts, processes=cfg.processes)
        started = time.time()
        kill(process, moment, chance.randrange(cfg.steps // cfg.kills), chance)
        over = process.returncode != -signal.SIGKILL
        logged = saved = 0
        if Path("parts/log.jsonl").exists():
            logged = Path("parts/log.jsonl").read_text().count('"loss"')
        if Path("parts/last.pt").exists():
            saved = torch.load("parts/last.pt", weights_only=True)["step"]
        left = [p.name for p in Path("parts").glob("*.part") if p.stat().st_mtime > started]
        during += bool(left)
        print(f"kill {number + 1:2} in {moment}: {logged} steps logged, {saved} saved"
              + f", half a file: {', '.join(left)}" * bool(left) + ", it had ended" * over,
              flush=True)  # fmt: skip
    finish(start("train.py", *parts, processes=cfg.processes))
    equal = losses("whole") == losses("parts")
    print(f"{during} kills struck during a save\nlosses equal: {equal}")
    for name in ("ckpt.pt", "last.pt"):
        a, b = (torch.load(f"{out}/{name}", weights_only=True) for out in ("whole", "parts"))
        keys = sorted((a.keys() | b.keys()) - {"config"})
        differ = [key for key in keys if not same(a.get(key), b.get(key))]
        print(f"{name}: " + (f"differs in {', '.join(differ)}" if differ else "bit-equal"))
        equal = equal and not differ
    rest = sorted(path.name for path in Path("parts").iterdir())
    print(f"files: {' '.join(rest)}\n{time.time() - began:.0f} s in all")
    raise SystemExit(not equal)


if __name__ == "__main__":
    run(lambda: main(configure(KillConfig, sys.argv[1:], __doc__, files=False)))
