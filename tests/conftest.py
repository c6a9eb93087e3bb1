"""A tiny dataset of real files, for the tests of training, checkpoints and sampling."""

from pathlib import Path

import numpy as np
import pytest

from data import write_array, write_meta, write_split
from prepare import train_tokenizer

WORDS = "dog cat bird horse cow sheep runs sleeps eats jumps red blue green small large old".split()


def tiny_records(n: int, first: int, rng: np.random.Generator) -> list[dict]:
    """Images with one to four captions of two to eight words."""
    return [
        {
            "id": first + i,
            "file_name": f"{first + i}.png",
            "captions": [
                " ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(rng.integers(1, 5))
            ],
        }
        for i in range(n)
    ]


def tiny_dataset(folder: Path, images: int = 24, width: int = 16) -> Path:
    """Writes train and val splits with random embeddings, (N, 1, width)."""
    rng = np.random.default_rng(0)
    splits = {"train": tiny_records(images, 0, rng), "val": tiny_records(8, images, rng)}
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([c for r in splits["train"] for c in r["captions"]], 64)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    counts = {}
    for split, records in splits.items():
        embeddings = rng.standard_normal((len(records), 1, width)).astype(np.float16)
        write_array(folder / f"{split}_embeddings.npy", embeddings)
        counts[split] = write_split(folder, split, records, tokenizer)
    write_meta(folder, {
        "dataset": folder.name, "source": "test", "captions": "", "images": "", "encoder": "",
        "features": "pooled", "grid": 0, "n_positions": 1, "embedding_dim": width,
        "normalize": True, "lowercase": False, "vocab_size": len(tokenizer), "splits": counts,
    })  # fmt: skip
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with data/tiny in it."""
    tiny_dataset(tmp_path / "data" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path
