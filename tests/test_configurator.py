"""Settings: each test states what a command line or a file must come to, value or error line."""

import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
from configurator import Config, ConfigError, configure, from_dict, within
from parts.common import UserError, or_shipped, run

ROOT = Path(configurator.__file__).parent


@dataclass(frozen=True)
class Sampling:  # a small settings class, like those of sample.py and bench.py
    """Not a setting: only a docstring."""

    # -- what ----
    ckpt: str  # the checkpoint
    # of any size
    image: tuple[str, ...] = ()  # images and folders
    # -- how ----
    beams: int = 5  # beams kept
    top_p: float | None = None
    verbose: bool = False


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def line_of(capsys, *argv, cls=Config, **options):
    """The one line on stderr that `argv` ends in, with status 2."""
    needed = ["--dataset=d"] if cls is Config else []
    with pytest.raises(SystemExit) as stop:
        configure(cls, [*needed, *argv], **options)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1
    return err[:-1]


def written(name, text):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


# ---------------------------------------------------------------------------------------------
# What is read


def test_precedence_is_defaults_then_files_left_to_right_then_flags():
    a = written("a.py", "dataset = 'd'\nn_layer = 1\nn_head = 1\nn_embd = 64\nseed = 1")
    b = written("b.yaml", "n_layer: 2\nn_head: 2\n")
    cfg = configure(Config, ["--n_layer=3", a, b])
    assert cfg == Config(dataset="d", n_layer=3, n_head=2, n_embd=64, seed=1)
    assert configure(Config, [b, a, "--seed", "5", "--seed=6"]).n_head == 1
    assert configure(Config, [b, a, "--seed", "5", "--seed=6"]).seed == 6
    assert configure(Config, ["--dataset=d"]) == Config(dataset="d")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--learning_rate=1e-3"], {"learning_rate": 1e-3}),
        (["--learning_rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--dropout=0"], {"dropout": 0.0}),
        (["--max_iters=1_000"], {"max_iters": 1000}),
        (["--compile"], {"compile": True}),
        (["--compile=false"], {"compile": False}),
        (["--compile", "false"], {"compile": False}),
        (["--compile=none"], {"compile": None}),
        (["--compile=auto", "--yes"], {"compile": None, "yes": True}),
        (["--yes=False"], {"yes": False}),
        (["--resume", "--n_layer=2"], {"resume": True, "n_layer": 2}),
        (["--resume", "n.py"], {"resume": True, "n_layer": 9}),  # a bare bool takes no file
        (["--captions="], {"captions": ""}),
        (["--captions", "a=b"], {"captions": "a=b"}),
        (["--captions=a=b"], {"captions": "a=b"}),
        (["--captions", "Fotos é/日本.json"], {"captions": "Fotos é/日本.json"}),
        (["--images", "-folder"], {"images": "-folder"}),
        (["--dataset=none"], {"dataset": "none"}),
    ],
)
def test_flags(argv, expected):
    written("n.py", "n_layer = 9")
    cfg = configure(Config, ["--dataset=d", *argv])
    assert cfg == Config(**{"dataset": "d"} | expected)
    for name, value in expected.items():
        assert type(getattr(cfg, name)) is type(value)


def test_py_literals():
    text = '"""Launch: train.py c.py"""\nbatch_size = 0x20\nmax_iters = 1_000\nmin_lr = (1e-5)\n'
    path = written("c.py", text + "dropout = 0\ndownloads = [\n    'a b',\n    'c' ' d',\n]\n")
    cfg = configure(Config, ["--dataset=d", path])
    assert (cfg.batch_size, cfg.max_iters, cfg.min_lr) == (32, 1000, 1e-5)
    assert cfg.downloads == ("a b", "c d")
    assert cfg.dropout == 0.0 and type(cfg.dropout) is float
    assert configure(Config, ["--dataset=d", path, "--downloads="]).downloads == ()


YAML = """\
# grouped under one level of headings, or not
dataset: no
data:
  source: karpathy
  captions: "a #b: {split}.json"
  lowercase: true
  yes: off
model: {n_layer: 3, dropout: 0}
training:
    learning_rate: 1e-3
    min_lr: 1.0e-4
    max_iters: 1_000
compile: ~
device: cpu
"""
PY = """\
dataset = "no"
source = "karpathy"
captions = "a #b: {split}.json"
lowercase = True
yes = False
n_layer = 3
dropout = 0
learning_rate = 1e-3
min_lr = 1.0e-4
max_iters = 1_000
compile = None
device = "cpu"
"""


def test_yaml_twin_equals_py():
    cfg = configure(Config, [written("a.yaml", YAML)])
    assert cfg == configure(Config, [written("a.py", PY)])
    assert cfg == configure(Config, [written("b.yml", b"\xef\xbb\xbf" + YAML.encode())])
    assert cfg == configure(Config, [written("c.yml", YAML.replace("\n", "\r\n"))])
    assert cfg.dataset == "no" and cfg.learning_rate == 1e-3 and type(cfg.dropout) is float


def test_a_list_of_downloads_in_both_formats():
    entries = ("http://a/x.zip x 0f", "http://b/y.zip y")
    py = written("a.py", f"downloads = {list(entries)}")
    yaml = written("a.yaml", "data:\n  downloads:\n" + "".join(f"    - {e}\n" for e in entries))
    for path in (py, yaml):
        assert configure(Config, ["--dataset=d", path]).downloads == entries


def test_configs_of_the_repository_are_read():
    for path in sorted(ROOT.glob("config/*.py")):
        begins_with = [path.with_name(f"{path.stem.partition('_')[0]}.py"), path]
        configure(Config, list(map(str, begins_with)))


def test_empty_files_set_nothing():
    files = [written("a.py", ""), written("b.yaml", ""), written("c.yml", "# nothing\n")]
    files.append(written("d.py", '"""only a docstring"""'))
    assert configure(Config, ["--dataset=d", *files]) == Config(dataset="d")


def test_tuples_and_required_settings(capsys):
    def sampling(*argv):
        return configure(Sampling, ["--ckpt=c.pt", *argv], files=False)

    assert sampling("--image", "a.jpg", "b.png", "folder/", "--beams", "2") == Sampling(
        "c.pt", ("a.jpg", "b.png", "folder/"), 2
    )
    assert sampling("--image=a b", "--verbose", "--image=c").image == ("a b", "c")
    assert sampling("--top_p=0.9").top_p == 0.9 and sampling("--top_p=none").top_p is None
    path = written("a.yaml", "ckpt: c.pt\nimage: [a.jpg, 1]\nbeams: 3")
    assert configure(Sampling, [path]) == Sampling("c.pt", ("a.jpg", "1"), 3)
    path = written("a.py", "ckpt = 'c.pt'\nimage = ['a.jpg', 'b.jpg']")
    assert configure(Sampling, [path]).image == ("a.jpg", "b.jpg")

    error = line_of(capsys, "--ckpt=c", path, cls=Sampling, files=False)
    assert error == "unexpected argument `a.py`: see --help"
    assert line_of(capsys, cls=Sampling, files=False) == "--ckpt is required"
    error = line_of(capsys, "--ckpt=c", "--image", "--verbose", cls=Sampling)
    assert error == "--image: expected a string, got nothing"


def test_words_without_dashes_set_the_positional_settings_in_order(capsys):
    def given(*argv, positional="ckpt image"):
        return configure(Sampling, list(argv), files=False, positional=positional)

    both = Sampling("c.pt", ("a.jpg", "b.py"), verbose=True, beams=3)
    assert given("c.pt", "--verbose", "a.jpg", "--beams", "3", "b.py") == both
    assert given("--verbose", "c.pt", "a.jpg", "--beams=3", "--image", "b.py") == both
    assert given("c.pt") == given("--ckpt=c.pt") == Sampling("c.pt")
    assert given("b.pt", "--ckpt=c.pt") == given("--ckpt=b.pt", "c.pt") == Sampling("c.pt")

    def refused(*argv, positional="ckpt beams"):
        return line_of(capsys, *argv, cls=Sampling, files=False, positional=positional)

    assert refused("c.pt", "3", "x") == "unexpected argument `x`: see --help"
    assert refused("c.pt", "-x", "3") == "unexpected argument `-x`: see --help"
    assert refused("c.pt", "six") == "--beams: expected an int, got `six`"
    assert refused("--verbose") == "--ckpt is required"


@dataclass(frozen=True)
class Paths:
    logs: tuple[str, ...]  # one per run


def test_a_required_tuple_is_not_empty(capsys):
    assert configure(Paths, ["a", "b"], positional="logs").logs == ("a", "b")
    for argv in ([], [""], ["--logs="]):
        assert line_of(capsys, *argv, cls=Paths, positional="logs") == "--logs is required"


def test_directories():
    assert Config(dataset="coco").data_dir == Path("data/coco")
    assert Config(dataset="coco").run_dir == Path("out/coco")
    assert Config(dataset="coco", out_dir="runs/a").run_dir == Path("runs/a")
    assert Config(dataset="coco", data="/disk/sets/a").data_dir == Path("/disk/sets/a")


def test_a_config_is_given_with_or_without_a_flag(capsys):
    """The original system's command was `python train.py --config FILE`."""
    a, b = written("a.py", "seed = 1"), written("b.yaml", "seed: 2\ndataset: d")
    for argv in ([a, b], ["--config", a, b], ["--config=a.py", "--config", b], [a, "--config", b]):
        assert configure(Config, argv) == Config(dataset="d", seed=2)
    said = "`` is neither a config file (.py .yaml .yml) nor a --flag"
    assert line_of(capsys, "--config") == line_of(capsys, "--config=") == said


def test_a_tilde_is_the_home_folder(monkeypatch):
    """Only the shell expands it, and not after `=`: train.py made a folder called `~`."""
    monkeypatch.setenv("HOME", os.path.abspath("home"))
    Path("home").mkdir()
    written("home/c.yaml", "dataset: d\nout_dir: ~/runs/a\ndownloads: [~/x, a ~/y]")
    cfg = configure(Config, ["~/c.yaml", "--captions=~/{split}.csv", "--images", "~", "--clip=a~b"])
    home = os.environ["HOME"]
    assert cfg.run_dir == Path(home, "runs/a") and cfg.images == home and cfg.clip == "a~b"
    assert cfg.captions == home + "/{split}.csv" and cfg.downloads == (home + "/x", "a ~/y")
    assert configure(Config, ["--config=~/c.yaml"]).out_dir == home + "/runs/a"


def test_shipped_files_are_found_from_any_folder():
    """prepare.py config/shapes.py worked in the repository's own folder only."""
    cfg = configure(Config, ["config/shapes.py"])
    assert (cfg.dataset, cfg.vocab_size, cfg.data_dir) == ("shapes", 512, Path("data/shapes"))
    assert or_shipped(cfg.clip) == str(ROOT / "assets/shapes-clip")
    for name in ("openai/clip-vit-base-patch32", "assets/none", "./none", "/none", "x" * 5000):
        assert or_shipped(name) == name
    Path("config").mkdir()
    written("config/shapes.py", "dataset = 'own'")  # what is here comes first
    assert configure(Config, ["config/shapes.py"]).dataset == "own"


@pytest.mark.parametrize("argv", [[], ["--resume"], ["empty.yaml", "--max_iters=9"]])
def test_a_start_without_a_dataset_does_nothing(capsys, argv):
    """`python train.py` trained 20 M parameters on the built-in scenes, and moved the demo's
    checkpoint out of the way for it."""
    written("empty.yaml", "")
    with pytest.raises(SystemExit) as stop:
        configure(Config, argv)
    line = "--dataset is required: give it, or a config file such as config/shapes.py\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line


# ---------------------------------------------------------------------------------------------
# What is refused, to the letter


@pytest.mark.parametrize(
    "argv, line",
    [
        ("--n_layer=six", "--n_layer: expected an int, got `six`"),
        ("--n_layer six", "--n_layer: expected an int, got `six`"),
        ("--n_layer=2.5", "--n_layer: expected an int, got `2.5`"),
        ("--n_layer=true", "--n_layer: expected an int, got `true`"),
        ("--n_layer", "--n_layer: expected an int, got nothing"),
        ("--n_layer --bias", "--n_layer: expected an int, got nothing"),
        ("--n_layer=", "--n_layer: expected an int, got ``"),
        ("--n_layer=0", "--n_layer: expected 1 <= n_layer <= 1000000, got `0`"),
        ("--seed=" + "9" * 50, "--seed: expected a number below 2**63"),
        ("--dropout=abc", "--dropout: expected a float, got `abc`"),
        ("--dropout=nan", "--dropout: expected a float, got `nan`"),
        ("--min_lr=-inf", "--min_lr: expected a float, got `-inf`"),
        ("--dropout=1", "--dropout: expected 0 <= dropout < 1, got `1.0`"),
        ("--max_bad=1.1", "--max_bad: expected 0 <= max_bad <= 1, got `1.1`"),
        ("--compile=maybe", "--compile: expected true or false, got `maybe`"),
        ("--bias=none", "--bias: expected true or false, got `none`"),
        ("--features=both", "--features: expected one of pooled grid, got `both`"),
        ("--dataset=../x", "--dataset: expected a plain name, as in data/<name>, got `../x`"),
        ("--n_embd=510", "--n_embd: expected a multiple of n_head=8, got `510`"),
        ("--min_lr=1", "--min_lr: expected at most learning_rate=0.001, got `1.0`"),
        ("--learning_rate=1e-5", "min_lr: expected at most learning_rate=1e-05, got `0.0001`"),
        ("--n_prefix=128", "--n_prefix: expected less than block_size=128, got `128`"),
        (
            "--features=grid --grid=12",
            "--grid: expected grid * grid less than block_size=128, got `12`",
        ),
        ("--n_emdb=3", "--n_emdb: no such setting, did you mean `--n_embd`?"),
        ("--out-dir=x", "--out-dir: no such setting, did you mean `--out_dir`?"),
        ("--qqq", "--qqq: no such setting"),
        ("--", "--: no such setting"),
        ("-x", "`-x` is neither a config file (.py .yaml .yml) nor a --flag"),
        ("ckpt.pt", "`ckpt.pt` is neither a config file (.py .yaml .yml) nor a --flag"),
        ("none.py", "none.py: no such file"),
        ("folder.py", "folder.py: no such file"),
        ("--yes false none.py", "none.py: no such file"),
    ],
)
def test_command_lines_refused(capsys, argv, line):
    Path("folder.py").mkdir()
    assert line_of(capsys, *argv.split(" ")) == line


def test_odd_arguments_refused(capsys):
    line = "--images: expected a string without NUL and surrogates, got "
    assert line_of(capsys, "--images=a\0b") == line + r"`a\x00b`"
    assert line_of(capsys, "--images=a\udcff") == line + r"`a\udcff`"
    assert line_of(capsys, "--n_layer=a\nb\x1b[31m") == (
        r"--n_layer: expected an int, got `a\nb\x1b[31m`"
    )
    assert line_of(capsys, "a\0.py") == r"a\x00.py: no such file"
    assert line_of(capsys, "\ud800.py") == r"\ud800.py: no such file"
    assert line_of(capsys, "~\0.py") == r"~\x00.py: no such file"
    assert line_of(capsys, "") == "`` is neither a config file (.py .yaml .yml) nor a --flag"
    long = "--n_layer: expected an int, got `" + "x" * 59 + "…`"
    assert line_of(capsys, "--n_layer=" + "x" * 100000) == long
    assert line_of(capsys, "x" * 5000 + ".py").endswith(".py: no such file")


@pytest.mark.parametrize(
    "text, line",
    [
        ("\nn_emdb = 512", "c.py:2: n_emdb: no such setting, did you mean `n_embd`?"),
        ("n_layer = 'six'", "c.py:1: n_layer: expected an int, got `six`"),
        ("n_layer = 2.0", "c.py:1: n_layer: expected an int, got `2.0`"),
        ("n_layer = True", "c.py:1: n_layer: expected an int, got `True`"),
        ("n_layer = None", "c.py:1: n_layer: expected an int, got nothing"),
        ("n_layer = b'6'", "c.py:1: n_layer: expected an int, got `b'6'`"),
        ("n_layer = [6]", "c.py:1: n_layer: expected an int, got `[6]`"),
        ("bias = 1", "c.py:1: bias: expected true or false, got `1`"),
        ("images = 5", "c.py:1: images: expected a string, got `5`"),
        ("dropout = True", "c.py:1: dropout: expected a float, got `True`"),
        ("dropout = 1e999", "c.py:1: dropout: expected a float, got `inf`"),
        ("dropout = 1 + 2j", "c.py:1: dropout: expected a float, got `(1+2j)`"),
        ("dropout = (-1) ** 0.5", "c.py:1: dropout: expected a plain value"),
        ("\n\nn_layer = 0", "c.py:3: n_layer: expected 1 <= n_layer <= 1000000, got `0`"),
        ("n_layer = 1\nn_layer = 2", "c.py:2: `n_layer` was set on line 1"),
        ("n_layer = n_head", "c.py:1: n_layer: expected a plain value"),
        ("n_layer = 1\nn_head =\n", "c.py:2: invalid syntax"),
        ("n_layer: int = 1", "c.py:1: expected `name = value`"),
        ("n_layer = n_head = 1", "c.py:1: expected `name = value`"),
        ("n_layer, n_head = 1, 2", "c.py:1: expected `name = value`"),
        ("import os", "c.py:1: expected `name = value`"),
        ("print('hi')", "c.py:1: expected `name = value`"),
        ("seed = 1\nn_layer = (1 +\n len('a'))", "c.py:2: n_layer: expected a plain value"),
        ("images = f'{1}'", "c.py:1: images: expected a plain value"),
        ("images = {[]}", "c.py:1: images: expected a plain value"),
        ("n_layer = 5 * 8", "c.py:1: n_layer: expected a plain value"),
        ("n_layer = 2 ** 10 // 3 % 100", "c.py:1: n_layer: expected a plain value"),
        ("n_layer = -(-7)", "c.py:1: n_layer: expected a plain value"),
        ("n_head = 2\nn_layer = n_head * 2", "c.py:2: n_layer: expected a plain value"),
        ("learning_rate = 1e-2 / 4", "c.py:1: learning_rate: expected a plain value"),
        (
            "n_layer = 1 / 0",
            "c.py:1: n_layer: expected a plain value such as 5, 'text', True or [1, 2]; "
            "write no names or arithmetic",
        ),
        ("n_layer = 9**9**9", "c.py:1: n_layer: expected a plain value"),
        ("n_layer = (9**64)**64", "c.py:1: n_layer: expected a plain value"),
        (f"n_layer = {2**63}", "c.py:1: n_layer: expected a number below 2**63"),
        ("n_layer = 2**63", "c.py:1: n_layer: expected a plain value"),
        (
            f"images = [0x{'f' * 9000}]",
            "c.py:1: images: expected a string, got `a very long number`",
        ),
        ("images = 'a' * 10**12", "c.py:1: images: expected a plain value"),
        ("images = [0] * 9", "c.py:1: images: expected a plain value"),
        ("n_layer = True + 1", "c.py:1: n_layer: expected a plain value"),
        ("n_layer = 1 << 3", "c.py:1: n_layer: expected a plain value"),
        ("images = 'a\\d'", "c.py:1: invalid escape sequence '\\d'"),
        ("n_layer = " + "9" * 5000, "c.py:1: "),
        ("n_layer = " + "-" * 5000 + "1", "c.py: nested too deeply"),
        ("n_layer = " + "(" * 5000, "c.py:1: too many nested parentheses"),
        ("n_layer = " + "1+" * 20000 + "1", "c.py: nested too deeply"),
        ("# " * 50001, "c.py: expected a config of at most 100000 characters"),
        (b"\xff\xfe\x00\x01", "c.py: 'utf-8' codec can't decode byte 0xff"),
        (b"n_layer = 1\0", "c.py"),
    ],
)
def test_py_files_refused(capsys, text, line):
    assert line_of(capsys, written("c.py", text)).startswith(line)


@pytest.mark.parametrize(
    "text, line",
    [
        ("model:\n  n_emdb: 512", "c.yaml:2: n_emdb: no such setting, did you mean `n_embd`?"),
        ("n_layer: six", "c.yaml:1: n_layer: expected an int, got `six`"),
        ("n_layer: true", "c.yaml:1: n_layer: expected an int, got `true`"),
        ("n_layer: 2.5", "c.yaml:1: n_layer: expected an int, got `2.5`"),
        ("n_layer:", "c.yaml:1: n_layer: expected an int, got nothing"),
        ("n_layer: [1, 2]", "c.yaml:1: n_layer: expected an int, got `['1', '2']`"),
        ("dropout: .nan", "c.yaml:1: dropout: expected a float, got `.nan`"),
        ("seed: 1\nn_layer: 0", "c.yaml:2: n_layer: expected 1 <= n_layer <= 1000000, got `0`"),
        ("n_layer: 1\nmodel:\n  n_layer: 2", "c.yaml:3: `n_layer` was set on line 1"),
        ("seed: 1\nseed: 1", "c.yaml:2: `seed` was set on line 1"),
        ("a:\n  b:\n    n_layer: 1", "c.yaml:3: expected `name: value`"),
        ("- n_layer", "c.yaml:1: expected `name: value`"),
        ("just text", "c.yaml:1: expected `name: value`"),
        ("? [n_layer]\n: 1", "c.yaml:1: expected `name: value`"),
        ("seed: 1\nimages: !!python/name:os.system", "c.yaml:2: expected `name: value`"),
        ("!!python/object:os.x {a: b}", "c.yaml:1: expected `name: value`"),
        ("images: !x a", "c.yaml:1: expected `name: value`"),
        ("base: &b {seed: 1}\n<<: *b", "c.yaml:2: expected `name: value`"),
        ("seed: 1\n  n_layer: 2", "c.yaml:2: mapping values are not allowed here"),
        ("seed: 1\n---\nseed: 2", "c.yaml:2: but found another document"),
        ("seed: *x", "c.yaml:1: found undefined alias 'x'"),
        ("images: [" + "[" * 5000, "c.yaml: nested too deeply"),
        ("images: &a [*a]", "c.yaml:1: expected `name: value`"),
        ("seed: 1\nimages: \x07", "c.yaml:2: special characters are not allowed"),
        ('images: "\\UFFFFFFFF"', "c.yaml: "),
        ("%YAML " + "9" * 5000 + ".1\n---\nseed: 1", "c.yaml: "),
        (b"seed: \xff", "c.yaml: 'utf-8' codec can't decode byte 0xff"),
        (b"seed: 1\0", "c.yaml:1: special characters are not allowed"),
    ],
)
def test_yaml_files_refused(capsys, text, line):
    assert line_of(capsys, written("c.yaml", text)).startswith(line)


@pytest.mark.parametrize("suffix", ["py", "yaml"])
def test_a_config_is_never_executed(capsys, suffix):
    evil = {
        "py": [
            "open('hacked', 'w')",
            "import os; os.system('touch hacked')",
            "images = open('hacked', 'w').name",
            "images = [x for x in [open('hacked', 'w')]]",
            "images = (lambda: open('hacked', 'w'))()",
            "images = f'{open(__name__)}'",
            "class A:\n  open('hacked', 'w')",
            "n_layer: open('hacked', 'w') = 1",
        ],
        "yaml": [
            "images: !!python/object/apply:os.system ['touch hacked']",
            "!!python/object/apply:os.system ['touch hacked']",
            "images: !!python/object/new:open [hacked, w]",
            "!!python/object/apply:open [hacked, w]: 1",
        ],
    }
    for text in evil[suffix]:
        line_of(capsys, written(f"evil.{suffix}", text))
        assert not Path("hacked").exists()


def test_a_device_or_pipe_is_no_config_file(capsys):
    """Opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo("pipe.py")
    assert line_of(capsys, "pipe.py") == "pipe.py: no such file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_an_unreadable_file(capsys):
    Path(written("secret.py", "seed = 1")).chmod(0)
    assert line_of(capsys, "secret.py") == "secret.py: Permission denied"


def test_ranges_hold_without_a_command_line():
    for name, bad in dict(n_layer=0, dropout=-0.1, ema=1.0, mapper="x", seed=-1, grid=-1).items():
        with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got `{bad}`$"):
            replace(Config(dataset="d"), **{name: bad})


# ---------------------------------------------------------------------------------------------
# Help, checkpoints, run


def test_help_prints_every_setting_with_its_comment(capsys):
    for flag in (["--help"], ["-h", "--n_layer=six"], ["none.py", "--help"]):
        with pytest.raises(SystemExit) as stop:
            configure(Config, flag, usage="Train it.\n")
        out, err = capsys.readouterr()
        assert stop.value.code == 0 and err == "" and out.startswith("Train it.\n")
        lines = out.splitlines()
        for setting in fields(Config):
            [line] = [line for line in lines if line.startswith(f"{setting.name}: ")]
            assert "  # " in line and len(line) <= 110
        sections = [line.split()[2].strip(",") for line in lines if line.startswith("# -- ")]
        expected = "data shapes model training self-critical evaluation run"
        assert sections == expected.split()


def test_help_of_another_class(capsys):
    with pytest.raises(SystemExit):
        configure(Sampling, ["--help"])
    out = capsys.readouterr().out
    assert "docstring" not in out and "\nckpt: str  " in out and "  # the checkpoint\n" in out
    assert "# of any size\nimage: tuple[str, ...] = ()  " in out
    assert out.endswith("\ntop_p: float | None = None\nverbose: bool = False\n")


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """A base class, as decode.Decoding is one of sample.SampleConfig."""

    # -- choosing ----
    beams: int = 5  # beams kept
    max_len: int = 40  # tokens

    def __post_init__(self):
        within(self, "beams max_len", 1, 100)


@dataclass(frozen=True, kw_only=True)
class Captioning(Choosing):
    # -- what ----
    ckpt: str  # the checkpoint
    max_len: int = 9  # another default
    counts: dict = field(default_factory=dict)  # split -> images

    def __post_init__(self):
        super().__post_init__()
        if not self.ckpt:
            raise ConfigError("give a checkpoint")


def test_settings_are_inherited(capsys):
    with pytest.raises(SystemExit):
        configure(Captioning, ["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines()[2:] if line]
    assert [line.partition(":")[0].strip(" -") for line in lines] == [
        "# -- what", "ckpt", "max_len", "counts", "# -- choosing", "beams",
    ]  # fmt: skip
    assert lines[2] == f"{'max_len: int = 9':<36}  # another default"
    assert configure(Captioning, ["--beams=2", "--ckpt=c"]) == Captioning(ckpt="c", beams=2)

    error = line_of(capsys, "--ckpt=c", "--beams=0", cls=Captioning)
    assert error == "--beams: expected 1 <= beams <= 100, got `0`"
    assert line_of(capsys, "--ckpt=", cls=Captioning) == "give a checkpoint"
    with pytest.raises(ConfigError, match="^f.pt: max_len: expected 1 <= ") as error:
        from_dict(Captioning, {"ckpt": "c", "max_len": 101}, "f.pt")
    assert error.value.name == "max_len"
    with pytest.raises(ConfigError, match="^f.pt: ckpt is required$"):
        from_dict(Captioning, {}, "f.pt")


def test_a_dict_is_taken_as_it_is():
    counts = {"val": {"images": 3, "longest": None}}
    assert from_dict(Captioning, {"ckpt": "c", "counts": counts}, "x").counts == counts
    for bad in ("", "x", 3, None, [["a", 1]]):
        with pytest.raises(ConfigError, match="^x: counts: expected a dict, got "):
            from_dict(Captioning, {"ckpt": "c", "counts": bad}, "x")


def test_a_checkpoint_of_before_downloads_was_a_list():
    """It was one string, most often an empty one."""
    for text, entries in (("", ()), ("http://a b; http://c d", ("http://a b; http://c d",))):
        old = {"dataset": "d", "downloads": text}
        assert from_dict(Config, old, "ckpt.pt").downloads == entries


def test_settings_survive_a_checkpoint():
    cfg = Config(dataset="d", compile=False, captions="é", learning_rate=0.1, n_layer=3)
    assert from_dict(Config, asdict(cfg), "ckpt.pt") == cfg
    assert from_dict(Config, json.loads(json.dumps(asdict(cfg))), "ckpt.pt") == cfg
    both = Sampling("c.pt", ("a", "b"), top_p=0.5)
    assert from_dict(Sampling, json.loads(json.dumps(asdict(both))), "x") == both
    old = {"dataset": "d", "n_layer": 2}
    assert from_dict(Config, old, "ckpt.pt") == Config(**old)


@pytest.mark.parametrize(
    "d, line",
    [
        (None, "ckpt.pt: expected a dict of settings"),
        ({"n_emdb": 1}, "ckpt.pt: n_emdb: no such setting, did you mean `n_embd`?"),
        ({3: 1}, "ckpt.pt: 3: no such setting"),
        ({"n_layer": [1]}, "ckpt.pt: n_layer: expected an int, got `[1]`"),
        ({"n_layer": 10**5000}, "ckpt.pt: n_layer: expected a number below 2**63"),
        (
            {"dataset": "d", "n_layer": 0},
            "ckpt.pt: n_layer: expected 1 <= n_layer <= 1000000, got `0`",
        ),
        ({"dropout": float("nan")}, "ckpt.pt: dropout: expected a float, got `nan`"),
    ],
)
def test_checkpoint_settings_refused(d, line):
    with pytest.raises(ConfigError) as error:
        from_dict(Config, d, "ckpt.pt")
    assert str(error.value) == line


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("data/x:\nrun prepare.py"), 1, r"data/x:\nrun prepare.py"),
        (ConfigError("n_layer: no"), 1, "n_layer: no"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: Permission denied"),
        (SystemExit(7), 7, None),
    ],
)
def test_run_turns_a_users_trouble_into_a_line(capfd, error, status, line):
    def main(error):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, error)
    assert stop.value.code == status
    assert capfd.readouterr().err == (f"{line}\n" if line else "")


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("x"), OSError("x"), RuntimeError("x")])
def test_run_lets_a_bug_through(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        run(main)


def test_a_script_ends_in_one_line_and_no_traceback():
    """The whole way, in a process of its own: stderr, status, and a script's own settings class."""
    script = (
        "import sys\nfrom dataclasses import dataclass\n"
        "from configurator import *\nfrom parts.common import run\n\n"
        "@dataclass(frozen=True)\nclass Bench:\n    reps: int = 3  # repetitions\n\n"
        "    def __post_init__(self):\n        within(self, 'reps', 1, 9)\n\n"
        "def main(cfg):\n    print(cfg.reps)\n\n"
        "run(main, configure(Bench, sys.argv[1:], 'Bench.', files=False))\n"
    )
    written("bench_it.py", script)

    def outcome(*argv):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, "bench_it.py", *argv]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert outcome("--reps=5") == (0, "5\n", "")
    assert outcome("--reps=10") == (2, "", "--reps: expected 1 <= reps <= 9, got `10`\n")
    assert outcome("--repz") == (2, "", "--repz: no such setting, did you mean `--reps`?\n")
    code, out, err = outcome("--help")
    assert (code, err) == (0, "") and "reps: int = 3" in out and "  # repetitions" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_into_a_closed_pipe_has_no_traceback(unbuffered):
    """`python train.py --help | head -1` once ended in a BrokenPipeError."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------
# Fuzz: whatever comes in, settings or one line come out

NAMES = [field.name for field in fields(Config)]
WORDS = ["", "0", "1", "-1", "2.5", "1e-3", "true", "False", "none", "nan", "cpu", "grid", "9" * 99]
values = st.sampled_from(WORDS) | st.text(max_size=12) | st.integers().map(str)
names = st.sampled_from(NAMES) | st.text(max_size=8)
arguments = st.one_of(
    st.tuples(names, values).map("--{0[0]}={0[1]}".format),
    names.map("--{}".format),
    values,
    st.sampled_from(["good.py", "good.yaml", "bad.py", "bad.yaml", "folder.py", "none.yml"]),
    st.text(max_size=12),
)
PIECES = [*NAMES, *WORDS, " = ", ": ", "\n", "\n  ", "(", ")", "[", "]", "{", "}", ",", "#", "'"]
PIECES += ['"', "*", "**", "/", "%", "//", "+", "&a ", "*a", "!!", "- ", "|", ">", "<<", "\\", "?"]
rows = st.lists(st.tuples(names, values), max_size=5)
contents = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    rows.map(lambda rows: "\n".join(f"{name} = {value}" for name, value in rows)),
    rows.map(lambda rows: "\n".join(f"{name}: {value}" for name, value in rows)),
    st.text(max_size=60),
).map(lambda text: text.encode("utf8", "replace")) | st.binary(max_size=60)


def fuzz(examples):
    # Every example cleans up after the last; and a busy machine is no reason to fail.
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=unhealthy
    )


def settings_or_one_line(capsys, argv, cls=Config):
    capsys.readouterr()
    needed = ["--dataset=d"] if cls is Config else []
    try:
        cfg, status = configure(cls, [*needed, *argv]), 0
    except SystemExit as stop:
        cfg, status = None, stop.code
    out, err = capsys.readouterr()
    if cfg is not None:
        assert err == "" and from_dict(cls, asdict(cfg), "again") == cfg
        for name, kind in get_type_hints(cls).items():
            assert configurator.cast(name, getattr(cfg, name), kind) == getattr(cfg, name)
    elif status == 0:
        assert err == "" and ("-h" in argv or "--help" in argv)
    else:
        assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.endswith("\n")
        assert err.strip()
    return cfg


@pytest.fixture
def some_files():
    written("good.py", "n_layer = 2")
    written("good.yaml", "model:\n  n_layer: 3")
    written("bad.py", "n_layer = n_layer")
    written("bad.yaml", "n_layer: [")
    Path("folder.py").mkdir()


@fuzz(500)
@given(argv=st.lists(arguments, max_size=6))
def test_any_argument_list(capsys, some_files, argv):
    settings_or_one_line(capsys, argv)
    settings_or_one_line(capsys, ["--ckpt=c", *argv], Sampling)


@fuzz(500)
@given(content=contents)
def test_any_file(capsys, content):
    for name in ("any.py", "any.yaml"):
        settings_or_one_line(capsys, [written(name, content)])


def test_damaged_files(capsys):
    """A real config with random bytes changed, cut or doubled: 2 x 300 of them."""
    rng, read = random.Random(0), 0
    for name, text in (("a.py", PY), ("a.yaml", YAML)):
        for _ in range(300):
            damaged = bytearray(text.encode())
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(damaged))
                end = at + rng.randint(0, 4)
                damaged[at:end] = rng.choice([b"", rng.randbytes(2), damaged[at:end] * 2])
            read += settings_or_one_line(capsys, [written(name, bytes(damaged))]) is not None
    assert 30 < read < 570  # both ends are met


TEXT = st.text(st.characters(codec="utf8", max_codepoint=0xFFFF, exclude_characters="\0"))
TEXT = TEXT.filter(lambda text: text[:1] != "~")  # the home folder


@fuzz(100)
@given(
    cfg=st.builds(
        Config,
        dataset=st.just("d"),
        learning_rate=st.floats(1e-4, 1000),
        captions=TEXT,
        n_layer=st.integers(1, 1000),
        compile=st.sampled_from([None, True, False]),
        resume=st.booleans(),
        downloads=st.lists(TEXT.filter(bool), max_size=3).map(tuple),
    )
)
def test_flags_and_files_say_what_a_config_says(cfg):
    """Oracle: any settings, written out in each of the ways, read back as themselves."""
    pairs = asdict(cfg)
    argv = [f"--{name}={value}" for name, value in pairs.items() if name != "downloads"]
    argv += [f"--downloads={entry}" for entry in cfg.downloads or [""]]
    assert configure(Config, argv) == cfg
    py = "\n".join(f"{name} = {value!r}" for name, value in pairs.items())
    assert configure(Config, [written("c.py", py)]) == cfg
    yaml = "\n".join(f"{name}: {json.dumps(value)}" for name, value in pairs.items())
    assert configure(Config, [written("c.yaml", yaml)]) == cfg
