"""Two machines, as two network namespaces: torchrun between them, a worker that dies, folders
that are not shared."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    children,
    finish,
    flags,
    log_of,
    losses,
    made,
    many,
    spawn,
    start,
    tiny_clip,
    tiny_dataset,
    wait,
    wait_for_steps,
    weights,
)

HOSTS = {"nc-host0": "10.77.0.1", "nc-host1": "10.77.0.2"}


def ip(*args: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *args], check=check, capture_output=True).returncode == 0


@pytest.fixture
def hosts():
    """Two hosts with a cable between them, and nothing else."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    for host in HOSTS:
        ip("netns", "del", host, check=False)
    if not all(ip("netns", "add", host, check=False) for host in HOSTS):
        pytest.skip("this system makes no network namespaces")
    first, second = HOSTS
    cable = ("link", "add", "lan", "netns", first, "type", "veth", "peer", "lan", "netns", second)
    ip(*cable)
    for host, address in HOSTS.items():
        ip("-n", host, "address", "add", f"{address}/24", "dev", "lan")
        for device in ("lo", "lan"):
            ip("-n", host, "link", "set", device, "up")
    yield HOSTS
    for host in HOSTS:
        ip("netns", "del", host, check=False)


def launch(
    hosts: dict, port: int, *args: str, script: str = "train.py", folders=(".", "."),
    workers: int = 1, restarts: int = 3,
) -> list[subprocess.Popen]:  # fmt: skip
    """The README's command for several machines, with `workers` on each host, in a working
    directory of its own where `folders` names two."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lan"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarts read addresses of the dead
    return [
        spawn(
            ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run",
             "--nnodes=2", f"--nproc_per_node={workers}", f"--max_restarts={restarts}",
             "--rdzv_backend=c10d", f"--local_addr={address}",
             f"--rdzv_endpoint={hosts['nc-host0']}:{port}",
             f"--rdzv_conf=is_host={host == 'nc-host0'}",  # these have no host names to tell it
             str(ROOT / script), *args],
            env=env, cwd=folder, stderr=subprocess.STDOUT,
        )
        for (host, address), folder in zip(hosts.items(), folders, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_two_machines_train_and_survive_a_killed_worker(hosts, tmp_path, monkeypatch, workers):
    """Bit for bit with two processes. Among four the order in which gloo adds up a gradient depends
    on DDP's buckets, which it lays out anew after a start's first step."""
    tiny_dataset(tmp_path / "data" / "tiny")
    monkeypatch.chdir(tmp_path)
    long = flags(max_iters=60, eval_interval=20, dropout=0.1)

    def succeed(runs: list[subprocess.Popen]) -> None:
        outputs = [wait(run)[0] for run in runs]
        assert all(run.returncode == 0 for run in runs), "\n".join(outputs)[-6000:]

    succeed(launch(hosts, 29701, *long, "--out_dir=whole", workers=workers))
    runs = launch(hosts, 29702, *long, "--out_dir=parts", "--resume", workers=workers)
    wait_for_steps(Path("parts/log.jsonl"), 25, *runs)
    os.kill(children(runs[1].pid)[0], signal.SIGKILL)
    succeed(runs)
    assert log_of("parts")[-1]["step"] == 60
    whole, parts = weights("whole/last.pt"), weights("parts/last.pt")
    if workers == 1:
        assert losses("parts") == losses("whole")
        assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    else:
        assert losses("parts") == pytest.approx(losses("whole"), abs=1e-5)
        assert all(torch.allclose(v, parts[k], atol=2e-4) for k, v in whole.items())
    lines = [json.dumps(row["step"]) for row in log_of("parts") if "loss" in row]
    assert lines == [str(step) for step in range(1, 61)]  # none lost, none twice


def test_machines_that_do_not_share_the_output_folder_are_told(hosts, tmp_path):
    """One sees last.pt and the other does not: to go on would mix two trainings."""
    folders = [tmp_path / host for host in hosts]
    for folder in folders:
        tiny_dataset(folder / "data" / "tiny")
    args = flags(max_iters=6)
    for status, resume in ((0, []), (1, ["--resume"])):
        runs = launch(hosts, 29703 + status, *args, *resume, folders=folders, restarts=0)
        outputs = [wait(run)[0] for run in runs]
        assert all((run.returncode == 0) == (status == 0) for run in runs), outputs
    assert "is not the same on every machine" in "".join(outputs)


@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_encode_into_one_folder_or_are_told(hosts, tmp_path, monkeypatch, shared):
    """Where both had begun before, each wrote to its own disk, and the second's rows were zeros."""
    folders = [tmp_path / host for host in hosts]
    for folder in folders:
        folder.mkdir()
        told = many(folder, 30)
        tiny_clip(folder / "clip")
    args = [f"--{k}={v}" for k, v in told.items()]
    args += ["--clip=./clip", "--encode_batch=2", "--workers=0", "--device=cpu", "--yes"]
    monkeypatch.chdir(folders[0])
    if shared:
        finish(start("prepare.py", *args))
        expected = made()
        shutil.rmtree("data")
    else:
        shutil.copytree(folders[0], folders[1], dirs_exist_ok=True)
        (folders[1] / "data/mine/encoding").mkdir(parents=True)
        for split, n in (("train", 30), ("val", 4)):  # of an earlier try
            np.save(folders[1] / f"data/mine/encoding/{split}.npy", np.zeros((n, 1, 24), "f2"))
    runs = launch(hosts, 29705, *args, script="prepare.py", restarts=0,
                  folders=(folders[0], folders[not shared]))  # fmt: skip
    outputs = [wait(run)[0] for run in runs]
    if shared:
        assert all(run.returncode == 0 for run in runs), outputs
        assert made() == expected
    else:
        assert all(run.returncode for run in runs)
        assert "encoding is not the same on every machine: put it on shared storage" in outputs[1]
        assert not Path("data/mine/meta.json").exists()
