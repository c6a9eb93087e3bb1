"""What goes wrong around a run: full disks, read-only folders, signals, any arguments at all."""

import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from stat import S_ISDIR

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    children,
    equal,
    flags,
    log_of,
    one_line,
    outcome,
    start,
    succeed,
    tiny_dataset,
    wait,
    wait_for_steps,
)

import data
import train
from configurator import Config
from decode import load_captioner
from parts import checkpoint
from parts.common import read_log, write_text
from parts.log import lines_until

pytestmark = pytest.mark.usefixtures("no_java")

# ---------------------------------------------------------------------------------------------
# Full and read-only disks


@pytest.fixture
def disk(here):
    """A small disk at `disk/`. Yields a call that changes its size or makes it read-only."""
    folder = here / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs Linux and the right to mount a file system")
    yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_while_saving_costs_nothing_but_time(disk, capfd):
    """PyTorch turned the full disk into a RuntimeError of its archive's, and a traceback."""
    train.main(Config(**SMALL | dict(out_dir="whole")))
    ckpt, last = (Path(f"whole/{name}.pt").stat().st_size for name in ("ckpt", "last"))
    disk(f"size={ckpt + last + ckpt // 2}")  # the first save has room, the second has not
    args = flags(out_dir="disk")
    for more in ([], ["--resume"]):  # and once more while it is still full
        status, _, err = outcome("train.py", [*args, *more], capfd)
        assert status == 1
        assert re.fullmatch(r"disk/(ckpt|last)\.pt: No space left on device\n", err), err
        assert sorted(os.listdir("disk")) == ["ckpt.pt", "last.pt", "log.jsonl"]  # and no .part
        content = checkpoint.load("disk/last.pt")
        assert content["step"] == checkpoint.load("disk/ckpt.pt")["step"] == 6
        load_captioner("disk/last.pt")
    disk("size=8m")
    assert outcome("train.py", [*args, "--resume"], capfd)[0] == 0
    assert equal("disk", "whole")


def test_wherever_a_checkpoint_meets_the_end_of_the_disk(disk):
    """Oracle: at every size of the room left, the file is the old one or, whole, the new one."""
    path, content = Path("disk/x.pt"), {"x": torch.zeros(9, 1500), "y": [1] * 3000}
    checkpoint.save(path, {"old": 1})
    old, failed = path.read_bytes(), 0
    for pages in itertools.count(2):
        disk(f"size={4096 * pages}")
        try:
            checkpoint.save(path, content)
            break
        except OSError as error:
            failed += 1
            assert (error.filename, error.strerror) == ("disk/x.pt", "No space left on device")
        assert path.read_bytes() == old and os.listdir("disk") == ["x.pt"]
    assert failed > 10 and torch.load(path)["y"] == content["y"]


def test_a_log_that_fills_the_disk_is_mended(disk, capfd):
    """Its last line is torn: the curves are drawn without it, and --resume writes it again.

    The log was kept open, and what its buffer held met the full disk once more at exit, with a
    second message. Hence a process of its own.
    """
    args = flags(max_iters=60, eval_interval=30)
    succeed("train.py", [*args, "--out_dir=whole"], capfd)
    disk("size=8k")
    said = one_line(start("train.py", *args, "--out_dir=disk"))
    assert said == "disk/log.jsonl: No space left on device\n"
    text = Path("disk/log.jsonl").read_text()
    assert len(text) == 8192 and not text.endswith("\n")
    assert [row["step"] for row in read_log("disk/log.jsonl")] == [*range(1, text.count("\n") + 1)]
    disk("size=8m")
    said = succeed("train.py", [*args, "--out_dir=disk", "--resume"], capfd)
    assert "starting from scratch" in said and equal("disk", "whole")


def test_captions_and_their_files_on_a_full_disk(disk, trained, capfd):
    """What was finished is kept; with room, the same command ends with the same files."""
    shutil.copytree(trained, ".", dirs_exist_ok=True, symlinks=True)
    args = ["--ckpt=ckpt.pt", "--split=val", "--device=cpu", "--batch_size=2"]
    assert outcome("sample.py", [*args, "--out_json=p.json"], capfd)[0] == 0
    for pages in itertools.count(1):
        disk(f"size={4096 * pages}")
        status, out, err = outcome("sample.py", [*args, "--out_json=disk/p.json"], capfd)
        assert not list(Path("disk").glob("*.part"))
        if not status:
            break
        assert re.fullmatch(r"disk/p\.\S+: No space left on device\n", err), err
    assert pages > 2 and "resuming after" in out
    for name in ("p.json", "p.csv"):
        assert Path("disk", name).read_bytes() == Path(name).read_bytes()


def test_a_dataset_on_a_full_disk(disk, trained, capfd):
    """Embeddings were written through a memory map, and a full disk was a bus error: no message.

    Hence the first try in a process of its own. Oracle: the same command ends with the same bytes.
    """
    shutil.copytree(trained, ".", dirs_exist_ok=True, symlinks=True)
    np.save("rows.npy", np.ones((3, 20000), np.float16))
    args = USUAL["prepare.py"].split()
    assert outcome("prepare.py", args, capfd)[0] == 0
    Path("data/mine").rename("data/whole")
    Path("data/mine").symlink_to("../disk")
    disk("size=64k")
    assert "No space left on device" in one_line(start("prepare.py", *args))
    for pages in itertools.count(16, 8):
        disk(f"size={4096 * pages}")
        status, _, err = outcome("prepare.py", args, capfd)
        assert not list(Path("disk").glob("*.part"))
        if not status:
            break
        assert re.fullmatch(r"data/mine/\S+: No space left on device\n", err), err
    for path in Path("data/whole").iterdir():
        assert Path("disk", path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("out", ["disk", "disk/new"])
def test_a_read_only_folder_is_refused_before_training(disk, capfd, monkeypatch, out):
    """Root may write everywhere, so it takes a read-only file system. With --resume too."""
    train.main(Config(**SMALL | dict(out_dir="disk")))
    disk("ro")
    before = {path: path.read_bytes() for path in Path("disk").iterdir()}

    def no_training(*args):
        raise AssertionError("it trains")

    monkeypatch.setattr(data, "batches", no_training)
    for more in ([], ["--resume"]):
        status, _, err = outcome("train.py", [*flags(out_dir=out), *more], capfd)
        assert status == 1
        assert re.fullmatch(rf"{out}(/log\.jsonl|/previous)?: Read-only file system\n", err), err
    assert before == {path: path.read_bytes() for path in Path("disk").iterdir()}


# ---------------------------------------------------------------------------------------------
# Whole files, and logs that are not


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """The order that a power failure tests: content, name, folder."""
    did, fsync, replace = [], os.fsync, os.replace

    def synced(number):
        did.append("folder" if S_ISDIR(os.fstat(number).st_mode) else "content")
        fsync(number)

    def renamed(*paths):
        did.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "file", "text")
    checkpoint.save(tmp_path / "x.pt", {})
    assert did == ["content", "name", "folder"] * 2


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    """Half a file bore the number of its process, so each kill left another, of any size."""
    code = "import os\nfrom parts.common import replacing\nwith replacing('file') as part:\n" + (
        "    part.write_text('half')\n    os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        wait(start("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}))
        assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / "file", "whole")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"\0" * 50, b"\xff\xfe", b"7"])
def test_any_torn_last_line_is_tolerated_and_mended(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 4)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode() + torn)
    assert read_log(path) == rows
    assert lines_until(path, 3) == "".join(lines)
    assert lines_until(path, 2) == "".join(lines[:2])
    assert lines_until(path, 0) == ""
    assert lines_until(path, 3, resumes=False) == ""


# ---------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("when", ["evaluation", "save"])
def test_a_signal_during_evaluation_or_a_save(here, capfd, monkeypatch, when):
    """What was being written is whole; an evaluation is cut off, and the next run begins with it:
    torchrun kills 30 s after a signal, and evaluations that took longer lost the steps before."""
    train.main(Config(**SMALL | dict(out_dir="whole")))
    save, generate = checkpoint.save, train.generate

    def signalled(call, *args, **options):
        monkeypatch.undo()
        monkeypatch.chdir(here)
        os.kill(os.getpid(), signal.SIGTERM)
        return call(*args, **options)

    import decode

    if when == "save":
        monkeypatch.setattr(checkpoint, "save", lambda *args: signalled(save, *args))
    else:
        monkeypatch.setattr(decode, "generate", functools.partial(signalled, generate))
    args = flags(out_dir="parts")
    status, out, _ = outcome("train.py", args, capfd)
    step = 6 if when == "evaluation" else 7
    assert status == train.PREEMPTED and f"stopped by a signal after step {step}: " in out
    assert checkpoint.load("parts/last.pt")["step"] == step
    assert outcome("train.py", [*args, "--resume"], capfd)[0] == 0
    assert equal("parts", "whole")


def test_a_second_signal_ends_it_at_once(here, capfd, monkeypatch):
    """Even within a save, and what was saved before stays."""
    save, saves = checkpoint.save, []

    def signalled(path, content):
        if path.name == "last.pt":
            saves.append(path)
        if len(saves) == 2:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", signalled)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert outcome("train.py", flags(), capfd)[0] == 128 + signal.SIGINT
    assert checkpoint.load("out/tiny/last.pt")["step"] == 6


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize("nohup", [False, True])
def test_a_lost_connection_saves_unless_it_is_ignored(here, monkeypatch, nohup, name):
    """SIGHUP, of which a closed terminal sends two, ended training unsaved. So did SIGUSR1, by
    which Slurm warns a job (`sbatch --signal=USR1@60`), and SIGUSR2, Grid Engine's warning."""
    number = getattr(signal, name)
    update = train.Training.update

    def hung_up(self, *args):
        if self.progress.step == 2:
            for _ in range(2):
                os.kill(os.getpid(), number)
        return update(self, *args)

    monkeypatch.setattr(train.Training, "update", hung_up)
    before = signal.signal(number, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        if nohup:
            train.main(Config(**SMALL))
        else:
            with pytest.raises(SystemExit) as stop:
                train.main(Config(**SMALL))
            assert stop.value.code == train.PREEMPTED
    finally:
        signal.signal(number, before)
    assert checkpoint.load("out/tiny/last.pt")["step"] == (12 if nohup else 3)


def test_a_signal_to_torchrun_and_to_its_processes_is_one_signal(here):
    """As a scheduler sends it. torchrun passes its own on to the processes, for which it was a
    second one: they exited at once and saved nothing."""
    args = flags(max_iters=5000, eval_interval=5000, out_dir="parts")
    run = start("train.py", *args, processes=2)
    wait_for_steps(here / "parts/log.jsonl", 5, run)
    workers = children(run.pid)
    assert len(workers) == 2
    for pid in (*workers, run.pid):
        os.kill(pid, signal.SIGTERM)
    out, err = wait(run, 60)
    step = log_of("parts")[-1]["step"]
    assert f"stopped by a signal after step {step}: " in out, err[-2000:]
    content = checkpoint.load("parts/last.pt")
    assert content["step"] == step and len(content["random"]) == 2
    assert run.returncode != 0


# ---------------------------------------------------------------------------------------------
# Any arguments: success, or one clear line

WORDS = ["", "0", "1", "-1", "2", "3", "7", "0.5", "1e-3", "1e999", "nan", "inf", "9" * 30, "x",
         "true", "no", "none", "auto", "cpu", "mps", "cuda:99", "float16", "bfloat16", "grid",
         "--", "-", "=", "--=", "--help ", "a b", "é\n", "\x1b[2J", "\0", "\udcff", "x" * 300,
         "4294967295", "'", '"', "{split}", "*", "~"]  # fmt: skip
PATHS = ["dir", "file", "binary", "dir/none", "file/none", "none.pt", "none.json", "loop", "loop/x",
         "/dev/null", "data/tiny", "data/tiny/meta.json", "ckpt.pt", "last.pt", "predictions.json",
         "log.jsonl", "captions.csv", "rows.npy", "names.txt", "deep.json", "good.py", "bad.yaml",
         "made.py", "made.yaml", "new/out.json", "out.svg"]  # fmt: skip
LIMITS = {  # script -> flags that come last and keep a run tiny, whatever was drawn
    "train.py": "--max_iters=2 --eval_images=2 --compile=false --track=none --n_layer=1",
    "prepare.py": "--shapes_train=2 --shapes_eval=1 --workers=0 --downloads= --clip=dir",
    "sample.py": "--track=none --max_len=5",
    "parts/shapes_clip.py": "--families=4 --steps=1 --batch=2",
    "bench.py": "--ckpt=none.pt",
}
USUAL = {  # script -> a command that works
    "train.py": flags(eval_interval=1, n_embd=8),
    "prepare.py": "--dataset=mine --source=csv --captions=captions.csv --embeddings=rows.npy "
    "--embedding_names=names.txt --vocab_size=60 --device=cpu",
    "sample.py": "--ckpt=ckpt.pt --split=val --data=data/tiny --out_json=p.json --device=cpu",
    "metrics.py": "predictions.json data/tiny/val.json",
    "gallery.py": "predictions.json --out=page.html",
    "plot.py": "log.jsonl --out=curves.svg",
    "parts/shapes_clip.py": "--train_clip --out=clip --seed=3",
    "bench.py": "decode --quick",
}
SHARES = {"train.py": 150, "prepare.py": 200, "sample.py": 200, "metrics.py": 190,
          "gallery.py": 160, "plot.py": 40, "parts/shapes_clip.py": 30, "bench.py": 30}  # fmt: skip
COMMANDS = int(os.environ.get("FUZZ", 200))  # FUZZ=1000 runs them all


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny dataset, checkpoints, and one of each file that a script reads."""
    here = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(here)
    tiny_dataset(Path("data/tiny"))
    train.main(Config(**SMALL | dict(max_iters=2, eval_interval=2, n_embd=8, out_dir=".")))
    images, references = data.Split(Path("data/tiny"), "val").references()
    write = {
        "predictions.json": json.dumps([{"image_id": i["id"], "caption": r[0]}
                                        for i, r in zip(images, references, strict=True)]),
        "captions.csv": "image,caption,split\na.png,a dog,train\nb.png,a cat,train\nc.png,x,val\n",
        "names.txt": "a.png\nb.png\nc.png\n", "file": "text", "deep.json": "[" * 100_000,
        "good.py": "seed = 3\nn_head = 1", "bad.yaml": "seed: [",
    }  # fmt: skip
    for name, content in write.items():
        Path(name).write_text(content)
    np.save("rows.npy", np.eye(3, dtype=np.float32))
    Path("binary").write_bytes(bytes(range(256)))
    Path("dir").mkdir()
    Path("loop").symlink_to("loop")
    os.chdir(before)
    return here


def arguments(chance: random.Random, script: str) -> list[str]:
    """A working command with some of it dropped, replaced, doubled, or new."""
    usual = USUAL[script]
    args = usual.split() if isinstance(usual, str) else list(usual)
    source = ROOT / ("configurator.py" if script in ("train.py", "prepare.py") else script)
    names = re.findall(r"^    (\w+): .*  # ", source.read_text(), re.M) + ["help", "df"]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        value = chance.choice(chance.choice((WORDS, PATHS)))
        flag = chance.choice(names)
        if chance.random() < 0.1:
            flag = flag[:-1] + chance.choice("xé= ")
        new = chance.choice(([f"--{flag}={value}"], [f"--{flag}", value], [f"--{flag}"], [value]))
        at = chance.randrange(len(args) + 1)
        if args and chance.random() < 0.3:
            args[at : at + 1] = chance.choice(([], new))
        elif args and chance.random() < 0.4 and "=" in args[at - 1]:
            args[at - 1] = f"{args[at - 1].partition('=')[0]}={value}"
        else:
            args[at:at] = new
    return args + LIMITS.get(script, "").split()


def made_config(chance: random.Random) -> str:
    """The text of a config file, right or wrong."""
    names, mark = ["seed", "n_head", "dropout", "captions", "bias", "n_emdb"], chance.choice("=:")
    rows = [f"{chance.choice(names)} {mark} {chance.choice(WORDS)}" for _ in range(3)]
    return "\n".join(rows[: chance.randrange(4)]).encode("utf-8", "replace").decode()


BAR = re.compile(r"[^\r\n]*\r[^\n]*?\]?(\n|$)")  # progress bars, which share stderr


def test_any_arguments_end_in_success_or_one_clear_line(trained, tmp_path, monkeypatch, capfd):
    """Commands, each a working one that was damaged. What a run may leave is its own folder.

    Found a device that was any text, or mps where there is none, any text for bench.py's dtype, a
    sample.py without --split and --image, all tracebacks; and usage above metrics.py's line.
    """
    monkeypatch.setattr(os, "fsync", lambda number: None)  # thousands would wait for the disk
    chance, ended, wrong = random.Random(0), {}, []
    for script, share in SHARES.items():
        ended[script] = []
        for _ in range(share * COMMANDS // 1000):
            shutil.rmtree(tmp_path / "a", ignore_errors=True)
            here = tmp_path / "a" / "b" / "here"  # deep, for what is written to `..`
            shutil.copytree(trained, here, symlinks=True)
            monkeypatch.chdir(here)
            monkeypatch.setenv("HOME", str(here))  # for `~`
            Path("made.py").write_text(made_config(chance))
            Path("made.yaml").write_text(made_config(chance))
            args = arguments(chance, script)
            status, _, err = outcome(script, args, capfd)
            ended[script].append(status)
            good = status in (0, 1, 2) and "Traceback" not in err
            if status and good:
                *listed, last = BAR.sub("", err).splitlines() or [""]
                good = last.strip() and last.isprintable()
                good = good and (not listed or "listed above" in last)  # all problems of a source
            if not good:
                wrong.append(f"{script} {args}: {status}\n{err[-1500:]}")
    assert sum(map(len, ended.values())) == COMMANDS
    assert all(set(found) & {1, 2} for found in ended.values())  # both ends are met
    never = [script for script, found in ended.items() if 0 not in found]
    assert never in ([], ["bench.py"]), never
    assert not wrong, f"{len(wrong)}: " + "\n".join(text[-700:] for text in wrong[:5])
