"""What every script needs: errors of one line, files that appear whole, and prefetching."""

import contextlib
import csv
import errno
import hashlib
import importlib
import io
import itertools
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def printable(text: str) -> str:
    """Escape control characters, so that a message stays on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A user's mistake: what is wrong, where, and what to do, without a traceback."""

    def __str__(self):
        return printable(super().__str__())


class Output(io.FileIO):
    """The file under stdout or stderr. Writing raises nothing: a run that cannot print must still
    save. What cannot be written is dropped, and `error` says why."""

    error: OSError | None = None

    def write(self, data) -> int:
        try:
            return os.write(self.fileno(), data)
        except OSError as error:
            self.error = error
            return len(data)


def unfailing(stream) -> io.TextIOWrapper:
    """Return a stream to the same file, or to nowhere if it was closed when the script began. What
    its encoding lacks is escaped."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115
    file = Output(os.dup(stream.fileno()), "w")
    buffer = io.BufferedWriter(file)
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)


def run(main: Callable, *args) -> None:
    """Call `main(*args)`, as every script does.

    A user's mistake, a full disk, a file that cannot be opened or output that was lost prints one
    line and exits with status 1; Ctrl-C exits with 130. Anything else is a bug and keeps its
    traceback. That the reader of the output left, as `| head` does, is no error.
    """
    sys.stdout = unfailing(sys.stdout)
    sys.stderr = unfailing(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # parts.start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    line, status = "", 0
    try:
        main(*args)
    except SystemExit as stop:
        status = stop.code
    except UserError as error:
        line, status = error, 1
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # only a write to a full disk does not name its file
        name = "" if error.filename is None else f"{error.filename}: "
        line, status = UserError(f"{name}{error.strerror}"), 1
    sys.stdout.flush()
    lost = sys.stdout.buffer.raw.error
    if lost and lost.errno not in (errno.EPIPE, errno.EIO) and not status:
        line, status = f"the output was lost: {lost.strerror}", 1
    if line:
        print(line, file=sys.stderr)
    if status:
        raise SystemExit(status)


def extras(*packages: str, file: str = "requirements-clip.txt") -> None:
    """Raise UserError if a package of a requirements file is missing; by default one that an
    encoder needs."""
    try:
        for package in packages or ("PIL", "transformers"):  # the processor needs PIL
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -r {file}") from None


# ---------------------------------------------------------------------------------------------
# Files that appear whole or not at all


@contextlib.contextmanager
def naming(path: Path | str, part: Path | None = None) -> Iterator[None]:
    """Add `path` to errors that name no file, as a full disk's, or that name `part`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or part and str(error.filename) == str(part):
            error.filename = str(path)
        raise


def or_shipped(path: str) -> str:
    """Return `path`; if nothing is there, and it names a file of the repository, that one's."""
    shipped = os.path.join(Path(__file__).resolve().parents[1], path)
    return shipped if os.path.exists(shipped) and not os.path.exists(path) else path


def sync(file) -> None:
    """Write an open file's content to the disk, not only to the system's cache."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path; when all went well, put it in the place of `path`, on disk.

    A killed process leaves the temporary file behind. Its name is fixed, so the next run
    overwrites it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with naming(path, part):
            yield part
            with open(part, "rb+") as file:
                sync(file)
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # it is in place, or the folder is read-only
            part.unlink()
    with contextlib.suppress(OSError):  # the new name, too, where the system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def owning(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`: `lock` in a folder that one process writes, or <file>.lock.

    The system frees it when the process ends, even by a kill. Folders that are made for it are
    removed again if they stay empty. Raise UserError, with `what` the other does, if it is held.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    with naming(path.parent, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    with file:
        os.set_inheritable(file.fileno(), True)  # a child with close_fds=False holds it as well
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = os.path.samefile(path, file.fileno())  # its owner may just have removed it
        except (BlockingIOError, FileNotFoundError):
            is_mine = False
        except (ImportError, OSError):  # not a POSIX system, or a file system without locks
            is_mine = True
        if not is_mine:
            raise UserError(f"another {what}: wait until it ends")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                for folder in made:
                    folder.rmdir()


def write_text(path: Path | str, text: str) -> None:
    """Write a whole text file."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def append(path: Path | str, text: str) -> None:
    """Add text to a file's end.

    The file is closed after each line: text left in a buffer would meet a full disk once more when
    Python ends, with a traceback.
    """
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_json(path: Path | str, hint: str = ""):
    """Return the content of a JSON file. Raise UserError if there is none, with `hint`, or if it
    is not valid."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} not found{hint and ': '}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def csv_reader(kind: Callable, file, **options):
    """Return a csv.reader or csv.DictReader, which `kind` is, of an open table.

    Commas separate the cells, or as some spreadsheets write them, semicolons or tabs: what is most
    frequent in the first line. Cells may be of any length.
    """
    csv.field_size_limit(2**31 - 1)  # by default, 131,072 characters
    first = file.readline()
    separator = max(",;\t", key=first.count)
    return kind(itertools.chain([first], file), delimiter=separator, **options)


def read_log(path: Path | str) -> list[dict]:
    """Return the rows of a log.jsonl, each with its step; a torn last line is left out.

    Raise UserError for any other line that train.py did not write.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} not found: train.py writes it")
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # the last line is empty or torn
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line of train.py's log") from None
    return rows


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's size and of at most 256 blocks spread over it.

    It covers all of a file up to 16 MiB, and takes a moment for a file of any size.
    """
    size, block = path.stat().st_size, 1 << 16
    sha = hashlib.sha256(str(size).encode())
    blocks = -(-size // block)
    with open(path, "rb") as file:
        for i in np.linspace(0, blocks - 1, min(blocks, 256)).astype(np.int64).tolist():
            file.seek(i * block)
            sha.update(file.read(block))
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------


def prefetch(function: Callable, items: Iterable, threads: int = 1) -> Iterator:
    """Yield function(item) for each item, in order; threads compute the next ones meanwhile.

    With 0 threads, nothing is computed ahead. An error is raised where its result was due.
    """
    if threads == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, "prefetch") as pool:
        try:
            results = (pool.submit(function, item) for item in items)
            waiting = deque(itertools.islice(results, 2 + 2 * threads))
            while waiting:
                waiting.extend(itertools.islice(results, 1))
                yield waiting.popleft().result()
        finally:  # after an error, or when nobody asks for more
            pool.shutdown(cancel_futures=True)
