"""The suite's own rules (conftest.py): no fork of a process with threads, nothing left running."""

import os

from helpers import ROOT, start, wait

TESTS = """
import multiprocessing, threading, time
import helpers

def test_fork_beside_a_thread():
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
    multiprocessing.get_context("fork").Process(target=print).start()

def test_a_child_is_left():
    code = "import time\\ndef sleeps():\\n  print('up', flush=True)\\n  time.sleep(600)\\nsleeps()"
    child = helpers.start("-c", code)
    assert child.stdout.readline().strip() == "up"

def test_a_child_hangs():
    helpers.wait(helpers.start("-c", "import time; time.sleep(600)"), seconds=3)

def test_all_is_well():
    helpers.finish(helpers.start("-c", "pass"))
"""


def test_forks_and_leftovers_fail_with_their_stacks(tmp_path):
    """`make test` once waited for ever: a forked child for tqdm's lock, held at the fork."""
    (tmp_path / "test_inner.py").write_text(TESTS)
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = (
        "-q -p conftest -p no:xdist -p no:cacheprovider -o addopts= --rootdir=. -x --maxfail=9"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = start("-c", code, *options.split(), "test_inner.py", cwd=tmp_path, env=env)
    out, err = wait(run)
    assert run.returncode == 1, out + err
    assert "2 failed, 2 passed, 1 error" in out, out
    assert "fork of a process with 2 threads" in out
    assert "left running" in out and "in sleeps" in out  # faulthandler's stack
    assert "still runs" in out
