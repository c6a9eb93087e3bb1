"""train.py: the same update however a batch is cut, the same run however it is interrupted."""

import functools
import math
import os
import pickle
import platform
import random
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    RunsCode,
    children,
    finish,
    flags,
    log_of,
    losses,
    mistake,
    start,
    succeed,
    tiny_dataset,
    wait,
    wait_for_steps,
    weights,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import metrics
import train
from configurator import Config
from data import Order, Split
from decode import Decoding, generate, load_captioner
from parts import checkpoint
from parts.common import UserError, owning
from parts.device import Device


def test_a_tiny_dataset_is_learned_by_heart(here):
    """One caption an image, and every caption comes back from its embedding alone."""
    train.main(Config(**SMALL | dict(max_iters=250, eval_interval=250, n_embd=64)))
    split = Split(here / "data/tiny", "train")
    model, tokenizer, _ = load_captioner("out/tiny/ckpt.pt")
    references = split.references()[1]
    single = [i for i, captions in enumerate(references) if len(captions) == 1]
    assert len(single) >= 2
    found = generate(model, torch.tensor(split.embeddings[:]), tokenizer, Decoding(max_len=20))
    captions = [tokenizer.decode(f[0].ids) for f in found]
    assert [captions[i] for i in single] == [references[i][0] for i in single]
    every = zip(captions, references, strict=True)
    assert sum(c in r for c, r in every) >= 0.9 * len(captions)
    last = log_of("out/tiny")[-1]
    assert last["shuffled_loss"] != last["val_loss"] and 0 < last["distinct"] <= 1


@pytest.mark.parametrize("processes, micro", [(0, 2), (0, 3), (0, 4), (2, 1), (2, 2), (4, 1)])
def test_any_cut_of_the_batch_computes_the_same_update(here, processes, micro):
    train.main(Config(**SMALL | dict(out_dir="one", max_iters=20)))
    cut = dict(out_dir="cut", max_iters=20, gradient_accumulation_steps=micro)
    if processes:
        finish(start("train.py", *flags(**cut), processes=processes))
    else:
        train.main(Config(**SMALL | cut))
    assert losses("cut") == pytest.approx(losses("one"), abs=1e-5)
    one, cut = weights("one/last.pt"), weights("cut/last.pt")
    for name, value in one.items():
        assert torch.allclose(value, cut[name], atol=2e-4), name


FAULTS = """
import resource, sys, torch, train
if sys.argv[1] == "kept":
    train.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(30):
    torch.ones(2**24)  # 64 MB
    if step == 9:
        before = faults()
print(faults() - before)
"""


def test_memory_that_tensors_free_is_kept_and_not_fetched_anew():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be asked to keep it")
    kept, fetched = (int(finish(start("-c", FAULTS, how, cwd=ROOT))) for how in ("kept", "fetched"))
    assert kept * 10 < fetched


def test_compiling_makes_few_graphs_and_changes_no_loss(here, monkeypatch):
    """Batches come in many shapes; each must not be compiled anew. The graphs run uncompiled
    here, so that no compiler is needed."""
    split = Split(tiny_dataset(here / "data/many", images=200), "train")
    order = Order(0, split.lengths, SMALL["batch_size"])
    packed = [split.pack(order.batch(step)) for step in range(30)]
    assert len({(x["tokens"].shape, x["targets"].shape) for x in packed}) > 15
    long = SMALL | dict(dataset="many", max_iters=30, eval_interval=30)
    train.main(Config(**long | dict(out_dir="plain")))
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    train.main(Config(**long | dict(out_dir="compiled", compile=True)))
    assert 1 <= counter.frame_count <= 3
    assert losses("compiled") == pytest.approx(losses("plain"), abs=1e-4)


@pytest.mark.parametrize("kind", [{}, {"ema": 0.9, "dropout": 0.2, "embedding_noise": 0.1,
                                        "word_dropout": 0.2},
                                  {"dtype": "bfloat16"}])  # fmt: skip
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(here, kind, monkeypatch):
    train.main(Config(**SMALL | kind | dict(out_dir="whole")))

    class Interrupted(Exception):
        pass

    def stop_after_save(path, content, save=checkpoint.save):
        save(path, content)
        if path.name == "last.pt":
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint, "save", stop_after_save)
        train.main(Config(**SMALL | kind | dict(out_dir="parts")))
    with open("parts/log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 9}\n{"step": 8, "lo')  # lost steps, and a torn line
    train.main(Config(**SMALL | kind | dict(out_dir="parts", resume=True)))
    assert losses("parts") == losses("whole")
    for file in ("ckpt.pt", "last.pt"):
        whole, parts = weights(f"whole/{file}"), weights(f"parts/{file}")
        assert all(torch.equal(v, parts[k]) for k, v in whole.items()), file


@pytest.mark.parametrize("processes", [0, 2])
def test_sigterm_saves_and_the_run_resumes_as_if_nothing_was(here, capfd, processes):
    def undisturbed(*args) -> str:
        if processes:
            return finish(start("train.py", *args, processes=processes))
        return succeed("train.py", [*args], capfd)

    long = dict(max_iters=150, eval_interval=50)
    undisturbed(*flags(out_dir="whole", **long))
    args = flags(out_dir="parts", **long)
    run = start("train.py", *args, processes=processes)
    wait_for_steps(here / "parts/log.jsonl", 20, run)
    if processes:  # as a scheduler does it: every worker gets the signal
        for worker in children(run.pid):
            os.kill(worker, signal.SIGTERM)
        wait(run)
    else:
        run.send_signal(signal.SIGTERM)
        assert "stopped by a signal" in finish(run, status=train.PREEMPTED)
    assert len(losses("parts")) < 150
    assert "resumed from" in undisturbed(*args, "--resume")
    assert losses("parts") == losses("whole")
    whole, parts = weights("whole/last.pt"), weights("parts/last.pt")
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_what_may_change_on_resume_is_noted_and_takes_effect(here, capfd):
    """Once the optimizer's settings stayed the old run's, and ema or float16, when new, crashed."""
    train.main(Config(**SMALL))
    args = dict(weight_decay=0.5, beta2=0.5, dropout=0.2, ema=0.9, dtype="float16")
    train.main(Config(**SMALL | args | dict(resume=True, max_iters=18)))
    out = capfd.readouterr().out
    for key, value in args.items():
        assert f"note: {key} was " in out and f", is {value}" in out
    group = torch.load("out/tiny/last.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and group["betas"][1] == 0.5


def test_a_mistake_that_the_first_process_finds_is_one_line(here):
    """The other one ended in a traceback: gloo's connection was closed."""
    finish(start("train.py", *flags(max_iters=2), processes=2))
    log = Path("out/tiny/log.jsonl")
    log.write_text("nothing\n" + log.read_text())
    output = finish(start("train.py", *flags(), "--resume", processes=2), status=1)
    assert output.count("out/tiny/log.jsonl") == 1, output
    assert "gloo" not in output and "RuntimeError" not in output, output


def test_one_gpu_is_not_for_two_processes(monkeypatch):
    """NCCL refused it with a traceback on each rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("parts.device.find_device", torch.device)
    with pytest.raises(UserError, match="device=cuda:1 is one GPU, for 2 processes: set cuda"):
        Device("cuda:1", "float32")


def test_fewer_processes_resume_where_more_stopped(here, capfd):
    """With other random numbers, which is noted; without dropout there are none."""
    args, short = flags(lr_decay_iters=12), "--max_iters=6"
    succeed("train.py", [*args, "--out_dir=whole"], capfd)
    finish(start("train.py", *args, "--out_dir=parts", short, processes=2))
    log = succeed("train.py", [*args, "--out_dir=parts", "--resume"], capfd)
    assert "note: checkpoint from 2 x cpu, now 1 x cpu: random numbers will differ" in log
    assert losses("parts") == pytest.approx(losses("whole"), abs=1e-5)


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu_with_a_note(here, capfd):
    """It has the generator of the GPU next to the CPU's, and nothing was said."""
    train.main(Config(**SMALL))
    state = torch.load("out/tiny/last.pt", weights_only=True)
    state["random"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, "out/tiny/last.pt")
    train.main(Config(**SMALL | dict(resume=True)))
    said = capfd.readouterr().out
    assert "note: checkpoint from 1 x cuda, now 1 x cpu: random numbers will differ" in said


def test_a_run_whose_ckpt_was_moved_away_writes_one_again(here, capfd):
    """It ended with "best CIDEr … in out/tiny/ckpt.pt", and there was none."""
    train.main(Config(**SMALL))
    before = weights("out/tiny/last.pt")
    os.remove("out/tiny/ckpt.pt")
    train.main(Config(**SMALL | dict(resume=True)))
    assert "note: out/tiny/ckpt.pt is missing: the best" in capfd.readouterr().out
    assert all(torch.equal(v, before[k]) for k, v in weights("out/tiny/ckpt.pt").items())


def test_the_evaluation_before_the_first_step_survives_a_kill(here, capfd, monkeypatch):
    """`--resume` emptied the log, and said that it was starting from scratch."""
    train.main(Config(**SMALL))
    more = SMALL | dict(init_from="out/tiny/ckpt.pt", out_dir="more")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Training, "update", stop)
        train.main(Config(**more))
    first = log_of("more")
    assert [row["step"] for row in first] == [0] and "CIDEr" in first[0]
    capfd.readouterr()
    train.main(Config(**more | dict(resume=True)))
    assert "resumed from more/last.pt at step 0" in capfd.readouterr().out
    assert log_of("more")[0] == first[0]
    train.main(Config(**more | dict(resume=True, out_dir="new")))
    assert "no new/last.pt yet: starting from out/tiny/ckpt.pt" in capfd.readouterr().out


def test_of_equal_cider_the_lower_loss_is_kept(here, monkeypatch):
    """Early captions often score 0 at every evaluation, and ckpt.pt stayed the first one's."""
    monkeypatch.setattr(metrics.CiderD, "score", lambda self, images, _: np.zeros(len(images)))
    train.main(Config(**SMALL))
    rows = [row for row in log_of("out/tiny") if "val_loss" in row]
    assert [row["CIDEr"] for row in rows] == [0, 0]
    best = min(rows, key=lambda row: row["val_loss"])
    assert torch.load("out/tiny/ckpt.pt", weights_only=True)["step"] == best["step"] == 12


def test_each_image_is_shuffled_with_another(here, monkeypatch):
    """The last one, alone in its batch, kept its own embedding."""
    batches, loss_sum = [], train.loss_sum
    monkeypatch.setattr(train, "loss_sum", lambda *args: batches.append(args[1]) or loss_sum(*args))
    monkeypatch.setattr(train.Evaluator, "BATCH", 7)  # of 8 images
    train.main(Config(**SMALL | dict(max_iters=1)))
    own, other = (torch.cat([b["embeddings"] for b in batches[i::2]]) for i in (1, 2))
    assert len(own) == 8 and (own != other).flatten(1).any(1).all()


def test_earlier_runs_are_moved_and_never_deleted(here, capfd):
    """The run before the last was deleted. So was one of which only ckpt.pt was kept."""
    folders, runs = ("previous", "previous-2", "previous-3"), []
    for seed in range(3):
        train.main(Config(**SMALL | dict(seed=seed)))
        assert ("moved its files to" in capfd.readouterr().out) == (seed > 0)
        if seed == 2:
            Path("out/tiny/last.pt").unlink()
        runs.append({path.name: path.read_bytes() for path in Path("out/tiny").glob("*.*")})
    train.main(Config(**SMALL | dict(resume=True)))  # there is nothing to resume
    assert "moved its files to out/tiny/previous-3\n" in capfd.readouterr().out
    for folder, files in zip(folders, runs, strict=True):
        moved = Path("out/tiny", folder).iterdir()
        assert {path.name: path.read_bytes() for path in moved} == files
    assert [len(files) for files in runs] == [3, 3, 2]
    assert sorted(os.listdir("out/tiny"))[:3] == ["ckpt.pt", "last.pt", "log.jsonl"]
    assert len(log_of("out/tiny")) == len(log_of("out/tiny/previous")) == 14
    args = flags(gradient_accumulation_steps=9)  # it was refused after the move
    assert "batch_size=8 is less than 9" in mistake("train.py", args, capfd)
    assert not Path("out/tiny/previous-4").exists()


def test_a_second_run_into_one_folder_is_refused_and_touches_nothing(here):
    """It moved the running one's files away, and both reported success."""
    train.main(Config(**SMALL))
    with owning(Path("out/tiny/lock"), ""):
        before = {path: path.read_bytes() for path in Path("out/tiny").iterdir()}
        for resume in (False, True):
            with pytest.raises(UserError, match="^another train.py is writing out/tiny/: wait"):
                train.main(Config(**SMALL | dict(resume=resume)))
        assert before == {path: path.read_bytes() for path in Path("out/tiny").iterdir()}
    with pytest.raises(UserError, match="data/none/meta.json not found"):
        train.main(Config(**SMALL | dict(dataset="none")))
    assert os.listdir("out") == ["tiny"]


LEAVING = """
import atexit, os, subprocess, sys, threading, time
sys.path.insert(0, {root!r})
import train
from configurator import Config, configure
from parts.common import run

@atexit.register
def threads():
    time.sleep(0.5)  # one that was joined is listed for a moment more
    listed = subprocess.check_output(["ps", "-T", "-o", "comm=", "-p", str(os.getpid())], text=True)
    sys.stdout.write(f"left: {{listed.count('gloo')}} {{threading.active_count()}}\\n")

run(train.main, configure(Config, sys.argv[1:], ""))
"""


def test_no_thread_of_ours_or_of_gloo_is_left_when_python_ends(here):
    """One that lets go of a tensor then aborts the process (see PyTorch, pull request 179291)."""
    Path("leaving.py").write_text(LEAVING.format(root=str(ROOT)))
    run = start(here / "leaving.py", *flags(max_iters=100_000, eval_interval=10), processes=2)
    wait_for_steps(here / "out/tiny/log.jsonl", 30, run)
    for worker in children(run.pid):
        os.kill(worker, signal.SIGTERM)
    output = finish(run, status=1)
    assert f"exitcode  : {train.PREEMPTED}" in output and output.count("left: 0 1") == 2, output
    run = start(here / "leaving.py", *flags(), processes=2)
    assert finish(run).count("left: 0 1") == 2


def test_sigkill_at_random_moments_loses_nothing(here, capfd):
    """The long version, twenty kills, is tests/kill_train.py."""
    chance = random.Random(0)
    args = flags(eval_interval=5, max_iters=60)
    succeed("train.py", [*args, "--out_dir=whole"], capfd)
    for _ in range(3):
        run = start("train.py", *args, "--out_dir=parts", "--resume")
        time.sleep(chance.uniform(2, 6))
        run.kill()
        wait(run)
    succeed("train.py", [*args, "--out_dir=parts", "--resume"], capfd)
    assert losses("parts") == losses("whole")
    whole, parts = weights("whole/last.pt"), weights("parts/last.pt")
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_what_does_not_fit_is_not_resumed(here):
    train.main(Config(**SMALL))
    with pytest.raises(UserError, match="another architecture: n_embd was 32, is 64"):
        train.main(Config(**SMALL | dict(resume=True, n_embd=64)))
    os.rename("out/tiny/ckpt.pt", "out/tiny/last.pt")
    with pytest.raises(UserError, match="holds no optimizer: only a last.pt can be resumed"):
        train.main(Config(**SMALL | dict(resume=True)))


def test_another_dataset_is_not_resumed(here):
    train.main(Config(**SMALL))
    os.rename(here / "data/tiny", here / "data/old")
    tiny_dataset(here / "data/tiny", images=25)
    with pytest.raises(UserError, match="another dataset: .*train_embeddings.npy"):
        train.main(Config(**SMALL | dict(resume=True)))


def test_gradients_that_are_not_finite_are_skipped_then_stop_it(here, monkeypatch, capfd):
    plain, calls = train.loss_sum, []

    def sometimes_nan(model, *args):
        loss = plain(model, *args)
        calls.append(model.training)
        return loss * math.nan if sum(calls) == 3 and model.training else loss

    monkeypatch.setattr(train, "loss_sum", sometimes_nan)
    train.main(Config(**SMALL))
    assert "step 3: the gradient is not finite, skipped" in capfd.readouterr().out
    assert all(v.isfinite().all() for v in weights("out/tiny/last.pt").values())
    monkeypatch.setattr(train, "loss_sum", lambda *args: plain(*args) * math.nan)
    with pytest.raises(UserError, match="not finite 20 times in a row.*last.pt"):
        train.main(Config(**SMALL | dict(max_iters=40, eval_interval=40)))


def test_a_skipped_step_changes_nothing_and_is_noted_at_the_end(here, monkeypatch, capfd):
    """Neither weights nor moments nor their step counts; and no log line follows the last step."""
    plain, calls = train.loss_sum, []

    def nan_from_the_fifth(model, *args):
        calls.append(model.training)
        nan = math.nan if sum(calls) >= 5 and model.training else 1.0
        return plain(model, *args) * nan

    monkeypatch.setattr(train, "loss_sum", nan_from_the_fifth)
    settings = SMALL | dict(max_iters=6, eval_interval=2, log_interval=100)
    train.main(Config(**settings))
    skipped = torch.load("out/tiny/last.pt", weights_only=True)
    out = capfd.readouterr().out
    assert "step 5: the gradient is not finite" in out and "step 6: the gradient is not" in out
    monkeypatch.setattr(train, "loss_sum", plain)
    train.main(Config(**settings | dict(max_iters=4, lr_decay_iters=6, out_dir="out/four")))
    four = torch.load("out/four/last.pt", weights_only=True)
    assert all(torch.equal(v, four["model"][k]) for k, v in skipped["model"].items())
    for number, state in four["optimizer"]["state"].items():
        assert all(
            torch.equal(v, skipped["optimizer"]["state"][number][k]) for k, v in state.items()
        )


class Reads(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU: a tensor's value, or a shape that depends on it."""

    NAMES = "_local_scalar_dense nonzero masked_select equal _unique2".split()

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.NAMES or by_mask:
            self.calls.append(name)
        return function(*args, **kwargs or {})


def test_dropped_words_are_replaced_by_unk_and_targets_stay(here, monkeypatch):
    batches, loss_sum = [], train.loss_sum

    def noted(model, batch, *args):
        batches.append(batch)
        return loss_sum(model, batch, *args)

    monkeypatch.setattr(train, "loss_sum", noted)
    plain = train.Training(Config(**SMALL), Device("cpu", "float32"))
    dropping = train.Training(Config(**SMALL | dict(word_dropout=0.3)), Device("cpu", "float32"))
    for training in (plain, dropping):
        for micro_batches, counts in training.batches(range(6)):
            training.update(micro_batches, counts, 1e-3)
    tokenizer = plain.split.tokenizer
    for before, after in zip(batches[:6], batches[6:], strict=True):
        changed = before["tokens"] != after["tokens"]
        assert (after["tokens"][changed] == tokenizer.unk).all()
        assert not changed[before["tokens"] == tokenizer.bos].any()
        assert torch.equal(before["targets"], after["targets"])
        can = (before["tokens"] != tokenizer.bos) & (before["tokens"] != tokenizer.unk)
        assert 0.2 < changed[can].float().mean() < 0.4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_the_device(here, monkeypatch, dtype):
    """A step once asked for its gradient's norm, so that a GPU waited for the next step's work."""
    cfg = Config(**SMALL | dict(dtype=dtype, dropout=0.1, ema=0.9, embedding_noise=0.1,
                                word_dropout=0.1, gradient_accumulation_steps=2))  # fmt: skip
    training = train.Training(cfg, Device("cpu", dtype))
    reads, as_list = Reads(), torch.Tensor.tolist

    def tolist(tensor):  # reads a CPU's tensor without an operator
        reads.calls.append("tolist")
        return as_list(tensor)

    stream = training.batches(range(4))
    steps = [next(stream) for _ in range(4)]
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with reads:
        for micro_batches, counts in steps:
            training.update(micro_batches, counts, 1e-3)
            training.progress.step += 1
            training.average.update(training.progress.step)
        assert reads.calls == []
        assert training.read_norms() > 0
        assert reads.calls == ["tolist"]


def test_mfu_is_at_most_one(here, monkeypatch):
    """It was shown as 124 % when the machine was busy while its peak was measured."""
    rates = iter([1.0, 1e12, 1.0])  # at the start, and at each evaluation
    monkeypatch.setattr(Device, "matmul_rate", lambda *_: next(rates))
    train.main(Config(**SMALL))
    mfu = [row["mfu"] for row in log_of("out/tiny") if "mfu" in row]
    assert mfu[0] == 1 and max(mfu[:6]) == 1
    assert all(0 < figure < 0.5 for figure in mfu[6:])


def test_the_learning_rate_warms_up_and_decays():
    cfg = Config(dataset="d", learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(s, cfg) for s in range(130)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates)
    assert rates[60] == pytest.approx(0.55) and rates[110:] == [pytest.approx(0.1)] * 20
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    short = Config(dataset="d", warmup_iters=50, max_iters=20)
    assert train.learning_rate(19, short) == pytest.approx(0.4e-3)


# ---------------------------------------------------------------------------------------------
# What users get wrong: one line, and a status that is not 0


@pytest.mark.parametrize(
    "args, says",
    [
        (["--n_emdb=64"], "did you mean `--n_embd`"),
        (["--n_layer=six"], "expected an int"),
        (["--dataset=none"], "data/none/meta.json not found: run `python prepare.py"),
        (["--block_size=10"], "set --block_size="),
        (["--batch_size=4096"], "exceeds the 24 training images"),
        (["--device=gpu"], "device=gpu: this PyTorch sees only"),
        (["--device=cuda"], "device=cuda:0: this PyTorch sees only cpu"),
        (["config/none.py"], "config/none.py"),
    ],
)
def test_mistakes_are_one_line(here, capfd, args, says):
    if "cuda" in args[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert says in mistake("train.py", [*flags(), *args], capfd)


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(here, capfd):
    (here / "file").write_text("")
    assert "file" in mistake("train.py", flags(out_dir="file/out"), capfd)


def test_foreign_checkpoints_are_refused_and_nothing_runs(here):
    train.main(Config(**SMALL | dict(max_iters=1, eval_interval=1)))
    good = Path("out/tiny/ckpt.pt").read_bytes()
    content = torch.load("out/tiny/ckpt.pt", weights_only=True)
    bad = here / "bad.pt"

    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says) as caught:
            load_captioner(bad)
        assert "bad.pt" in str(caught.value)

    with pytest.raises(UserError, match="none.pt not found"):
        checkpoint.load("none.pt")
    bad.write_bytes(b"")
    refused("damaged or not a checkpoint")
    bad.write_bytes(good[: len(good) // 2])
    refused("damaged or not a checkpoint")
    bad.write_bytes(pickle.dumps(RunsCode()))
    refused("damaged or not a checkpoint")
    torch.save({"model": RunsCode()}, bad)
    refused("more than weights")
    assert not Path("executed").exists()
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("a.txt", "text")
    refused("damaged or not a checkpoint")
    torch.save([1, 2], bad)
    refused("not a nanoCaption checkpoint")
    for name in ("model", "model_config", "meta", "config", "tokenizer"):
        torch.save(content | {name: None}, bad)  # was a traceback
        refused("not a nanoCaption checkpoint")
    torch.save(content | {"model_config": content["model_config"] | {"n_embd": 64}}, bad)
    refused("do not fit its settings")
    torch.save(content | {"tokenizer": content["tokenizer"][:50]}, bad)
    refused("not a sentencepiece model")
    torch.save(content | {"model": {**content["model"], "extra": torch.ones(1)}}, bad)
    refused("extra")


def test_random_damage_never_loads_wrong_weights(here):
    """200 corruptions: refused in one line, or the very same weights come out."""
    train.main(Config(**SMALL | dict(max_iters=1, eval_interval=1)))
    good = Path("out/tiny/ckpt.pt").read_bytes()
    truth, chance, refused = weights("out/tiny/ckpt.pt"), random.Random(0), 0
    bad = here / "bad.pt"
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(chance.choice((1, 1, 3))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.3:
            at = chance.randrange(len(damaged))
            damaged[at : at + chance.randrange(1, 500)] = chance.randbytes(chance.randrange(500))
        bad.write_bytes(damaged)
        try:
            model, *_ = load_captioner(bad)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(v, truth[k]) for k, v in model.state_dict().items())
    assert refused > 150
