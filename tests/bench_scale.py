"""A dataset of COCO's size (113,287 images x 50 x 768 half floats, 8.7 GB) against a small one.

    python tests/bench_scale.py

The large array is a sparse file: it takes no room on disk, and reading it fills the page cache as
any file does, but nothing waits for a disk. Prints how long the dataset takes to open, the memory
that training needs besides the page cache, and the time per step; the two datasets alternate.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from helpers import WORDS  # noqa: E402
from numpy.lib.format import open_memmap  # noqa: E402

from configurator import configure  # noqa: E402
from data import Meta, Split, write_split  # noqa: E402
from parts.common import run  # noqa: E402
from parts.sources import Record  # noqa: E402
from prepare import train_tokenizer  # noqa: E402

P, D = 50, 768


@dataclass(frozen=True)
class ScaleConfig:
    images: int = 113287  # of the large dataset
    few: int = 2000  # of the small one
    steps: int = 60  # per turn
    turns: int = 5  # of each dataset
    data: str = ""  # where to write them; empty: a temporary folder


def dataset(folder: Path, images: int) -> None:
    """Write a dataset: embeddings that are all zero, and five captions of 5 to 15 words each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    counts, tokenizer = {}, None
    for split, n in (("train", images), ("val", 64)):
        words = rng.choice(WORDS, (n, 5, 15)).tolist()
        lengths = rng.integers(5, 16, (n, 5)).tolist()
        records = []
        for i in range(n):
            pairs = zip(words[i], lengths[i], strict=True)
            records.append(Record(i, f"{i}.jpg", [" ".join(w[:length]) for w, length in pairs]))
        if not tokenizer:
            texts = [caption for record in records[:1000] for caption in record.captions]
            tokenizer = train_tokenizer(texts, 64)
            (folder / "tokenizer.model").write_bytes(tokenizer.model)
        open_memmap(folder / f"{split}_embeddings.npy", "w+", np.float16, (n, P, D)).flush()
        counts[split] = write_split(folder, split, records, tokenizer)
    meta = Meta(
        dataset=folder.name, source="test", captions="", images="", encoder="", features="grid",
        grid=0, n_positions=P, embedding_dim=D, normalize=True, lowercase=False,
        vocab_size=len(tokenizer), splits=counts,
    )  # fmt: skip
    meta.write(folder)


def train(name: str, steps: int) -> dict:
    """Train in a process of its own. Return the milliseconds per step, the share of them spent
    waiting for data, and the most MB the process held in memory, without pages of mapped files."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), f"--dataset={name}", f"--max_iters={steps}",
         "--n_layer=2", "--n_head=4", "--n_embd=128", "--batch_size=64", "--log_interval=10",
         f"--eval_interval={steps}", "--device=cpu"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peak = 0.0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak] + [int(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon")])
        time.sleep(0.05)
    assert process.returncode == 0
    log = Path("out") / name / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if "ms_per_step" in row][1:]  # the first includes the warm-up
    return {
        "ms": statistics.median(row["ms_per_step"] for row in rows),
        "waiting": statistics.median(row["waiting"] for row in rows),
        "mb": peak,
    }


def main(cfg: ScaleConfig) -> None:
    os.chdir(cfg.data or tempfile.mkdtemp())
    for name, images in (("large", cfg.images), ("small", cfg.few)):
        if not Path("data", name, "meta.json").is_file():
            dataset(Path("data", name), images)
        array = Path("data", name, "train_embeddings.npy").stat()
        begin = time.perf_counter()
        Split(Path("data", name), "train")
        seconds = time.perf_counter() - begin
        disk = array.st_blocks * 512 / 1e6
        size = f"{array.st_size / 1e9:.2f} GB of embeddings ({disk:.1f} MB on disk)"
        print(f"{name}: {size}, opens in {seconds:.2f} s", flush=True)
    results: dict[str, list[dict]] = {"large": [], "small": []}
    for turn in range(cfg.turns):
        for name, rows in results.items():
            rows.append(train(name, cfg.steps))
            print(f"turn {turn + 1}, {name}: {rows[-1]['ms']:.0f} ms per step, waiting "
                  f"{rows[-1]['waiting']:.1%}, {rows[-1]['mb']:.0f} MB", flush=True)  # fmt: skip
    pairs = zip(results["large"], results["small"], strict=True)
    ratios = [large["ms"] / small["ms"] for large, small in pairs]
    print(json.dumps({
        "images": cfg.images,
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "mb": max(row["mb"] for row in results["large"]),
        "waiting": max(row["waiting"] for row in results["large"]),
    }))  # fmt: skip


if __name__ == "__main__":
    run(lambda: main(configure(ScaleConfig, sys.argv[1:], __doc__, files=False)))
