"""Compare the speed of metrics.py with the COCO toolkit's Python classes, on the same tokens.

    python tests/bench_metrics.py                # needs pycocoevalcap; a minute on one core
    python tests/bench_metrics.py --images 1000 --rounds 3

Captions are random, about ten words of a vocabulary that follows Zipf's law, with five references
per image. Each prediction is a reference with one word exchanged. Rounds alternate between the
two, and seconds are processor time, because others may share the machine. The last line is JSON.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, whatever numpy would take
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

import metrics  # noqa: E402


def make(images: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Return hypotheses, and five references for each."""
    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(9000)]
    weights = 1 / np.arange(1, 9001)
    weights /= weights.sum()
    groups = [
        [" ".join(rng.choice(vocabulary, n, p=weights)) for n in rng.integers(8, 13, 5)]
        for _ in range(images)
    ]
    hypotheses = []
    for group in groups:
        words = group[0].split()
        words[rng.integers(len(words))] = vocabulary[rng.integers(50)]
        hypotheses.append(" ".join(words))
    return hypotheses, groups


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise SystemExit(
            "bench_metrics.py: pycocoevalcap not found: `pip install -r requirements-coco.txt`"
        ) from None

    hypotheses, groups = make(args.images)
    images = np.arange(args.images)
    gts = dict(enumerate(groups))
    res = {i: [h] for i, h in enumerate(hypotheses)}
    times = {"toolkit": [], "ours": [], "compiled": []}
    for _ in range(args.rounds):
        start = time.process_time()
        theirs = [
            Bleu(4).compute_score(gts, res, verbose=0)[0][3],
            Rouge().compute_score(gts, res)[0],
            Cider().compute_score(gts, res)[0],
        ]
        times["toolkit"].append(time.process_time() - start)

        start = time.process_time()
        compiled = metrics.CiderD(groups, tokenize=str.split)
        ours = [
            metrics.bleu(hypotheses, groups)[0][3],
            metrics.rouge_l(hypotheses, groups).mean(),
            compiled.score(images, hypotheses).mean(),
        ]
        times["ours"].append(time.process_time() - start)
        assert np.allclose(theirs, ours, atol=1e-9), (theirs, ours)

        compiled.tokenize = metrics.tokenize  # now with tokenizing, as training calls it
        start = time.process_time()
        compiled.score(images, hypotheses)
        times["compiled"].append(args.images / (time.process_time() - start))

    ratios = np.divide(times["toolkit"], times["ours"])
    print(f"BLEU, ROUGE-L, CIDEr of {args.images:,} images: median of {args.rounds} rounds")
    for name in ("toolkit", "ours"):
        print(f"{name:<8} {np.median(times[name]):7.2f} s  ({min(times[name]):.2f} to", end=" ")
        print(f"{max(times[name]):.2f})")
    print(f"ratio    {np.median(ratios):7.2f}    ({ratios.min():.2f} to {ratios.max():.2f})")
    print(
        f"CiderD   {np.median(times['compiled']):7,.0f} captions/s "
        f"({min(times['compiled']):,.0f} to {max(times['compiled']):,.0f})"
    )
    summary = {
        "ratio": float(np.median(ratios)),
        "captions_per_second": float(np.median(times["compiled"])),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
