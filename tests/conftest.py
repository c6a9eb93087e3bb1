"""The suite's own rules: one thread each, no fork of a process with threads, nothing left running.

A forked child has the locks of all threads but only one of the threads: a lock that another one
held at that moment is never released (tqdm's once was, and `make test` waited for ever).
"""

import os
import shutil
import threading

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tiny tensors gain nothing from more threads

from pathlib import Path  # noqa: E402

import helpers  # noqa: E402
import pytest  # noqa: E402

from parts.device import Device  # noqa: E402

FORK = os.fork
SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")  # they end with pytest


def fork_without_threads() -> int:
    """os.fork, by which Python's multiprocessing forks too; it fails where there are threads."""
    names = [thread.name for thread in threading.enumerate()]
    native = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if max(len(names), native) > 1:
        raise RuntimeError(f"fork of a process with {native} threads ({', '.join(names)})")
    return FORK()


os.fork = fork_without_threads


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has ended, or this is no Linux
        return ""


def has_children() -> bool:
    """Whether there is any, which is cheaper to ask than which."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """A process that a test leaves behind fails the test, with the stacks of its threads."""
    yield
    left = [p for p in helpers.STARTED if p.poll() is None]
    told = [f"{p.args}:\n{helpers.stacks(p)}" for p in left]
    helpers.STARTED.clear()
    for pid in helpers.children(os.getpid()) if has_children() else ():
        command = command_of(pid)
        if command and not any(name in command for name in SERVERS):
            told.append(command)
            os.kill(pid, 9)
    assert not told, "left running: " + "\n".join(told)


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch) -> None:
    """Do not measure the machine's peak, half a second of each run that trains."""
    monkeypatch.setattr(Device, "matmul_rate", lambda self, tries=8: 1e12)


@pytest.fixture
def no_java(monkeypatch) -> None:
    """Hide Java: METEOR's program takes some ten seconds of each run of sample.py or metrics.py."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """The folder of a tiny CLIP, which no test changes."""
    folder = tmp_path_factory.mktemp("clip")
    helpers.tiny_clip(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with data/tiny in it."""
    helpers.tiny_dataset(tmp_path / "data" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path
