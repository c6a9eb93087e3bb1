"""Settings: one frozen dataclass. Config files override its defaults, and flags override both.

    python train.py config/coco.py mine.yaml --batch_size=256 --compile=false
    python train.py --help

A config file is data, never code: nothing in a `.py` or YAML file is run. Any mistake ends in one
line that says where it is, and exit status 2.
"""

import ast
import contextlib
import difflib
import inspect
import math
import os
import re
import sys
import warnings
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import chain, takewhile
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import yaml

from parts.common import UserError, or_shipped

# ---------------------------------------------------------------------------------------------
# Every setting of prepare.py and train.py. `--help` prints these very comments.


@dataclass(frozen=True)
class Config:
    # -- data -----------------------------------------------------------------------------
    dataset: str  # name of the dataset
    data: str = ""  # its folder; empty: data/<dataset>
    source: str = "shapes"  # shapes karpathy coco flickr csv jsonl shards
    captions: str = ""  # caption file, or a pattern that contains {split}
    images: str = ""  # folder of the images
    clip: str = "assets/shapes-clip"  # image encoder: a transformers model name or a folder
    features: str = "pooled"  # pooled (one embedding per image) or grid (one per patch)
    grid: int = 0  # grid features: average-pool to grid x grid patches, 0 = keep all
    normalize: bool = True  # scale each embedding to the same length, as CLIP compares them
    embeddings: str = ""  # .npy file of your own embeddings, used instead of images
    embedding_names: str = ""  # text file: the image file name of each row, one per line
    val_images: int = 0  # images moved from train to val if the source has no val split
    vocab_size: int = 8192  # subwords, learned from the training captions
    tokenizer: str = ""  # your sentencepiece model, or a byte-level BPE's name or folder (gpt2)
    lowercase: bool = False  # lower-case captions before tokenizing
    max_bad: float = 0.01  # stop if more than this share of the images cannot be used
    encode_batch: int = 64  # images encoded at a time
    workers: int = 2  # threads that read images
    downloads: tuple[str, ...] = ()  # archives to fetch, each "URL PATH [CHECKSUM]"
    yes: bool = False  # download without asking
    # -- shapes, the built-in dataset -----------------------------------------------------
    shapes_train: int = 8000  # scenes in train
    shapes_eval: int = 1000  # scenes in each of val, test and novel
    # -- model ----------------------------------------------------------------------------
    n_prefix: int = 10  # pooled features: prefix embeddings per image
    mapper: str = "linear"  # from image embedding to prefix: linear mlp
    n_layer: int = 6  # decoder blocks
    n_head: int = 8  # attention heads per block
    n_embd: int = 512  # width of the decoder
    block_size: int = 128  # maximum length of prefix + caption, in tokens
    dropout: float = 0.1  # everywhere in the decoder
    bias: bool = False  # give the decoder's linear layers and layer norms a bias
    # -- training -------------------------------------------------------------------------
    init_from: str = ""  # begin with a checkpoint's weights, or GPT-2's (name or folder)
    freeze_decoder: bool = False  # train the mapper alone
    batch_size: int = 64  # images per step, over all processes
    gradient_accumulation_steps: int = 1  # micro-steps that a batch is split into
    max_iters: int = 10000  # training steps
    learning_rate: float = 1e-3  # maximum, reached after the warmup
    min_lr: float = 1e-4  # minimum, reached after the decay
    warmup_iters: int = 200  # steps of linear warmup
    lr_decay_iters: int = 0  # step at which the decay ends; 0: max_iters, or with scst no decay
    lr_decay: str = "cosine"  # cosine, or linear: constant for one half, then falling
    optimizer: str = "adamw"  # adamw, or muon for the matrices inside the decoder
    weight_decay: float = 0.1  # of matrices only, not of vectors
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # maximum norm of the gradient, 0 = off
    label_smoothing: float = 0.0  # share of the target spread over the whole vocabulary
    ema: float = 0.0  # decay of the moving average of the weights, 0 = off
    embedding_noise: float = 0.0  # std of Gaussian noise added to embeddings in training
    word_dropout: float = 0.0  # share of the input tokens that unk replaces in training
    # -- self-critical training -----------------------------------------------------------
    objective: str = "xe"  # xe: cross-entropy; scst: self-critical, by CIDEr, no dropout or noise
    from_scratch: bool = False  # scst without init_from, from random weights
    scst_samples: int = 5  # captions sampled per image
    scst_references: float = 0.0  # weight of the references' cross-entropy, added to the loss
    # -- evaluation -----------------------------------------------------------------------
    eval_interval: int = 500  # steps between evaluations
    eval_images: int = 500  # val images captioned greedily and scored by CIDEr, 0 = all
    log_interval: int = 10  # steps between log lines
    samples: int = 4  # captions printed at each evaluation
    # -- run ------------------------------------------------------------------------------
    out_dir: str = ""  # folder of checkpoints and log; empty: out/<dataset>
    seed: int = 1337  # of all random numbers
    device: str = "auto"  # auto cpu mps cuda cuda:1
    dtype: str = "auto"  # of autocast: auto bfloat16 float16 float32
    compile: bool | None = None  # compile blocks and loss; none: on for CUDA, off for CPU
    resume: bool = False  # resume from out_dir/last.pt
    track: str = "none"  # tracker to report to, next to log.jsonl: none mlflow

    @property
    def data_dir(self) -> Path:
        return Path(self.data or f"data/{self.dataset}")

    @property
    def run_dir(self) -> Path:
        suffix = "_scst" if self.objective == "scst" else ""
        return Path(self.out_dir or f"out/{self.dataset}{suffix}")

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls to min_lr; in self-critical training, only if asked."""
        return self.objective == "xe" or self.lr_decay_iters > 0

    def __post_init__(self):
        one_of(self, "source", "shapes karpathy coco flickr csv jsonl shards")
        one_of(self, "features", "pooled grid")
        one_of(self, "mapper", "linear mlp")
        one_of(self, "lr_decay", "cosine linear")
        one_of(self, "optimizer", "adamw muon")
        one_of(self, "objective", "xe scst")
        one_of(self, "dtype", "auto bfloat16 float16 float32")
        one_of(self, "track", "none mlflow")
        within(self, "n_layer n_head n_embd n_prefix block_size vocab_size", 1, 10**6)
        within(self, "batch_size encode_batch shapes_train shapes_eval", 1, 10**6)
        within(self, "gradient_accumulation_steps max_iters eval_interval log_interval", 1)
        within(self, "warmup_iters lr_decay_iters val_images eval_images samples", 0)
        within(self, "grid workers learning_rate min_lr weight_decay grad_clip embedding_noise", 0)
        within(self, "scst_samples", 2, 1000)
        within(self, "scst_references", 0)
        within(self, "seed", 0, 2**32 - 1)
        within(self, "max_bad", 0, 1)
        for name in "dropout word_dropout beta1 beta2 label_smoothing ema".split():
            if not 0 <= getattr(self, name) < 1:
                refuse(name, f"0 <= {name} < 1", getattr(self, name))
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.dataset):
            refuse("dataset", "a plain name, as in data/<name>", self.dataset)
        if self.n_embd % self.n_head:
            refuse("n_embd", f"a multiple of n_head={self.n_head}", self.n_embd)
        if self.embeddings and not self.embedding_names:
            refuse("embedding_names", "a file with a name for each row of embeddings", "")
        if self.objective == "scst" and not (self.init_from or self.from_scratch):
            expected = "a checkpoint to begin with (or --from_scratch) with objective=scst"
            refuse("init_from", expected, self.init_from)
        if self.freeze_decoder and not self.init_from:
            refuse("init_from", "the decoder's weights with freeze_decoder", self.init_from)
        if self.decays and self.min_lr > self.learning_rate:
            refuse("min_lr", f"at most learning_rate={self.learning_rate}", self.min_lr)
        if self.features == "pooled" and self.n_prefix >= self.block_size:
            refuse("n_prefix", f"less than block_size={self.block_size}", self.n_prefix)
        if self.features == "grid" and self.grid**2 >= self.block_size:
            refuse("grid", f"grid * grid less than block_size={self.block_size}", self.grid)


# ---------------------------------------------------------------------------------------------
# Checks: `cast` takes each value of a file, flag or checkpoint; the others serve the __post_init__
# of any settings class


class ConfigError(UserError):
    """A setting that is unknown, unreadable or out of range; `name` lets `build` say where."""

    def __init__(self, text: str, name: str = ""):
        super().__init__(text)
        self.name = name


def refuse(name: str, expected: str, value):
    """Raise the ConfigError of a setting whose value is wrong."""
    try:
        text = str(value)
    except ValueError:  # Python prints at most 4,300 digits
        text = "a very long number"
    if len(text) > 60:
        text = text[:59] + "…"
    got = "nothing" if value is None else f"`{text}`"
    raise ConfigError(f"{name}: expected {expected}, got {got}", name)


def one_of(cfg, name: str, choices: str):
    if getattr(cfg, name) not in choices.split():
        refuse(name, f"one of {choices}", getattr(cfg, name))


def within(cfg, names: str, low, high=10**9):
    """Check that low <= setting <= high, for each name. 10**9 fits an int32."""
    for name in names.split():
        if not low <= getattr(cfg, name) <= high:
            refuse(name, f"{low} <= {name} <= {high}", getattr(cfg, name))


WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("none", "auto", "null")
EXPECTED = {bool: "true or false", int: "an int", float: "a float", str: "a string", dict: "a dict"}


def cast(name: str, value, kind):
    """Return `value` as a `kind`: bool, int, float, str or dict, any of these `| None`, or a
    `tuple[one of these, ...]`. Text is read as its kind, and a `~` before a string means the home
    folder; otherwise only int -> float is converted. Raise ConfigError."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if NoneType in get_args(kind):  # X | None
        if value is None or text in NOTHING:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if items == [""]:  # `--name=` empties it
            return ()
        return tuple(cast(name, item, get_args(kind)[0]) for item in items)
    if kind is bool:
        value = WORDS.get(text, value)
    elif kind in (int, float) and text:
        with contextlib.suppress(ValueError):  # it stays text, which is refused below
            value = kind(text)
    if type(value) is int and value.bit_length() > 63:
        raise ConfigError(f"{name}: expected a number below 2**63", name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        refuse(name, EXPECTED[kind], value)
    if kind is str:
        if re.search("[\0\ud800-\udfff]", value):  # no file name or file takes these
            refuse(name, "a string without NUL and surrogates", value)
        value = os.path.expanduser(value)
    return value


# ---------------------------------------------------------------------------------------------
# Config files. A reader yields (line, name, value), and raises its own format's error.

LARGEST = 100_000  # characters; a longer file is not a config
LITERAL = "expected a plain value such as 5, 'text', True or [1, 2]; write no names or arithmetic"


def read_py(text: str):
    """Read `name = literal` lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # makes "\d" a SyntaxError, not a second line on stderr
        tree = ast.parse(text)
    for node in tree.body:
        where = (None, node.lineno, None, None)
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case ast.Assign(targets=[ast.Name(id=name)]):
                try:
                    yield node.lineno, name, ast.literal_eval(node.value)
                except (ValueError, TypeError):  # the latter of {[]}
                    raise SyntaxError(f"{name}: {LITERAL}", where) from None
            case _:
                raise SyntaxError("expected `name = value`", where)


def read_yaml(text: str):
    """Read `name: value` lines, with or without one level of headings above them.

    YAML is composed, not constructed: a value stays the text that was written and its setting
    gives it a type, so `1e-3` is a float and `dataset: no` a name. Custom tags are refused.
    """

    def check(node, node_type):
        if not isinstance(node, node_type) or node.tag not in yaml.SafeLoader.yaml_constructors:
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
        heading = isinstance(node, yaml.MappingNode)
        for name, value in check(node, yaml.MappingNode).value if heading else [(key, node)]:
            yield name.start_mark.line + 1, check(name, yaml.ScalarNode).value, value_of(value)


def read_file(path: str):
    """Yield (where, name, value) for each setting in a config file. Raise ConfigError."""
    read = {".py": read_py, ".yaml": read_yaml, ".yml": read_yaml}.get(Path(path).suffix)
    if not read:
        raise ConfigError(f"`{path}` is neither a config file (.py .yaml .yml) nor a --flag")
    with contextlib.suppress(ValueError):  # of NUL in a path; there is no such file
        path = or_shipped(os.path.expanduser(path))
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
    except (OSError, ValueError, OverflowError) as error:  # the others: not text, or no Unicode
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}") from None
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
# From the command line, or a checkpoint, to settings


def configure(cls, argv: list[str], usage: str = "", files: bool = True, positional: str = ""):
    """Return the settings dataclass `cls` as the config files and flags in `argv` set it.

    Flags are `--key=value` or `--key value`, a bare `--key` for a bool, `--key a b c` for a tuple.
    Arguments without dashes are config files (`--config FILE` is one too), or errors if `files` is
    false. With `positional`, they set the settings that it names, in order, and a tuple takes all
    that are left.

    A mistake prints one line to stderr and exits with status 2; `--help` or `-h` prints `usage`
    and the settings, and exits with 0.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, usage))
        raise SystemExit(0)
    try:
        paths, flags = read_flags(cls, argv, positional.split())
        hint = ": give it, or a config file such as config/shapes.py"
        if positional or not files:
            hint = ""
            if paths:
                raise ConfigError(f"unexpected argument `{paths[0]}`: see --help")
        return build(cls, [*chain.from_iterable(map(read_file, paths)), *flags], hint=hint)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def read_flags(cls, argv: list[str], positional: list[str]) -> tuple[list, list]:
    """Return the arguments that set nothing, and ("--", name, value) for those that do."""
    kinds = get_type_hints(cls)
    args = list(argv)
    rest, flags = [], []
    lists = {}  # tuple setting -> its values so far: given again, it grows
    while args:
        arg = args.pop(0)
        if positional and not arg.startswith("-"):
            arg = f"--{positional[0]}={arg}"
            if get_origin(kinds[positional[0]]) is not tuple:
                positional = positional[1:]
        if not arg.startswith("--"):
            rest.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        kind = kinds.get(name)
        values = [value]
        if not equals:
            values = list(takewhile(lambda arg: not arg.startswith("--"), args))
            if get_origin(kind) is not tuple:
                values = values[:1]
            is_bool = bool in (kind, *get_args(kind))
            if is_bool and not {*WORDS, *NOTHING}.issuperset(map(str.lower, values)):
                values = []
            del args[: len(values)]
            values = values or [is_bool or None]  # a bare --flag is true
        if get_origin(kind) is tuple:
            lists[name] = lists.get(name, []) + values
            values = [lists[name]]
        if name == "config":
            rest.append(values[0] or "")
        else:
            flags.append(("--", name, values[0]))
    return rest, flags


def build(cls, settings, source: str = "--", hint: str = ""):
    """Return a `cls` made of (where, name, value) settings; the last one of a name wins.

    Raise ConfigError. Its text begins with `where`: a file and line, a checkpoint, or a flag's
    dashes. For a missing setting without a default, it begins with `source` and ends with `hint`.
    """
    kinds = get_type_hints(cls)
    values = {}
    origin = {}  # name -> where it was set
    try:
        for where, name, value in settings:
            origin[name] = where
            if name not in kinds:
                close = difflib.get_close_matches(str(name)[:60], kinds, 1)
                dashes = "--" if where == "--" else ""
                meant = "".join(f", did you mean `{dashes}{match}`?" for match in close)
                raise ConfigError(f"{name}: no such setting{meant}", name)
            values[name] = cast(name, value, kinds[name])
        for field in fields(cls):
            required = field.default is field.default_factory is MISSING
            if required and values.get(field.name, ()) == ():
                raise ConfigError(f"{source}{field.name} is required{hint}")
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{origin.get(error.name, '')}{error}", error.name) from None


def from_dict(cls, d: dict, where: str):
    """Return the settings whose `asdict` is stored in the file `where`. Missing ones keep their
    defaults; unknown or ill-typed ones raise ConfigError."""
    if not isinstance(d, dict):
        raise ConfigError(f"{where}: expected a dict of settings")
    where = f"{where}: "
    return build(cls, [(where, name, value) for name, value in d.items()], where)


def help_text(cls, usage: str) -> str:
    """Return `usage` and the settings as the sources of `cls` and of its bases show them."""
    shown = {}  # name of a setting, or a comment -> its line; a class comes before its bases
    for base in filter(is_dataclass, cls.__mro__):
        settings = re.split(r"\n +(?:def |@)", inspect.getsource(base))[0]
        for line in re.findall(r"^    (# .*|\w+: .*)", settings, re.MULTILINE):
            setting, _, comment = line.partition("  # ")
            if line.startswith("# -- "):
                line = f"\n{line}"
            elif comment:
                line = f"{setting:<36}  # {comment}"
            shown.setdefault(setting.partition(":")[0], line)
    title = "\nSettings, each set by --name=value:"
    return "\n".join([usage.strip(), title, *shown.values()]).strip()
