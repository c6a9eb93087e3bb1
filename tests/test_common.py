"""parts/common.py: who may write a file or folder."""

import os
import signal
from pathlib import Path

import pytest
from helpers import ROOT, start, wait

from parts.common import UserError, owning


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


OWNER = """
import subprocess, time
from pathlib import Path
from parts.common import owning

with owning(Path("out/d/lock"), "x"):
    print(subprocess.Popen(["sleep", "600"], close_fds=False).pid, flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_owner_and_is_free_after_a_kill():
    """Two runs wrote one folder, and both reported success. A kill of prepare.py leaves a curl,
    which still writes: as long as it lives, the lock is held."""

    def refused() -> bool:
        refusal = "^another train.py is writing out/d/: wait until it ends$"
        with pytest.raises(UserError, match=refusal):
            owning(Path("out/d/lock"), "train.py is writing out/d/").__enter__()
        return os.listdir("out/d") == ["lock"]  # the owner's is left alone

    owner = start("-c", OWNER, env=os.environ | {"PYTHONPATH": str(ROOT)})
    child = int(owner.stdout.readline())
    try:
        assert refused()
        owner.kill()
        owner.wait()
        assert refused()
    finally:
        os.kill(child, signal.SIGKILL)
    wait(owner)  # until the child has closed the pipe too
    with owning(Path("out/d/lock"), ""):
        pass
    assert os.listdir("out/d") == []


def test_an_owner_that_writes_nothing_leaves_nothing():
    """A run that was refused left an empty data/ behind."""
    Path("data").mkdir()
    with owning(Path("data/a/lock"), ""), owning(Path("out/b/lock"), ""):
        Path("out/b/file").touch()
    assert os.listdir("data") == [] and os.listdir("out/b") == ["file"]


def test_two_who_open_a_lock_as_its_owner_removes_it(monkeypatch):
    """The one who waits with the old file open must not take it for the new one's."""
    samefile = os.path.samefile

    def removed_meanwhile(path, number):
        Path(path).unlink()
        return samefile(path, number)

    monkeypatch.setattr(os.path, "samefile", removed_meanwhile)
    with pytest.raises(UserError, match="another one"), owning(Path("lock"), "one"):
        pass


def test_a_file_system_without_locks_is_used_without_them(monkeypatch):
    """Lustre, for one, has none unless it was mounted with them."""
    import fcntl

    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with owning(Path("out/lock"), ""):
        Path("out/file").touch()
    assert os.listdir("out") == ["file"]
