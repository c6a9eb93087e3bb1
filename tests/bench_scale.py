"""A dataset of COCO's size (113,287 images x 50 x 768 half floats, 8.7 GB) beside a small one.

    python tests/bench_scale.py

The large array is a sparse file: it takes no room on disk, and reading it fills the page cache as
any file does, but no disk is waited for. Prints how long the dataset takes to open, the memory
that training needs besides the page cache, and the time of a step, the two datasets in turns.
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

from configurator import configure, run  # noqa: E402
from data import Split, write_meta, write_split  # noqa: E402
from prepare import train_tokenizer  # noqa: E402

P, D = 50, 768


@dataclass(frozen=True)
class ScaleConfig:
    images: int = 113287  # of the large dataset
    few: int = 2000  # of the small one
    steps: int = 60  # of each turn
    turns: int = 5  # of each dataset
    data: str = ""  # where to write them; empty: a temporary folder


def dataset(folder: Path, images: int) -> None:
    """`images` images of embeddings that are all zero, five captions of five to fifteen words."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    counts, tokenizer = {}, None
    for split, n in (("train", images), ("val", 64)):
        words = rng.choice(WORDS, (n, 5, 15)).tolist()
        lengths = rng.integers(5, 16, (n, 5)).tolist()
        records = [
            {"id": i, "file_name": f"{i}.jpg",
             "captions": [" ".join(w[:k]) for w, k in zip(words[i], lengths[i], strict=True)]}
            for i in range(n)
        ]  # fmt: skip
        if not tokenizer:
            texts = [c for record in records[:1000] for c in record["captions"]]
            tokenizer = train_tokenizer(texts, 64)
            (folder / "tokenizer.model").write_bytes(tokenizer.model)
        open_memmap(folder / f"{split}_embeddings.npy", "w+", np.float16, (n, P, D)).flush()
        counts[split] = write_split(folder, split, records, tokenizer)
    write_meta(folder, {
        "dataset": folder.name, "source": "test", "captions": "", "images": "", "encoder": "",
        "features": "grid", "grid": 0, "n_positions": P, "embedding_dim": D, "normalize": True,
        "lowercase": False, "vocab_size": len(tokenizer), "splits": counts,
    })  # fmt: skip


def train(name: str, steps: int) -> dict:
    """Milliseconds of a step, the share of it that waited for data, and the most MB that the
    process held in memory, the pages of mapped files apart."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), f"--dataset={name}", f"--max_iters={steps}",
         "--n_layer=2", "--n_head=4", "--n_embd=128", "--batch_size=64", "--log_interval=10",
         f"--eval_interval={steps}", "--device=cpu"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    held = 0.0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        held = max([held] + [int(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon")])
        time.sleep(0.05)
    assert process.returncode == 0
    log = Path("out") / name / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if "ms_per_step" in row][1:]  # the first has the warming up
    return {
        "ms": statistics.median(row["ms_per_step"] for row in rows),
        "waiting": statistics.median(row["waiting"] for row in rows),
        "mb": held,
    }


def main(cfg: ScaleConfig) -> None:
    os.chdir(cfg.data or tempfile.mkdtemp())
    for name, images in (("large", cfg.images), ("small", cfg.few)):
        if not Path("data", name, "meta.json").is_file():
            dataset(Path("data", name), images)
        array = Path("data", name, "train_embeddings.npy").stat()
        begin = time.perf_counter()
        Split(Path("data", name), "train")
        took = time.perf_counter() - begin
        disk = array.st_blocks * 512 / 1e6
        size = f"{array.st_size / 1e9:.2f} GB of embeddings ({disk:.1f} MB on disk)"
        print(f"{name}: {size}, open in {took:.2f} s", flush=True)
    found: dict[str, list[dict]] = {"large": [], "small": []}
    for turn in range(cfg.turns):
        for name, rows in found.items():
            rows.append(train(name, cfg.steps))
            print(f"turn {turn + 1}, {name}: {rows[-1]['ms']:.0f} ms a step, waiting "
                  f"{rows[-1]['waiting']:.1%}, {rows[-1]['mb']:.0f} MB", flush=True)  # fmt: skip
    ratios = [a["ms"] / b["ms"] for a, b in zip(found["large"], found["small"], strict=True)]
    print(json.dumps({
        "images": cfg.images,
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "mb": max(row["mb"] for row in found["large"]),
        "waiting": max(row["waiting"] for row in found["large"]),
    }))  # fmt: skip


if __name__ == "__main__":
    run(main, configure(ScaleConfig, sys.argv[1:], __doc__, files=False))
