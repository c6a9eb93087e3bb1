"""parts/common.py and parts/start.py: who may write a folder, and output that nobody reads."""

import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, start, tiny_dataset, wait, weights

import train
from configurator import Config
from parts.common import UserError, owning, run


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


# ---------------------------------------------------------------------------------------------
# Printing


@pytest.fixture
def run_to(monkeypatch, capfd):
    """A call that runs `main` with its stdout in a stream. Returns exit status and stderr."""

    def call(stream, main) -> tuple[int, str]:
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", sys.stderr)  # both are put back
            try:
                run(main)
            except SystemExit as stop:
                status = stop.code
        return status, capfd.readouterr().err

    return call


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def closed_terminal():
    keyboard, screen = os.openpty()
    os.close(keyboard)
    return os.fdopen(screen, "w", buffering=1)


def full_disk():
    return open("/dev/full", "w", buffering=1)


LOST = "the output was lost: No space left on device\n"


@pytest.mark.parametrize(
    "make, outcome",
    [(closed_pipe, (0, "")), (closed_terminal, (0, "")), (lambda: None, (0, "")),
     (full_disk, (1, LOST))],
    ids=["closed pipe", "closed terminal", "no stdout", "full disk"],
)  # fmt: skip
def test_a_run_whose_output_is_lost_is_saved(run_to, make, outcome):
    """A lost connection, `| head` or a full disk under `> log.txt` ended training unsaved."""
    tiny_dataset(Path("data/tiny"))
    assert run_to(make(), lambda: train.main(Config(**SMALL))) == outcome
    assert weights("out/tiny/last.pt").keys() == weights("out/tiny/ckpt.pt").keys()


def test_what_is_printed_last_may_be_lost_too(run_to):
    """It waits in a buffer until Python ends, where an error is a traceback."""
    for code, text in ((0, LOST), (75, "")):
        stream = open("/dev/full", "w")  # noqa: SIM115

        def main(code=code):
            print("text")
            raise SystemExit(code)

        assert run_to(stream, main) == (code or 1, text)


def test_what_a_stream_cannot_encode_is_escaped(run_to):
    with open("log.txt", "w", encoding="ascii") as stream:
        assert run_to(stream, lambda: print("caf\xe9 \u27f5 \udcff")) == (0, "")
    assert Path("log.txt").read_text() == "caf\\xe9 \\u27f5 \\udcff\n"


# ---------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_during_the_imports_is_silent():
    """It was a traceback of up to forty lines."""
    code = "import parts.start, signal; signal.raise_signal(signal.SIGINT); print('alive')"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = start("-c", code, env=env)
    assert wait(process) == ("", "") and process.returncode == -signal.SIGINT
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    assert wait(start("-c", ignored + code, env=env)) == ("alive\n", "")


def test_every_script_starts_with_it():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("parts/*.py")):
        text = path.read_text()
        if "\nif __name__ ==" in text:
            imports = [line for line in text.splitlines() if line.lstrip().startswith("import ")]
            assert imports[0].startswith("    import parts.start  # noqa"), path


def test_ctrl_c_after_the_imports_is_one_line(run_to, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert run_to(sys.stdout, lambda: signal.raise_signal(signal.SIGINT)) == (
            130, "interrupted\n"
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
