"""What several test files share: tiny datasets and encoders, and scripts started as users do.

A script runs in a fresh interpreter (`start`, `finish`, `one_line`), or, where a test patches
something or runs it a hundred times, within pytest (`outcome`). Nothing here forks.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from data import Meta, write_array, write_split
from parts.sources import Record

ROOT = Path(__file__).parents[1]
PATIENCE = 180  # seconds after which a process that is waited for has failed

# ---------------------------------------------------------------------------------------------
# A tiny dataset, and the settings that train on it in a second

WORDS = "dog cat bird horse cow sheep runs sleeps eats jumps red blue green small large old".split()
SMALL = dict(
    dataset="tiny", n_prefix=2, n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0,
    batch_size=8, max_iters=12, learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, eval_interval=6,
    log_interval=1, device="cpu", dtype="float32",
)  # fmt: skip


def flags(**changes) -> list[str]:
    """SMALL with some changes, as a command line has it."""
    return [f"--{k}={v}" for k, v in (SMALL | changes).items()]


def tiny_records(n: int, first: int, rng: np.random.Generator) -> list[Record]:
    """Return images with one to four captions of two to eight words."""
    records = []
    for number in range(first, first + n):
        captions = [
            " ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(rng.integers(1, 5))
        ]
        records.append(Record(number, f"{number}.png", captions))
    return records


def tiny_dataset(folder: Path, images: int = 24, width: int = 16) -> Path:
    """Write train and val splits with random embeddings, (N, 1, width)."""
    from prepare import train_tokenizer

    rng = np.random.default_rng(0)
    splits = {"train": tiny_records(images, 0, rng), "val": tiny_records(8, images, rng)}
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([c for r in splits["train"] for c in r.captions], 64)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    counts = {}
    for split, records in splits.items():
        embeddings = rng.standard_normal((len(records), 1, width)).astype(np.float16)
        write_array(folder / f"{split}_embeddings.npy", embeddings)
        counts[split] = write_split(folder, split, records, tokenizer)
    meta = Meta(
        dataset=folder.name, source="test", captions="", images="", encoder="", features="pooled",
        grid=0, n_positions=1, embedding_dim=width, normalize=True, lowercase=False,
        vocab_size=len(tokenizer), splits=counts,
    )  # fmt: skip
    meta.write(folder)
    return folder


BOS, EOS, PAD = 1, 2, 0  # in `pack_by_loops`


def pack_by_loops(images: list[list[list[int]]]) -> dict:
    """Return packed rows made by plain loops, the oracle of `Split.pack`.

    `images` holds the captions of each image as lists of ids.
    """
    width = max(sum(len(caption) + 1 for caption in captions) for captions in images)
    rows: dict = {"tokens": [], "segments": [], "positions": []}
    targets_at, targets = [], []
    for b, captions in enumerate(images):
        tokens, segments, positions = [], [], []
        for r, caption in enumerate(captions):
            for i, (token, target) in enumerate(zip([BOS, *caption], [*caption, EOS], strict=True)):
                targets_at.append(b * width + len(tokens))
                targets.append(target)
                tokens.append(token)
                segments.append(r + 1)
                positions.append(i)
        padding = width - len(tokens)
        rows["tokens"].append(tokens + [PAD] * padding)
        rows["segments"].append(segments + [99] * padding)
        rows["positions"].append(positions + [0] * padding)
    batch = {name: torch.tensor(row) for name, row in rows.items()}
    return batch | {"targets_at": torch.tensor(targets_at), "targets": torch.tensor(targets)}


# ---------------------------------------------------------------------------------------------
# A tiny CLIP, a tiny GPT-2, and photos

SIDE, PATCH = 32, 8


def tiny_clip(folder, kind="clip", projection=24, vocab=9):
    """A CLIP or SigLIP of some thousand random parameters, in transformers' format."""
    import transformers

    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=SIDE, patch_size=PATCH)  # fmt: skip
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=vocab, max_position_embeddings=8, bos_token_id=1, eos_token_id=2,
                pad_token_id=0)  # fmt: skip
    square = {"height": SIDE, "width": SIDE}
    if kind == "clip":
        vision, text = (x | {"projection_dim": projection} for x in (vision, text))
        config = transformers.CLIPConfig(
            projection_dim=projection, vision_config=vision, text_config=text
        )
        model = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=square
        )
    else:
        config = transformers.SiglipConfig(vision_config=vision, text_config=text)
        model = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessorPil(size=square)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def tiny_gpt2(folder, layers=2, **changes):
    """A random GPT-2 with a byte-level BPE of some 330 tokens, in transformers' format."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator([f" {word}" for word in WORDS], trainer)
    folder.mkdir()
    bpe.model.save(str(folder))  # vocab.json and merges.txt, GPT-2's own files
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=layers, n_head=2, n_positions=48)
    config = transformers.GPT2Config(vocab_size=bpe.get_vocab_size(), bos_token_id=None,
                                     eos_token_id=None, **sizes | changes)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # biases too, so that mistakes show
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def picture(width, height, seed=0):
    """A smooth random RGB image, so that JPEG and resizing change it little."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def photos(folder: Path, names) -> None:
    """Write a picture for each name."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20 + i % 15, 30 - i % 15, i).save(folder / name)


def many(folder: Path, train: int, val: int = 4) -> dict:
    """Write that many photos and CSVs in which a caption names its photo. Return the settings."""
    for split, n in (("train", train), ("val", val)):
        names = [f"{split}{i}.png" for i in range(n)]
        photos(folder / "photos", names)
        rows = [f"{name},photo {name[:-4]}" for name in names]
        (folder / f"{split}.csv").write_text("\n".join(["image,caption", *rows]))
    return {"dataset": "mine", "source": "csv", "captions": "{split}.csv", "images": "photos"}


def made(folder: Path | str = "data/mine") -> dict[str, bytes]:
    """The bytes of a dataset's files."""
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*")) if p.is_file()}


class RunsCode:
    """What a pickle may hold: loaded without care, it makes the folder `executed`."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


# ---------------------------------------------------------------------------------------------
# Scripts in processes of their own

STARTED: list[subprocess.Popen] = []  # conftest.py looks for those that a test left running


def start(*args, processes: int = 0, **options) -> subprocess.Popen:
    """Start train.py, or another script or `-c` and code, in a fresh interpreter or by torchrun.

    SIGABRT makes it print the stacks of its threads (see `stacks`). `options` go to Popen.
    """
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script, *rest = map(str, args)
    return spawn([*launch, script if script == "-c" else str(ROOT / script), *rest], **options)


def spawn(command: list[str], **options) -> subprocess.Popen:
    """Start a command that a test waits for, its output in pipes."""
    env = options.pop("env", os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=env, text=True, **(pipes | options))
    STARTED.append(process)
    return process


def wait(process: subprocess.Popen, seconds: float = PATIENCE) -> tuple[str, str]:
    """Wait until a process ends. Return its stdout and stderr. One that does not end fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.args} still runs:\n{stacks(process)}") from None
    return out or "", err or ""


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait until a process ends with `status`. Return what it printed."""
    out, err = wait(process)
    assert process.returncode == status, err[-3000:]
    return out + err


def one_line(process: subprocess.Popen) -> str:
    """Wait until a process fails with one line on stderr, which is returned."""
    _, err = wait(process)
    assert process.returncode in (1, 2), err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


def stacks(process: subprocess.Popen) -> str:
    """End a process and all that it started. Return the last that they printed: their stacks."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGABRT)
        except ProcessLookupError:
            continue
    try:
        return "".join(filter(None, process.communicate(timeout=10)))[-6000:]
    except subprocess.TimeoutExpired:
        process.kill()
        return "(it did not end within 10 seconds of SIGABRT)"


def children(pid: int) -> list[int]:
    """The processes that process `pid` started and that run: of torchrun, its workers."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(own) for own, parent, stat in rows if int(parent) == pid and stat[0] != "Z"]


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on."""
    family = children(pid)
    for member in family:  # it grows meanwhile
        family += children(member)
    return family


def wait_for_steps(log: Path, n: int, *processes: subprocess.Popen) -> None:
    """Wait until a run has logged n steps. Fail, with what it printed, if its processes end."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        if log.is_file() and log.read_text().count('"loss"') >= n:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {n} steps in {log}:\n" + "\n".join(map(stacks, processes)))


def outcome(script: str, args: list[str], capfd) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a script that is run in this very process."""
    capfd.readouterr()
    status, argv = 0, sys.argv
    names = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2".split()
    handlers = [(s, signal.getsignal(s)) for s in map(signal.Signals.__getitem__, names)]
    streams = sys.stdout, sys.stderr
    sys.argv = [str(ROOT / script), *args]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):  # what the interpreter does with it
            print(status, file=sys.stderr)
            status = 1
    except BaseException:  # noqa: BLE001 - it is what a user would see
        traceback.print_exc()
        status = -1
    finally:
        sys.argv = argv
        sys.stdout, sys.stderr = streams
        for number, handler in handlers:
            signal.signal(number, handler)
    return status, *capfd.readouterr()


def succeed(script: str, args: list[str], capfd) -> str:
    """Run a script in this process, with exit status 0. Return what it printed."""
    status, out, err = outcome(script, args, capfd)
    assert status == 0, err
    return out + err


def mistake(script: str, args: list[str], capfd) -> str:
    """Run a script in this process. Return the one line on stderr with which it fails."""
    status, _, err = outcome(script, args, capfd)
    assert status in (1, 2), err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


# ---------------------------------------------------------------------------------------------
# What a run wrote


def log_of(out: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out: Path | str) -> list[float]:
    return [row["loss"] for row in log_of(out) if "loss" in row]


def weights(path: Path | str) -> dict:
    return torch.load(path, weights_only=True)["model"]


def equal(a: str, b: str) -> bool:
    """Whether two runs' weights and logged losses are bit-equal."""
    files = [(weights(f"{a}/{name}"), weights(f"{b}/{name}")) for name in ("ckpt.pt", "last.pt")]
    same = all(torch.equal(v, y[k]) for x, y in files for k, v in x.items())
    return same and losses(a) == losses(b)
