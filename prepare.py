"""Makes a dataset directory from images (or embeddings) and captions.

    python prepare.py config/shapes.py
    python prepare.py config/coco.py                       # downloads what is missing, after asking
    python prepare.py config/flickr8k.py --captions=dataset_flickr8k.json --images=Images
    python prepare.py config/flickr8k.py --captions=dataset_flickr8k.json \\
        --embeddings=embeddings.npy --embedding_names=filenames.txt
    python prepare.py --dataset=mine --source=csv --captions=captions_{split}.csv --images=photos
    torchrun --nproc_per_node=8 prepare.py config/coco.py  # several machines need a shared data/

Checks the whole source, encodes each image once, trains the tokenizer on the training captions,
and writes `data/<dataset>/`, meta.json last; an earlier dataset there stays whole until then.
Interrupted, the same command goes on from where it was, to the same bytes. Images that cannot be
read, and in tar shards captions that cannot be used, are left out and listed in
`data/<dataset>/skipped.csv`; above `max_bad` of them it stops.
"""

import contextlib
import csv
import datetime
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from tqdm import tqdm

import download
import sources
from configurator import Config, UserError, configure, run
from data import Tokenizer, naming, read_json, replacing, write_meta, write_split, write_text

SYNC = 5.0  # seconds between the moments at which progress is made safe on disk

# ---------------------------------------------------------------------------------------------
# Several processes


class Ranks:
    """This process's rank among those of torchrun; what one does alone, and where all meet."""

    def __init__(self, place):
        self.rank, self.world, self.group = place.rank, place.world, None
        if self.world > 1:  # a download or a slow rank may let the others wait for hours
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def first(self, work):
        """What `work()` returns on rank 0, on every rank; a user's mistake there ends them all."""
        told, error = [None, None], None
        if self.rank == 0:
            try:
                told[0] = work()
            except (UserError, OSError) as problem:
                error = problem
                told[1] = str(problem)
        if self.world > 1:
            dist.broadcast_object_list(told, 0, self.group)
        if error:
            raise error
        if told[1]:
            raise SystemExit(1)
        return told[0]

    def meet(self) -> None:
        if self.world > 1:
            dist.barrier(self.group)


# ---------------------------------------------------------------------------------------------
# Embeddings: written to data/<dataset>/encoding/<split>.npy, and moved into place by `finish`


def start(cfg: Config, made_by: dict, shapes: dict[str, tuple]) -> Path:
    """The folder of unfinished embeddings, a float16 array of each split.

    As an interrupted run left it, if that was `made_by` the same; otherwise new, of zeros.
    """
    state, made_by = cfg.data_dir / "encoding", made_by | {"shapes": json.loads(json.dumps(shapes))}
    if (state / "made_by.json").is_file():
        same = read_json(state / "made_by.json") == made_by
        for split in shapes if same else ():
            final, part = cfg.data_dir / f"{split}_embeddings.npy", state / f"{split}.npy"
            whole = part.exists() or (cfg.data_dir / "meta.json").exists()
            if not whole and final.exists():  # `finish` was cut off
                os.replace(final, part)
        if same and all((state / f"{split}.npy").exists() for split in shapes):
            return state
        print("settings, images or versions differ from the unfinished run's: from the start")
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    for split, shape in shapes.items():
        np.lib.format.open_memmap(state / f"{split}.npy", "w+", np.float16, shape).flush()
    write_text(state / "made_by.json", json.dumps(made_by))
    return state


def own_embeddings(splits: dict[str, list[dict]], cfg: Config) -> dict:
    """Deals out the rows of the user's array to the splits, by file name. Returns meta's facts."""
    try:
        array = np.lib.format.open_memmap(cfg.embeddings, "r")
        names = Path(cfg.embedding_names).read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{error.filename}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{cfg.embedding_names}: not UTF-8") from None
    except ValueError as error:
        raise UserError(f"{cfg.embeddings}: not a .npy array: {error}") from None
    if array.dtype.kind not in "fiu":
        raise UserError(f"{cfg.embeddings}: not a .npy array of numbers")
    names = names[:-1] if names[-1] == "" else names
    if array.ndim not in (2, 3) or len(array) != len(names) or not array.size:
        raise UserError(
            f"{cfg.embeddings} has shape {array.shape}, {cfg.embedding_names} has {len(names)} "
            f"names: one row, (D,) or (P, D), is needed for each"
        )
    rows = {name.strip(): i for i, name in enumerate(names)}
    if len(rows) != len(names):
        raise UserError(f"{cfg.embedding_names}: {len(names) - len(rows)} names occur twice")
    array = array[:, None] if array.ndim == 2 else array
    found, taken, problems = {}, {}, sources.Problems()
    for split, records in splits.items():
        names = [r["file_name"] for r in records]
        found[split] = [rows.get(name, rows.get(name.rpartition("/")[2])) for name in names]
        for name, row in zip(names, found[split], strict=True):
            if row is None:
                problems.add(f"images without a row in {cfg.embedding_names}", split, name)
            elif row in taken:
                problems.add("two images of one row", split, f"{taken[row]} and {name}")
            else:
                taken[row] = name
    problems.stop(cfg.embeddings)
    state = start(cfg, {}, {split: (len(of), *array.shape[1:]) for split, of in found.items()})
    for split, of in found.items():
        path = state / f"{split}.npy"
        begin = np.load(path, mmap_mode="r").offset
        with naming(path), open(path, "rb+") as out:  # a full disk kills who writes through a map
            out.seek(begin)
            for i in range(0, len(of), 4096):  # the array may exceed memory
                with np.errstate(over="ignore"):
                    block = array[of[i : i + 4096]].astype(np.float16)
                bad = ~np.isfinite(block).all((1, 2))
                if bad.any():
                    name = splits[split][i + int(bad.argmax())]["file_name"]
                    raise UserError(
                        f"{cfg.embeddings}: not finite in half precision, first for {name}"
                    )
                out.write(block.tobytes())
            out.flush()
            os.fsync(out.fileno())
    return {"encoder": "", "features": "pooled" if array.shape[1] == 1 else "grid", "grid": 0,
            "n_positions": array.shape[1], "embedding_dim": array.shape[2]}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Embeddings by CLIP


def fingerprint(splits: dict[str, list[dict]], cfg: Config, encoder) -> dict:
    """All that the embeddings' bytes depend on: model, images, and how they are batched."""
    import PIL
    import transformers

    stat = functools.lru_cache(1)(os.stat)  # of a tar, once
    sha = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            path, *part = sources.locate(record, split, cfg)
            sha.update(repr((path, part, stat(path).st_size, stat(path).st_mtime_ns)).encode())
    return {
        "images": sha.hexdigest(), "encoder": encoder.digest(), "features": cfg.features,
        "grid": cfg.grid, "batch": cfg.encode_batch, "device": encoder.device.type,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
    }  # fmt: skip


def progress(state: Path) -> dict[tuple[str, int], dict[int, str]]:
    """What all runs so far have encoded: (split, batch) -> the reason for each bad row."""
    done = {}
    for path in state.glob("rank*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a torn line: its batch is encoded again
                split, batch, bad = json.loads(line)
                done[split, batch] = {int(row): reason for row, reason in bad.items()}
    return done


def encode(splits: dict[str, list[dict]], cfg: Config, place, ranks: Ranks) -> dict:
    """Encodes the images through CLIP, then drops the records of bad ones. Returns facts for meta.

    A split is cut into batches of `encode_batch`; batch b is rank b % world's. Its bytes depend
    on its own images alone and have their own place in the file, so neither the ranks nor an
    interruption can change the result.
    """
    from encoder import Encoder

    encoder = Encoder(cfg.clip, cfg.features, cfg.grid, place.device)
    size, shape = cfg.encode_batch, (encoder.n_positions, encoder.embedding_dim)
    shapes = {split: (len(records), *shape) for split, records in splits.items()}

    def begin() -> tuple[Path, str]:
        state, run = start(cfg, fingerprint(splits, cfg, encoder), shapes), secrets.token_hex(8)
        write_text(state / "run", run)
        return state, run

    state, run = ranks.first(begin)
    mark = state / "run"
    if not all(place.gather(mark.is_file() and mark.read_text() == run)):
        raise UserError(f"{state} is not the same on every machine: all must share data/")
    done = progress(state)
    skipped, total = sum(map(len, done.values())), sum(map(len, splits.values()))
    skipped += sum("bad" in record for records in splits.values() for record in records)
    every = [(split, b) for split, records in splits.items()
             for b in range(-(-len(records) // size))]  # fmt: skip
    jobs = [(split, b) for split, b in every
            if b % ranks.world == ranks.rank and (split, b) not in done]  # fmt: skip
    files = ([sources.locate(r, split, cfg) for r in splits[split][b * size : (b + 1) * size]]
             for split, b in jobs)  # fmt: skip
    synced, lines = time.monotonic(), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming(state))  # what has no room on the disk
        log = stack.enter_context(open(state / f"rank{ranks.rank}.jsonl", "a", encoding="utf-8"))
        log.write("\n")  # ends a torn line
        outs = {s: stack.enter_context(open(state / f"{s}.npy", "rb+")) for s in splits}
        begins = {s: np.load(state / f"{s}.npy", mmap_mode="r").offset for s in splits}
        bar = tqdm(total=sum(min(size, shapes[s][0] - b * size) for s, b in jobs),
                   desc="encoding", unit="image", disable=ranks.rank > 0)  # fmt: skip
        stack.enter_context(bar)
        stream = encoder.stream(files, cfg.workers)
        for (split, b), (x, bad) in zip(jobs, stream, strict=True):
            if not torch.isfinite(x).all():
                raise UserError(f"clip={cfg.clip} overflows half precision")
            block = np.zeros((min(size, shapes[split][0] - b * size), *shape), np.float16)
            block[[i for i in range(len(block)) if i not in bad]] = x
            outs[split].seek(begins[split] + b * size * block[0].nbytes)
            outs[split].write(block.tobytes())
            done[split, b] = {b * size + i: reason for i, reason in bad.items()}
            lines.append(json.dumps([split, b, done[split, b]]) + "\n")
            bar.update(len(block))
            skipped += len(bad)
            if skipped > cfg.max_bad * total:  # no need to wait for the end
                check_bad(splits, done, cfg, ranks.rank)
            if time.monotonic() - synced >= SYNC or (split, b) == jobs[-1]:
                for out in outs.values():  # first the rows, then the word that they are there
                    out.flush()
                    os.fsync(out.fileno())
                log.write("".join(lines))
                log.flush()
                os.fsync(log.fileno())
                synced, lines = time.monotonic(), []
    ranks.meet()
    if ranks.rank:
        return {}
    done = progress(state)
    assert done.keys() == set(every)
    bad = check_bad(splits, done, cfg)
    drop_bad(splits, bad, state, cfg)
    if count := sum(map(len, bad.values())):
        print(f"left out {count} of {total} images, listed in {cfg.data_dir}/skipped.csv")
    for split, records in splits.items():  # still aligned: the last row is what its file gives
        ((x, _),) = encoder.stream([[sources.locate(records[-1], split, cfg)]], workers=0)
        last = torch.tensor(np.load(rows_of(split, state), mmap_mode="r")[-1:])
        assert torch.cosine_similarity(x.double().ravel(), last.double().ravel(), 0) > 0.99
    return {"encoder": cfg.clip, "encoder_kind": encoder.kind, "features": cfg.features,
            "grid": cfg.grid, "n_positions": encoder.n_positions,
            "embedding_dim": encoder.embedding_dim}  # fmt: skip


def check_bad(
    splits: dict[str, list[dict]], done: dict, cfg: Config, rank: int | None = None
) -> dict[str, dict[int, str]]:
    """The reason for each row of each split that has no readable image or, in a tar shard, no
    usable caption; written to skipped.csv too. With `rank`, of what this one knows so far.

    Raises UserError where there are more than `max_bad` allows.
    """
    bad = {split: {i: r["bad"] for i, r in enumerate(records) if "bad" in r}
           for split, records in splits.items()}  # fmt: skip
    for (split, _), reasons in sorted(done.items()):
        bad[split] |= reasons
    count, total = sum(map(len, bad.values())), sum(map(len, splits.values()))
    path = cfg.data_dir / "skipped.csv"
    if not count:
        path.unlink(missing_ok=True)
        return bad
    own = path.with_name(f"skipped.{rank or 0}.csv")  # two ranks may have too many at once
    with replacing(own) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "id", "file_name", "reason"))
        for split, reasons in bad.items():
            for row, reason in sorted(reasons.items()):
                record = splits[split][row]
                cells = (split, record["id"], record["file_name"], reason)
                # A spreadsheet would run a cell that opens like a formula.
                writer.writerow([f"'{c}" if str(c)[:1] in "=+-@" else c for c in cells])
    os.replace(own, path)
    if count > cfg.max_bad * total:
        so_far = "" if rank is None else f"at least (rank {rank}) "
        raise UserError(f"{so_far}{count} of {total} images cannot be used, more than "
                        f"max_bad={cfg.max_bad}: see {path}")  # fmt: skip
    return bad


def drop_bad(splits: dict, bad: dict[str, dict[int, str]], state: Path, cfg: Config) -> None:
    """Takes the bad rows out of the records, and, in a copy that `rows_of` finds, of the arrays."""
    for split, records in splits.items():
        keep = [i for i in range(len(records)) if i not in bad[split]]
        if not keep:
            raise UserError(f"none of the images of split `{split}` can be read: "
                            f"see {cfg.data_dir}/skipped.csv")  # fmt: skip
        splits[split] = [records[i] for i in keep]
        rows = np.load(state / f"{split}.npy", mmap_mode="r")
        if bad[split]:
            path = state / f"{split}.kept.npy"
            header = {"descr": rows.dtype.str, "fortran_order": False,
                      "shape": (len(keep), *rows.shape[1:])}  # fmt: skip
            with naming(path), open(path, "wb") as file:  # not through a map: see own_embeddings
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(0, len(keep), 4096):
                    file.write(rows[keep[i : i + 4096]].tobytes())
                file.flush()
                os.fsync(file.fileno())
            rows = np.load(path, mmap_mode="r")
        assert len(rows) == len(splits[split])


def rows_of(split: str, state: Path) -> Path:
    """The finished array of a split."""
    kept = state / f"{split}.kept.npy"
    return kept if kept.exists() else state / f"{split}.npy"


# ---------------------------------------------------------------------------------------------
# The tokenizer


def train_tokenizer(captions: list[str], vocab_size: int) -> Tokenizer:
    """A sentencepiece BPE of at most `vocab_size` pieces; small texts have fewer."""
    model = io.BytesIO()
    options = dict(
        model_type="bpe", character_coverage=1.0, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        max_sentence_length=1 << 20, minloglevel=2, num_threads=1,
    )  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=model, vocab_size=vocab_size, **options
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            told = f"the captions have too many characters for it, at least {least[1]} is needed"
            raise UserError(f"vocab_size={vocab_size}: {told}") from None
        if not most:
            raise UserError(f"vocab_size={vocab_size}: {str(error).strip()}") from None
        print(f"the captions have only {most[1]} pieces: vocab_size {vocab_size} -> {most[1]}")
        return train_tokenizer(captions, int(most[1]))
    return Tokenizer(model.getvalue())


# ---------------------------------------------------------------------------------------------


def tokenizer_of(splits: dict[str, list[dict]], cfg: Config) -> Tokenizer:
    """The user's own, or one trained on the training captions."""
    if cfg.tokenizer:
        return Tokenizer(Path(cfg.tokenizer).read_bytes(), cfg.tokenizer)
    captions = [c for r in splits["train"] if "bad" not in r for c in r["captions"]]
    return train_tokenizer([c.lower() for c in captions] if cfg.lowercase else captions,
                           cfg.vocab_size)  # fmt: skip


def finish(splits: dict[str, list[dict]], tokenizer: Tokenizer, cfg: Config, made: dict) -> None:
    """Writes all that is missing beside the embeddings, then puts all in place, an earlier
    dataset's files until then untouched. Cut off, it can be done again."""
    state, ready = cfg.data_dir / "encoding", cfg.data_dir / "encoding" / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    with replacing(ready / "tokenizer.model") as part:
        part.write_bytes(tokenizer.model)
    counts = {
        split: write_split(ready, split, records, tokenizer, cfg.lowercase)
        for split, records in splits.items()
    }
    (cfg.data_dir / "meta.json").unlink(missing_ok=True)  # what it describes is about to change
    for split in splits:
        os.replace(rows_of(split, state), cfg.data_dir / f"{split}_embeddings.npy")
    for path in ready.iterdir():
        os.replace(path, cfg.data_dir / path.name)
    if cfg.embeddings:
        (cfg.data_dir / "skipped.csv").unlink(missing_ok=True)  # of an earlier dataset
    write_meta(cfg.data_dir, {
        "dataset": cfg.dataset, "source": cfg.source, "captions": cfg.captions,
        "images": cfg.images, **made, "normalize": cfg.normalize, "lowercase": cfg.lowercase,
        "vocab_size": len(tokenizer), "pad": tokenizer.pad, "bos": tokenizer.bos,
        "eos": tokenizer.eos, "unk": tokenizer.unk, "splits": counts,
    })  # fmt: skip
    shutil.rmtree(state)
    for split, n in counts.items():
        print(f"{split}: {n['images']} images, {n['captions']} captions, {n['tokens']} tokens")
    print(f"wrote {cfg.data_dir}/")


@contextlib.contextmanager
def alone(folder: Path):
    """Raises UserError where another prepare.py is writing the same dataset."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    path = folder / "lock"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it after a kill
        except (BlockingIOError, PermissionError):
            raise UserError(f"another prepare.py is writing {folder}/") from None
        try:
            yield
        finally:
            path.unlink()


def main(cfg: Config) -> None:
    from train import Place

    place = Place(cfg.device, "float32")
    ranks = Ranks(place)
    with contextlib.ExitStack() as stack:
        tokenizer = None

        def read() -> dict[str, list[dict]]:
            nonlocal tokenizer
            if not cfg.embeddings:
                import encoder

                encoder.extras()
            download.fetch(cfg)
            splits = sources.read(cfg)
            stack.enter_context(alone(cfg.data_dir))
            tokenizer = tokenizer_of(splits, cfg)  # before hours of encoding: it may refuse
            return splits

        splits = ranks.first(read)
        if not cfg.embeddings:
            made = encode(splits, cfg, place, ranks)
        elif ranks.rank == 0:
            made = own_embeddings(splits, cfg)
        if ranks.rank == 0:
            finish(splits, tokenizer, cfg, made)
    place.leave()


if __name__ == "__main__":
    run(main, configure(Config, sys.argv[1:], __doc__))
