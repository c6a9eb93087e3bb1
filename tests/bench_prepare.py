"""Measure how fast prepare.py reads captions and encodes images. Not a test.

    python tests/bench_prepare.py                    # CSVs of 25,000 to 200,000 captions
    python tests/bench_prepare.py --most=3000000     # as many as CC3M has
    python tests/bench_prepare.py --images=FOLDER    # JPEGs, through a ViT-B of random weights

The first runs prepare.py on each CSV and extrapolates time and memory to 3 million captions, by a
fitted line. The second alternates the model alone, on tensors in memory, with the whole path from
files, including the start of the reading threads. On a busy machine, ignore the wall-clock figures:
compare the process's CPU time, and the milliseconds that reading one image takes.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure  # noqa: E402
from parts.common import run  # noqa: E402
from parts.encoder import Encoder, find_images  # noqa: E402


@dataclass(frozen=True)
class Bench:
    images: str = ""  # folder of JPEGs; empty: measure captions
    most: int = 200_000  # captions of the largest CSV; the others have 1/2, 1/4 and 1/8 of them
    layers: int = 12  # of the vision tower, which is otherwise ViT-B's
    patch: int = 32  # its patches' side
    batch: int = 64  # images
    batches: int = 8  # encoded in each round
    rounds: int = 5  # after one that warms up
    workers: int = 2  # threads that read images


def captions(cfg: Bench, folder: Path) -> None:
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnoprstuvw"), n))
                      for n in rng.integers(2, 10, 20_000)])  # fmt: skip
    often = 1 / np.arange(1, len(words) + 1)  # Zipf's law
    results = []
    for n in (cfg.most // 8, cfg.most // 4, cfg.most // 2, cfg.most):
        with open(folder / "train.csv", "w") as file:
            print("image,caption", file=file)
            text = rng.choice(words, (n, 11), p=often / often.sum())
            for i, caption in enumerate(text):
                print(f"{i:07d}.jpg,{' '.join(caption)}", file=file)
        (folder / "val.csv").write_text("image,caption\nval.jpg,a val image\n")
        names = [*(f"{i:07d}.jpg" for i in range(n)), "val.jpg"]
        (folder / "names.txt").write_text("\n".join(names))
        np.save(folder / "e.npy", np.ones((len(names), 4), np.float16))
        begin, command = time.perf_counter(), [
            sys.executable, str(ROOT / "prepare.py"), "--dataset=mine", "--source=csv",
            "--captions={split}.csv", "--embeddings=e.npy", "--embedding_names=names.txt",
        ]  # fmt: skip
        child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0
        took, cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
        results.append((n, took, cpu, usage.ru_maxrss / 1e6))
        print(f"{n} captions, one per image: {took:.1f} s ({cpu:.1f} s of CPU), "
              f"{results[-1][3]:.2f} GB", flush=True)  # fmt: skip
    n, took, cpu, memory = np.array(results).T
    for name, values in (("s", took), ("s of CPU", cpu), ("GB", memory)):
        slope, base = np.polyfit(n, values, 1)
        print(f"3,000,000 captions, by the line through these: {base + slope * 3e6:.1f} {name}")


def encoding(cfg: Bench, folder: Path) -> None:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=cfg.layers,
        num_attention_heads=12, patch_size=cfg.patch, projection_dim=512,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPImageProcessorPil().save_pretrained(folder)
    encoder = Encoder(str(folder), device="cuda" if torch.cuda.is_available() else "cpu")
    paths, n = find_images([cfg.images])[0], cfg.batch * cfg.batches
    files = [(paths[i % len(paths)],) for i in range(n)]
    batches = [files[i : i + cfg.batch] for i in range(0, n, cfg.batch)]
    ready = [encoder.read(batch)[0] for batch in batches]
    shares, own = [], []
    for i in range(cfg.rounds + 1):
        begin, cpu = time.perf_counter(), time.process_time()
        for pixels in ready:
            encoder.encode(pixels).cpu()
        middle, cpu_middle = time.perf_counter(), time.process_time()
        done = sum(len(x) for x, _ in encoder.stream(batches, cfg.workers))
        bare, whole = n / (middle - begin), done / (time.perf_counter() - middle)
        if i:
            shares.append(whole / bare)
            own.append((cpu_middle - cpu) / (time.process_time() - cpu_middle))
            print(f"bare model {bare:.1f} images/s, from files {whole:.1f}: {shares[-1]:.1%}; "
                  f"by the CPU time of the model's process {own[-1]:.1%}", flush=True)  # fmt: skip
    print(f"mean {np.mean(shares):.1%} ± {np.std(shares):.1%} of the "
          f"bare model's speed; {np.mean(own):.1%} ± {np.std(own):.1%} by CPU time")  # fmt: skip
    begin = time.process_time()
    for batch in batches:
        encoder.read(batch)
    print(f"{encoder.device}, {cfg.layers} layers, patches of {cfg.patch}, {cfg.workers} workers, "
          f"{torch.get_num_threads()} threads; to read and resize an image takes "
          f"{1e3 * (time.process_time() - begin) / n:.1f} ms of CPU")  # fmt: skip


def main(cfg: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (encoding if cfg.images else captions)(cfg, Path(folder))


if __name__ == "__main__":
    run(lambda: main(configure(Bench, sys.argv[1:], __doc__, files=False)))
