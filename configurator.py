"""Settings: one frozen dataclass, filled from defaults < config files, left to right < flags.

    python train.py config/coco.py mine.yaml --batch_size=256 --compile=false
    python train.py --help

A config file is data, never code: `.py` files are parsed and YAML is composed, but nothing in
them is run. Whatever a user gets wrong ends in one line that says where, and exit status 2.
"""

import ast
import contextlib
import difflib
import errno
import inspect
import math
import operator
import os
import re
import sys
import textwrap
import warnings
from dataclasses import MISSING, dataclass, fields
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import yaml


def printable(text: str) -> str:
    """One line, whatever it quotes: control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A user's mistake: one clear line, no traceback."""

    def __str__(self):
        return printable(super().__str__())


class ConfigError(UserError, ValueError):
    """A setting that does not exist, cannot be read, or is out of its range."""


# ---------------------------------------------------------------------------------------------
# Every setting of prepare.py and train.py. `--help` prints these very comments.


@dataclass(frozen=True)
class Config:
    # -- data -----------------------------------------------------------------------------
    dataset: str = "shapes"  # its name: the folder is data/<dataset>
    source: str = "shapes"  # shapes karpathy coco flickr csv jsonl shards
    captions: str = ""  # caption file, or a pattern with {split} in it
    images: str = ""  # folder of the images
    clip: str = "assets/shapes-clip"  # encodes the images: a transformers name or a folder
    features: str = "pooled"  # pooled grid: one embedding an image, or one a patch
    grid: int = 0  # grid features: average-pool to grid x grid, 0 keeps all
    normalize: bool = True  # scale each embedding to one length, as CLIP compares them
    embeddings: str = ""  # .npy of your own embeddings, used instead of images
    embedding_names: str = ""  # text file: the file name of each row's image, one a line
    val_images: int = 0  # moved from train to val when the source has no val split
    vocab_size: int = 8192  # subwords, learned from the training captions
    tokenizer: str = ""  # your own sentencepiece model, used instead of learning one
    lowercase: bool = False  # lower-case captions before tokenising
    max_bad: float = 0.01  # share of unreadable images above which prepare.py stops
    encode_batch: int = 64  # images encoded at a time
    workers: int = 2  # threads that read images
    downloads: str = ""  # zip files to fetch: "URL PATH [CHECKSUM]; ...", see download.py
    yes: bool = False  # download without asking
    # -- shapes, the built-in dataset -----------------------------------------------------
    shapes_train: int = 8000  # scenes in train
    shapes_eval: int = 1000  # scenes in each of val, test and novel
    # -- model ----------------------------------------------------------------------------
    n_prefix: int = 10  # prefix embeddings of an image, for pooled features
    mapper: str = "linear"  # from embedding to prefix: linear mlp
    n_layer: int = 6  # decoder blocks
    n_head: int = 8  # attention heads of a block
    n_embd: int = 512  # width of the decoder
    block_size: int = 128  # longest prefix + caption, in tokens
    dropout: float = 0.1  # everywhere in the decoder
    bias: bool = False  # in the decoder's linear layers and layer norms
    # -- training -------------------------------------------------------------------------
    batch_size: int = 64  # images per step over all processes
    gradient_accumulation_steps: int = 1  # micro-steps that batch_size is cut into
    max_iters: int = 10000  # steps
    learning_rate: float = 1e-3  # at its highest, after the warmup
    min_lr: float = 1e-4  # at its lowest, after the decay
    warmup_iters: int = 200  # steps of linear warmup
    lr_decay_iters: int = 0  # step at which the decay ends, 0 = max_iters
    weight_decay: float = 0.1  # of matrices; vectors have none
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # largest norm of the gradient, 0 = off
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    ema: float = 0.0  # decay of the weights' moving average, 0 = off
    embedding_noise: float = 0.0  # std of Gaussian noise added to embeddings in training
    # -- evaluation -----------------------------------------------------------------------
    eval_interval: int = 500  # steps between evaluations
    eval_images: int = 500  # val images whose greedy captions CIDEr scores, 0 = all
    log_interval: int = 10  # steps between log lines
    samples: int = 4  # captions printed at each evaluation
    # -- run ------------------------------------------------------------------------------
    out_dir: str = ""  # checkpoints and log; empty: out/<dataset>
    seed: int = 1337  # of everything random
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "auto"  # of autocast: auto bfloat16 float16 float32
    compile: bool | None = None  # torch.compile; none: on for CUDA, off for CPU
    resume: bool = False  # go on from out_dir/last.pt
    track: str = "none"  # tracker beside log.jsonl: none mlflow

    @property
    def data_dir(self) -> Path:
        return Path("data") / self.dataset

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) if self.out_dir else Path("out") / self.dataset

    def __post_init__(self):
        one_of(self, "source", "shapes karpathy coco flickr csv jsonl shards")
        one_of(self, "features", "pooled grid")
        one_of(self, "mapper", "linear mlp")
        one_of(self, "dtype", "auto bfloat16 float16 float32")
        one_of(self, "track", "none mlflow")
        within(self, "n_layer n_head encode_batch shapes_train shapes_eval", 1, 10**6)
        within(self, "n_prefix n_embd block_size vocab_size batch_size", 1, 10**6)
        within(self, "gradient_accumulation_steps", 1, 10**6)
        within(self, "max_iters eval_interval log_interval", 1, 10**9)
        within(self, "warmup_iters lr_decay_iters val_images eval_images samples", 0, 10**9)
        within(self, "grid workers", 0, 1000)
        within(self, "seed", 0, 2**32 - 1)
        within(self, "max_bad", 0, 1)
        within(self, "dropout beta1 beta2 label_smoothing ema", 0, below=1)
        within(self, "learning_rate min_lr weight_decay embedding_noise", 0, 1000)
        within(self, "grad_clip", 0, 10**9)
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.dataset):
            refuse("dataset", "a plain name, as in data/<name>", self.dataset)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", self.device):
            refuse("device", "auto, cpu, mps, cuda or cuda:<number>", self.device)
        if self.n_embd % self.n_head:
            refuse("n_embd", f"a multiple of n_head={self.n_head}", self.n_embd)
        if self.batch_size % self.gradient_accumulation_steps:
            steps = f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            refuse("batch_size", f"a multiple of {steps}", self.batch_size)
        if self.embeddings and not self.embedding_names:
            refuse("embedding_names", "a file with a name for each row of embeddings", "")
        if self.min_lr > self.learning_rate:
            refuse("min_lr", f"at most learning_rate={self.learning_rate}", self.min_lr)
        if self.features == "pooled" and self.n_prefix >= self.block_size:
            refuse("n_prefix", f"less than block_size={self.block_size}", self.n_prefix)
        if self.features == "grid" and self.grid**2 >= self.block_size:
            refuse("grid", f"grid * grid less than block_size={self.block_size}", self.grid)


# ---------------------------------------------------------------------------------------------
# Checks, for any settings class. A message opens with the setting's name, by which `build`
# finds the line or the flag to blame.


def refuse(name: str, expected: str, value):
    """Raise the ConfigError of a setting whose value is wrong."""
    text = value if isinstance(value, str) else repr(value)
    got = "nothing" if value is None else f"`{text}`" if len(text) <= 60 else f"`{text[:59]}…`"
    raise ConfigError(f"{name}: expected {expected}, got {got}")


def one_of(cfg, name: str, choices: str):
    """Check that a setting is one of the words in `choices`."""
    if getattr(cfg, name) not in choices.split():
        refuse(name, f"one of {choices}", getattr(cfg, name))


def within(cfg, names: str, low, high=math.inf, below=math.inf):
    """Check that low <= setting <= high and setting < below, for each setting in `names`."""
    for name in names.split():
        if not (low <= getattr(cfg, name) <= high and getattr(cfg, name) < below):
            top = f"<= {high}" if below == math.inf else f"< {below}"
            refuse(name, f"{low} <= {name} {top}", getattr(cfg, name))


# ---------------------------------------------------------------------------------------------
# The typed door: every value of every file, flag and checkpoint comes in here.

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("none", "auto", "null")
EXPECTED = {bool: "true or false", int: "an int", float: "a float", str: "a string"}


def cast(name: str, value, kind):
    """Return `value` as a `kind`: bool, int, float or str, any of these `| None`, or a
    `tuple[one of these, ...]`. Text is read as its kind; of the rest only an int is bent, to a
    float. Raises ConfigError."""
    text = value.strip().lower() if isinstance(value, str) else None
    if NoneType in get_args(kind):  # X | None
        if value is None or text in NOTHING:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(cast(name, item, get_args(kind)[0]) for item in items)
    if kind is bool:
        value = WORDS.get(text, value)
    elif kind is not str and text is not None:
        with contextlib.suppress(ValueError):  # it stays text, which is refused below
            value = kind(text)
    if type(value) is int and value.bit_length() > 63:
        raise ConfigError(f"{name}: expected a number below 2**63")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        refuse(name, EXPECTED[kind], value)
    if kind is str and re.search("[\0\ud800-\udfff]", value):  # no file name or file takes these
        refuse(name, "a string without NUL and surrogates", value)
    return value


# ---------------------------------------------------------------------------------------------
# Config files. A reader yields (line, name, value), and raises its own format's error.

LARGEST = 100_000  # characters; a longer file is no config
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def read_py(text: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # makes "\d" a SyntaxError, not a second line on stderr
        tree = ast.parse(text)
    names = {}
    for node in tree.body:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case ast.Assign(targets=[ast.Name(id=name)]):
                names[name] = evaluate(node.value, names)
                yield node.lineno, name, names[name]
            case _:
                raise at(node, "expected `name = value`")


def evaluate(node: ast.expr, names: dict):
    """The value of a literal, a list, a name assigned above, or arithmetic on these."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [evaluate(item, names) for item in items]
        case ast.Name(id=name):
            if name not in names:
                raise at(node, f"`{name}` is not assigned above")
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            left, op, right = 0, operator.sub, evaluate(operand, names)
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            left, right = evaluate(node.left, names), evaluate(node.right, names)
            op = OPERATORS[type(op)]
        case _:
            raise at(node, "expected a literal, arithmetic, or a name assigned above")
    # Bounded operands bound the time and memory of what the next line does: 9**9**9 would hang.
    if not all(type(x) in (int, float) and abs(x) < 2**63 for x in (left, right)):
        raise at(node, "arithmetic takes numbers below 2**63")
    if op is operator.pow and abs(right) > 64:
        raise at(node, "exponents go up to 64")
    try:
        return op(left, right)
    except ArithmeticError as error:
        raise at(node, str(error)) from None


def at(node: ast.AST, problem: str) -> SyntaxError:
    return SyntaxError(problem, (None, node.lineno, None, None))


def read_yaml(text: str):
    # Composed, not constructed: a scalar stays the text that was written and its setting gives
    # it a type, so `1e-3` is a float and `dataset: no` a name. Tags outside YAML's own are refused.
    def check(node, kind):
        if not isinstance(node, kind) or node.tag not in yaml.SafeLoader.yaml_constructors:
            raise yaml.MarkedYAMLError(None, None, "expected `name: value`", node.start_mark)
        return node

    def value_of(node):
        if isinstance(node, yaml.SequenceNode):
            return [check(item, yaml.ScalarNode).value for item in node.value]
        value = check(node, yaml.ScalarNode).value
        return None if node.tag.endswith(":null") else value

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, node in check(root, yaml.MappingNode).value if root else ():
        check(key, yaml.ScalarNode)
        group = isinstance(node, yaml.MappingNode)  # the key is a heading then
        for name, value in check(node, yaml.MappingNode).value if group else [(key, node)]:
            yield name.start_mark.line + 1, check(name, yaml.ScalarNode).value, value_of(value)


def read_file(path: str):
    """Yield (where, name, value) for each setting in a config file. Raises ConfigError."""
    read = {".py": read_py, ".yaml": read_yaml, ".yml": read_yaml}.get(Path(path).suffix)
    if not read:
        raise ConfigError(f"`{path}` is neither a config file (.py .yaml .yml) nor a --flag")
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such file")
    lines = {}  # name -> where it was set
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ConfigError(f"{path}: expected a config of at most {LARGEST} characters")
        for line, name, value in read(text):
            if name in lines:
                raise ConfigError(f"{path}:{line}: `{name}` was set on line {lines[name]}")
            lines[name] = line
            yield f"{path}:{line}: ", name, value
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, OverflowError) as error:  # not UTF-8, a NUL, or an escape beyond Unicode
        raise ConfigError(f"{path}: {error}") from None
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno or 1}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}:{error.problem_mark.line + 1}: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: {error.reason}") from None
    except (RecursionError, MemoryError):  # the latter is how Python's parser says the former
        raise ConfigError(f"{path}: nested too deeply") from None


# ---------------------------------------------------------------------------------------------
# From the command line, or a checkpoint, to settings.


def configure(cls, argv: list[str], usage: str = "", files: bool = True):
    """Return the settings dataclass `cls` as the config files and flags in `argv` set it.

    Flags are `--key=value` or `--key value`, a bare `--key` for a bool, `--key a b c` for a tuple.
    With `files=False` there are flags only. A mistake prints one line to stderr and exits with
    status 2; `--help` or `-h` prints `usage` and the settings, and exits with 0.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, usage))
        raise SystemExit(0)
    try:
        paths, flags = read_flags(cls, argv)
        if paths and not files:
            raise ConfigError(f"`{paths[0]}` is not a --flag, and config files are not taken here")
        return build(cls, [*(setting for path in paths for setting in read_file(path)), *flags])
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def kinds_of(cls) -> dict:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def read_flags(cls, argv: list[str]) -> tuple[list, list]:
    """Return the arguments that are not flags, and ("--", name, value) for each flag."""
    kinds, args, paths, flags, many = kinds_of(cls), list(argv), [], [], {}
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            paths.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        kind = kinds.get(name)
        following = list(takewhile(lambda arg: not arg.startswith("--"), args))
        if get_origin(kind) is tuple:  # takes all that follow; given again, it grows
            taken = [] if equals else following
            many[name] = many.get(name, []) + ([value] if equals else taken)
            value = many[name] or None
        elif equals:
            taken = []
        elif bool in (kind, *get_args(kind)):  # bare, unless a word that a bool reads follows
            taken = [arg for arg in following[:1] if arg.lower() in (*WORDS, *NOTHING)]
            value = taken[0] if taken else True
        else:
            taken = following[:1]
            value = taken[0] if taken else None
        del args[: len(taken)]
        flags.append(("--", name, value))
    return paths, flags


def build(cls, settings):
    """Make a `cls` of (where, name, value)s, the last of a name winning. Raises ConfigError, which
    opens with `where`: a file and line, a checkpoint, or the dashes of a flag."""
    kinds, values, origin = kinds_of(cls), {}, {}
    for where, name, value in settings:
        if name not in kinds:
            dashes, place = ("--", "") if where == "--" else ("", where)
            close = difflib.get_close_matches(str(name)[:60], kinds, 1)
            hint = f", did you mean `{dashes}{close[0]}`?" if close else ""
            raise ConfigError(f"{place}no setting `{dashes}{name}`{hint}")
        try:
            values[name], origin[name] = cast(name, value, kinds[name]), where
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
    for field in fields(cls):
        if field.name not in values and field.default is field.default_factory is MISSING:
            raise ConfigError(f"--{field.name}: has no default, so give it")
    try:
        return cls(**values)
    except ValueError as error:  # from its __post_init__
        name = re.match(r"\w*", str(error))[0]
        raise ConfigError(f"{origin.get(name, '')}{error}") from None


def help_text(cls, usage: str = "") -> str:
    """`usage`, and the settings as they stand in the source of `cls`, comments and all."""
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    lines = takewhile(lambda line: not re.match(r" +(def |@)", line), lines)
    lines = [line.strip() for line in lines if re.match(r"    (# |\w+: )", line)]
    pairs = [line.partition("  # ") for line in lines]
    lines = [f"{left:<36}  # {text}" if text else left for left, _, text in pairs]
    lines = [f"\n{line}" if line.startswith("# -- ") else line for line in lines]
    return "\n".join([usage.strip(), "\nSettings, each set by --name=value:", *lines]).strip()


def from_dict(cls, d: dict, where: str):
    """Return the settings of which the file `where` holds the `asdict`. Those missing keep their
    defaults; unknown or ill-typed ones raise ConfigError."""
    if not isinstance(d, dict):
        raise ConfigError(f"{where}: expected a dict of settings")
    return build(cls, [(f"{where}: ", name, value) for name, value in d.items()])


# ---------------------------------------------------------------------------------------------


def run(main, *args):
    """Call `main(*args)`, as every script does. A user's mistake, a full disk or a file that will
    not open is one line and exit status 1; Ctrl-C is 130; all else is a bug, with its traceback."""
    try:
        return main(*args)
    except UserError as error:
        line, status = error, 1
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # a write to a full disk does not name its file
        name = "" if error.filename is None else f"{error.filename}: "
        line, status = UserError(f"{name}{error.strerror}"), 1
    print(line, file=sys.stderr)
    raise SystemExit(status)
