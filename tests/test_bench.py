"""bench.py: its contestants do the same work, and both modes run to their last line."""

import json

import numpy as np
import pytest
import torch
from helpers import SMALL

import bench
import bench_gpu
import train
from configurator import Config
from data import Split
from decode import Caption, Decoding, load_captioner
from model import ClipLM, ModelConfig, loss_sum
from parts import checkpoint
from parts.common import UserError
from parts.device import Device
from selfcritical import SelfCritical

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Use one thread: tiny tensors gain nothing from more, and on a busy machine they wait."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in the processes that measure memory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invented(folder, images: int = 256, R: int = 5) -> Config:
    """Return the settings of a tiny model on invented captions."""
    size = bench.TrainBench(quick=True, device="cpu", dtypes=("float32",)).resized()
    bench.invent(folder / "data", images, size.vocab_size, R)
    return Config(**bench.settings_of(size, folder / "data"))


def test_invented_captions_have_cocos_lengths(tmp_path):
    split = Split(invented(tmp_path, 4000).data_dir, "train")
    lengths = np.diff(split.caption_start) - 1  # without bos
    assert lengths.mean() == pytest.approx(12.2, abs=0.3)
    assert lengths.std() == pytest.approx(2.4, abs=0.3)
    assert lengths.min() >= 5 and 35 < lengths.max() <= 50


def test_separate_examples_hold_what_packed_rows_hold(tmp_path):
    cfg = invented(tmp_path)
    images = np.array([7, 0, 11])
    ours, padded, theirs = (bench.Trainee(name, cfg, 0, 1) for name in bench.CONTESTANTS)
    packed, separate, wide = (trainee.rows(images) for trainee in (ours, padded, theirs))
    for rows in (separate, wide):
        is_real = rows["targets"].view_as(rows["tokens"]) >= 0
        tokens = packed["tokens"].flatten()[packed["targets_at"]]
        assert torch.equal(rows["tokens"][is_real], tokens)
        assert torch.equal(rows["targets"][rows["targets"] >= 0], packed["targets"])
        assert torch.equal(rows["targets_at"], torch.arange(is_real.numel()))
        assert torch.equal(rows["embeddings"][::5], packed["embeddings"])
    is_real = separate["targets"].view_as(separate["tokens"]) >= 0
    assert is_real.any(0).all()  # padded to the longest, not further
    lengths = np.diff(ours.split.caption_start)
    assert wide["tokens"].size(1) == int(lengths.mean() + 10 * lengths.std())
    one = ours.split.tokens[: lengths[0]]
    assert bench.pad_rows(one, ours.split.tokenizer, 44)["tokens"].shape == (1, 44)


def test_train_runs_and_the_losses_agree(capsys):
    result = bench.main(["train", "--quick", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"bench": "train", **result}
    assert len(result["rows"]) == 8 * 3
    for i in range(0, 24, 3):
        ours, padded, theirs = result["rows"][i : i + 3]
        assert ours["case"] == padded["case"] == theirs["case"]
        close = 1e-4 if "float32" in ours["case"] else 2e-2
        assert ours["loss"] == pytest.approx(padded["loss"], abs=close)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=close)
        assert ours["times_ours"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert [row["contestant"] for row in (ours, padded, theirs)] == list(bench.CONTESTANTS)
        assert all(row["per_s"]["median"] > 0 for row in (ours, padded, theirs))


def test_memory_is_measured_in_a_fresh_process(tmp_path):
    cfg = invented(tmp_path)
    assert bench.peak_memory("padded", cfg, 1, in_fresh_process=True) > 0


def test_a_contestant_that_fails_is_left_out(capsys, monkeypatch):
    monkeypatch.delattr(bench, "ClipCap")
    flags = ["--quick", "--device=cpu", "--P=10", "--R=5", "--dtypes=float32"]
    with pytest.raises(SystemExit) as stop:
        bench.main(["train", *flags])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "NameError: name 'ClipCap'" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["failed"] == ["P = 10, R = 5, 8 images, float32, transformers"]
    assert [row["contestant"] for row in result["rows"]] == ["ours", "padded"]


def test_where_ours_fails_the_other_cases_are_kept(capsys, monkeypatch):
    """Found KeyError: 'ours', and neither earlier rows nor the last line. A contestant that
    failed when it was made for its turns, after its memory was measured, ended all as well."""

    class Trainee(bench.Trainee):
        def __init__(self, name, cfg, turns, steps):
            no_room = {("ours", "bfloat16"), ("padded", "float32")}
            if (name, cfg.dtype) in no_room and turns == 2:
                raise MemoryError("no room")
            super().__init__(name, cfg, turns, steps)

    monkeypatch.setattr(bench, "Trainee", Trainee)
    with pytest.raises(SystemExit) as stop:
        bench.main(["train", "--quick", "--device=cpu", "--P=10", "--R=5"])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "MemoryError: no room" in printed
    result = json.loads(printed.splitlines()[-1])
    case = "P = 10, R = 5, 8 images"
    assert result["failed"] == [f"{case}, float32, padded", f"{case}, bfloat16, ours"]
    rows = [(row["case"], row["contestant"]) for row in result["rows"]]
    assert rows == [(f"{case}, float32", name) for name in ("ours", "transformers")]


def test_like_clipcap_has_gpt2_smalls_sizes(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "invent", lambda *args: None)
    monkeypatch.setattr(bench, "compare", lambda cfg, case, R, failed: seen.append((case, R)) or [])
    result = bench.main(["train", "--like=clipcap", "--batch_size=8"])
    assert result["vocab_size"] == 50257
    assert [(c.n_prefix, R, c.dtype) for c, R in seen] == [(10, 5, "float32"), (10, 5, "bfloat16")]
    size, _ = seen[0]
    assert (size.n_layer, size.n_head, size.n_embd, size.batch_size) == (12, 12, 768, 8)


def test_decode_runs_and_the_captions_agree(here, capsys):
    split = Split(here / "data" / "tiny", "val")
    size = ModelConfig(
        vocab_size=len(split.tokenizer), embedding_dim=16, n_prefix=3, n_layer=2, n_head=2,
        n_embd=16, block_size=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ClipLM(size)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.8)  # so that no two tokens are almost equally likely
    checkpoint.save(here / "ckpt.pt", checkpoint.pack(model, split.tokenizer, split.meta, {}))
    result = bench.main(["decode", "--ckpt", "ckpt.pt", "--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"bench": "decode", **result}
    assert all(row["same"] == 1.0 and row["per_s"]["median"] > 0 for row in result["rows"])
    names = [(row["case"], row["contestant"]) for row in result["rows"]]
    for batch in (1, 64, 256):
        for method in ("greedy", "beam"):
            case = [name for title, name in names if title == f"{method}, batch {batch}"]
            assert case == ["ours", "transformers", "without cache"][: 3 if batch == 64 else 2]
    assert len(names) == 14


PARTS = ["its sampling", "its sampling and reward", "its gradient"]


def test_a_self_critical_step_has_its_parts(here, capsys):
    train.main(Config(**SMALL))
    result = bench.main(["scst", "--ckpt=out/tiny/ckpt.pt", "--batch_size=4", "--turns=2"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"bench": "scst", **result}
    names = [row["contestant"] for row in result["rows"]]
    assert names == ["ours", *PARTS, "cross-entropy", "usual way"]
    assert all(row["times_ours"]["median"] > 0 for row in result["rows"])


def test_a_self_critical_step_needs_no_checkpoint(capsys):
    result = bench.main(["scst", "--quick", "--device=cpu", "--batch_size=4", "--turns=1"])
    assert [row["case"] for row in result["rows"]] == ["2 layers, 32 wide, 4 images x 5"] * 6
    assert "best CIDEr" in capsys.readouterr().out  # train.py made one


def test_the_usual_rows_have_the_gradient_of_ours(here):
    """Given the same captions and advantages: separate padded rows only cost more."""
    train.main(Config(**SMALL))
    model, _, _ = load_captioner("out/tiny/ckpt.pt")
    split = Split(here / "data/tiny", "train")
    cfg = Config(**SMALL, objective="scst", from_scratch=True, scst_samples=2)
    critic = SelfCritical(model, split, cfg, Device("cpu", "float32"))
    images = np.array([2, 9])
    for step in range(20):  # until no sample is just as good as the greedy caption
        usual = bench.usual_rollout(critic, images, step)
        weights = usual["weights"].view_as(usual["tokens"])
        if weights[:, 0].all():
            break
    lengths = (usual["targets"].view_as(weights) >= 0).sum(1)
    ids = [row[1:n].tolist() for row, n in zip(usual["tokens"], lengths, strict=True)]
    captions = [Caption(each, 0.0, [], True) for each in ids]
    rows = critic.pack(split.embedding(images), images, captions, weights[:, 0].numpy())
    ours, theirs = loss_sum(model, rows), loss_sum(model, usual)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_every_section_of_the_gpu_bench_runs(tmp_path, capsys):
    """On a CPU, with tiny sizes: GPU time is rare, so it has to be right the first time."""
    out = tmp_path / "gpu.jsonl"
    flags = ["--quick", "--device=cpu", "--dtype=float32", f"--out={out}"]
    result = bench.main(["gpu", *flags])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == {"bench": "gpu", **result}
    assert result["failed"] == [] and list(result["sections"]) == list(bench_gpu.SECTIONS)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["section"] for row in rows] == list(bench_gpu.SECTIONS)
    assert {row["section"]: row["rows"] for row in rows} == result["sections"]
    for section in ("training", "grid"):
        cases = result["sections"][section]
        names = ["ours", "padded", "transformers", "ours compiled", "padded compiled"]
        assert [row["contestant"] for row in cases] == 2 * names
        assert all(row["mfu"]["median"] > 0 for row in cases)
    assert [(row["case"], row["same"]) for row in result["sections"]["decoding"][::2]] == [
        ("greedy, batch 4", 1.0), ("beam, batch 4", 1.0), ("greedy, batch 8", 1.0),
        ("beam, batch 8", 1.0),
    ]  # fmt: skip
    assert all("aten::mm" in text for text in result["sections"]["profile"].values())

    # -- and the README's tables are filled from it, again and again
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench_gpu.BEGIN}\nnot measured\n{bench_gpu.END}\nafter\n")
    fill = ["gpu", f"--out={out}", f"--readme={readme}"]
    bench.main(fill)
    text = readme.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n")
    assert "not measured" not in text and "aten::mm" not in text
    assert text.count("\n| P = 10, R") == text.count("\n| P = 50, R") == 10
    assert text.count("\n| greedy, batch") == text.count("\n| beam, batch") == 4
    bench.main(fill)
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(UserError, match="README.md lacks the lines <!--"):
        bench.main(fill)


def test_the_tables_are_of_one_machine_one_precision_and_one_size(tmp_path):
    """Found figures of two machines below the name of the newer one, those of --quick among them,
    and an IndexError for an empty file."""
    readme, out = tmp_path / "README.md", tmp_path / "gpu.jsonl"
    marks = f"{bench_gpu.BEGIN}\n{bench_gpu.END}\n"
    fill = ["gpu", f"--out={out}", f"--readme={readme}"]

    def filled(*rows: dict) -> str:
        readme.write_text(marks)
        lines = [{"hardware": "H200", "dtype": "float32"} | row for row in rows]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        bench.main(fill)
        return readme.read_text()

    rows = [{"section": name, "rows": [{"figure": name}]} for name in ("old", "new")]
    failed = {"section": "later", "rows": None, "hardware": "CPU"}
    first = filled(rows[0] | {"quick": False}, rows[1], failed)  # rows had no `quick` once
    assert "Measured on H200, float32: `python bench.py gpu`." in first
    assert "| old    |" in first and "| new    |" in first
    for change in ({"hardware": "H100"}, {"dtype": "bfloat16"}, {"quick": True}):
        text = filled(rows[0] | change, rows[1])
        assert "| old " not in text and "| new    |" in text
        assert "Measured on H200, float32: `python bench.py gpu`." in text
    text = filled(rows[0], rows[1] | {"quick": True})
    assert "| old " not in text and "`python bench.py gpu --quick`." in text
    for content in ("", json.dumps({"section": "old", "rows": None}), None):
        out.unlink()
        if content is not None:
            out.write_text(content)
        with pytest.raises(UserError, match="no figures in .*gpu.jsonl: run `python bench.py gpu`"):
            bench.main(fill)
        out.touch()


def test_a_section_that_fails_is_reported_and_the_next_ones_run(tmp_path, capsys, monkeypatch):
    def broken(lab):
        raise RuntimeError("out of memory")

    sections = {"broken": (1, broken), "whole": (1, lambda lab: 3), "long": (1000, broken)}
    monkeypatch.setattr(bench_gpu, "SECTIONS", sections)
    cfg = bench_gpu.GpuBench(device="cpu", dtype="float32", minutes=1, out=str(tmp_path / "o"))
    result = bench_gpu.gpu(cfg)
    printed = capsys.readouterr().out
    assert "FAILED: broken" in printed and "RuntimeError: out of memory" in printed
    assert "== long: skipped" in printed
    assert result["failed"] == ["broken"]
    assert result["sections"] == {"broken": None, "whole": 3}
    monkeypatch.setitem(bench_gpu.MODES, "gpu", (bench_gpu.GpuBench, lambda cfg: result))
    with pytest.raises(SystemExit) as stop:
        bench.main(["gpu"])
    assert stop.value.code == 1
    with pytest.raises(SystemExit) as stop:
        bench.main(["gpu", "--sections=nothing"])
    assert stop.value.code == 2
    line = "--sections: expected some of broken whole long, got `nothing`\n"
    assert capsys.readouterr().err == line


def test_without_the_compiler_means_compile_false(tmp_path, monkeypatch):
    """Found parity's runs compiled on CUDA, where `compile` unset means yes, and likewise the run
    that follows one that the compiler had failed."""
    lab = bench_gpu.Lab(bench.Bench(quick=True, device="cpu"), "float32", tmp_path)
    assert bench_gpu.short(lab, "one", 20)["compile"] is False
    asked = []

    def main(cfg: Config) -> dict:
        asked.append(cfg.compile)
        if len(asked) == 1:
            raise RuntimeError("no compiler")
        names = "step loss captions_per_s ms_per_step mfu waiting".split()
        rows = [dict.fromkeys(names, float(n)) for n in range(4)]
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        (cfg.run_dir / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"CIDEr": 0.5}

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(lab.device, "type", "cuda")
    rows = bench_gpu.run(lab)
    assert asked == [True, False, True] and lab.failed == ["train.py"]
    assert [row["compiled"] for row in rows] == [False, True]
    assert [row["images"] for row in rows] == [8, 16] and rows[0]["CIDEr"] == 0.5


def test_a_cpu_equals_itself(capsys):
    result = bench.main(["parity", "--quick", "--device=cpu"])
    assert result["failed"] == []
    assert result["same_losses"] == {"steps": 20, "cpu": 0.0, "again": 0.0}
    assert all(result["same_captions"][how]["differ"] == 0 for how in ("greedy", "beam"))
    resumed = result["same_after_a_kill"]
    assert resumed["was_killed"] and resumed["logged"] >= 25 and resumed["saved_step"] >= 20
    assert resumed["losses"] == resumed["weights"] == 0
    assert result["waits"] == {"synchronisations": 0, "updates": 10, "first": []}
    assert "same_losses: {'steps': 20, 'cpu': 0.0" in capsys.readouterr().out


def test_bytes_that_decoding_must_read():
    """Captions of 1 and 2 tokens: steps for bos, the first and the second token."""
    size = ModelConfig(vocab_size=10, n_layer=3, n_embd=4, n_head=2, n_prefix=5)
    model = ClipLM(size)
    weights = sum(p.numel() for p in model.transformer.parameters())
    captions = [[5], [5, 6]]
    greedy = bench.least_bytes(model, captions, Decoding(max_len=40), torch.bfloat16)
    assert greedy == 2 * (3 * weights + 24 * (2 * 6 + 2 * 7 + 1 * 8))
    beam = Decoding(method="beam", beams=2, max_len=40)
    beams = bench.least_bytes(model, captions, beam, torch.float32)
    assert beams == 4 * (3 * weights + 24 * (2 * 7 + 2 * 9 + 1 * 11))


def test_a_wrong_call_is_one_clear_line(capsys):
    for argv in ([], ["--quick"], ["encode"]):
        with pytest.raises(UserError, match="flag: `train`, `decode`, `scst`, `gpu`, `parity`"):
            bench.main(argv)
    with pytest.raises(SystemExit):
        bench.main(["decode"])
    assert capsys.readouterr().err == "--ckpt is required\n"
    with pytest.raises(UserError, match="no.pt not found"):
        bench.main(["decode", "--ckpt", "no.pt"])
