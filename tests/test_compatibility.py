"""Datasets and checkpoints that commit 39eb4bb wrote still open, resume and caption as they did.

`written_by_39eb4bb.tar.xz` holds what that commit wrote in one run, one thread, torch 2.13.0:
data/tiny (16 and 8 images), before/ (ckpt.pt, last.pt and log.jsonl after 6 of 12 steps, with
dropout, noise, label smoothing and a moving average), what its own resumption then logged
(expected.json) and computed (expected.pt), and its captions (greedy.json, beam.json).
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, log_of, losses, weights

import sample
import train
from configurator import Config
from sample import SampleConfig

SETTINGS = dict(
    dataset="tiny", n_prefix=2, n_layer=1, n_head=2, n_embd=16, block_size=32, dropout=0.1,
    ema=0.9, label_smoothing=0.1, embedding_noise=0.05, batch_size=8, max_iters=12,
    learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, eval_interval=6, log_interval=1,
    device="cpu", dtype="float32", out_dir="out",
)  # fmt: skip


@pytest.fixture
def earlier(tmp_path, monkeypatch, no_java) -> Path:
    with tarfile.open(ROOT / "tests" / "written_by_39eb4bb.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_earlier_run_resumes_bit_for_bit(earlier):
    """Bit for bit on the kind of CPU that wrote it; others round differently."""
    expected = json.loads(Path("expected.json").read_text())
    shutil.copytree("before", "out")
    train.main(Config(**SETTINGS, resume=True))
    here = {"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    same_machine = all(expected[name] == value for name, value in here.items())
    tolerance = 0 if same_machine else 1e-5
    assert losses("out") == pytest.approx(expected["losses"], rel=0, abs=tolerance)
    final = torch.load("expected.pt", weights_only=True)
    resumed = weights("out/last.pt")
    for name, value in final.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=10 * tolerance)
    ours = [row for row in log_of("out") if "val_loss" in row]
    for row, theirs in zip(ours, expected["evaluations"], strict=True):
        assert row["val_loss"] == pytest.approx(theirs["val_loss"], abs=tolerance)


@pytest.mark.parametrize("method, n_best", [("greedy", 1), ("beam", 2)])
def test_an_earlier_checkpoint_captions_as_it_did(earlier, method, n_best):
    sample.main(
        SampleConfig(ckpt="before/ckpt.pt", split="val", data="data/tiny", device="cpu",
                     out_json="now.json", method=method, n_best=n_best)
    )  # fmt: skip
    now, before = (json.loads(Path(f"{name}.json").read_text()) for name in ("now", method))
    for ours, theirs in zip(now, before, strict=True):
        assert ours["caption"] == theirs["caption"] and ours["tokens"] == theirs["tokens"]
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=2e-4)
        assert ours["scores"] == pytest.approx(theirs["scores"])
        assert ours.keys() == theirs.keys()
