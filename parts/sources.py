"""Sources: captions and the names of their images, checked; and the archives that hold them.

    fetch(cfg)              # download what is missing, after asking
    splits = read(cfg)      # {split: [Record, ...]}

The whole source is validated first: the files exist, ids are unique, captions are text of a sane
length, no image is in two splits. Every problem is listed with its line, at most 20 of each sort,
and all end in one error. Nothing is skipped silently, nothing in a tar is unpacked or run, and no
name may point outside the images folder.

`cfg` is the settings of prepare.py (configurator.Config).
"""

import ast
import codecs
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from parts import shapes
from parts.common import UserError, csv_reader, owning, printable, read_json, write_text

SPLITS = ("train", "val", "test")  # what {split} stands for
NEEDED = ("train", "val")  # the splits that must exist and have captions
LONGEST = 2000  # characters of a caption or a name
SPACES = re.compile(r"[ \t-\r]+")  # of ASCII; other spaces are the user's text, as in Chinese
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and bytes that are not UTF-8
IN_TARS = ".jpg .jpeg .jpe .jfif .png .webp .avif .gif .bmp .tif .tiff .heic .heif .jp2".split()
MACOS = re.compile(r"(^|/)(\._|__MACOSX/)")  # what macOS adds to archives
# A list of texts in one cell of a CSV, as JSON, Python and numpy write it.
QUOTED = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""
LISTED = re.compile(rf"\[\s*(?:(?:{QUOTED})[,\s]*)+]")
SPLIT_NAME = re.compile(r"(?!meta$)[a-z0-9][a-z0-9_-]{0,40}")  # it becomes part of file names


@dataclass(slots=True)
class Record:
    """An image with all its captions, checked: what prepare.py works on."""

    id: int | str | None
    file_name: str
    captions: list[str]
    caption_ids: list | None = None  # the source's own
    tokens: list | None = None  # each caption's ids, by the user's own tokenizer
    facts: list[str] | None = None  # what is true of a built-in scene
    place: tuple | None = None  # (path, offset, size) of an image in a tar shard
    bad: str = ""  # why it is left out: broken, or without a caption that can be used
    split: str | None = None  # in the source: its image is in that split's folder


Row = tuple[str, Record]  # what a reader yields: file:line or the like, image


class Problems:
    """What is wrong with a source: all problems are counted, 20 of each sort are listed."""

    def __init__(self):
        self.lines: dict[str, list[str]] = {}  # problem -> a line for each time
        self.count = 0  # of those that stop us

    def add(self, problem: str, where: str, detail: object = "", is_warning: bool = False) -> None:
        self.count += not is_warning
        text = f"  {where}: {str(detail)[:80]}".removesuffix(": ")
        self.lines.setdefault(problem, []).append(text)

    def stop(self, source: str) -> None:
        """List the problems on stderr. Raise UserError if any is more than a warning."""
        for problem, lines in self.lines.items():
            more = [f"  and {len(lines) - 20} more"] * (len(lines) > 20)
            for line in (f"{problem}: {len(lines)}", *lines[:20], *more):
                print(printable(line), file=sys.stderr)
        if n := self.count:
            problems = f"{n} problem{'s' * (n > 1)}"
            raise UserError(f"{source}: {problems}, listed above; nothing was written")


def read(cfg, tokenizer=None) -> dict[str, list[Record]]:
    """Return the records of each split.

    `tokenizer` is the user's own, if the source has a column of its tokens. Raise UserError, with
    the problems listed on stderr, if the source cannot be used as it is.
    """
    if cfg.source == "shapes":
        return render_scenes(cfg)
    problems = Problems()
    splits = Gathering(cfg, problems, tokenizer).splits
    problems.stop(cfg.captions)
    for split, records in splits.items():
        mark_uncaptioned(records, split, cfg)
    if "val" not in splits and cfg.val_images and "train" in splits:
        train = splits["train"]
        n = cfg.val_images
        if n >= len(train):
            raise UserError(f"val_images={n}, but there are {len(train)} images in all: lower it")
        chosen = set(random.Random(cfg.seed).sample(range(len(train)), n))
        splits["train"] = [r for i, r in enumerate(train) if i not in chosen]
        splits["val"] = [r for i, r in enumerate(train) if i in chosen]
    for needed in NEEDED:
        if needed in splits:
            continue
        files = [set(glob.glob(cfg.captions.replace("{split}", s))) for s in ("*", *SPLITS)]
        others = sorted(files[0].difference(*files[1:])) + sorted(splits.keys() - set(SPLITS))
        hints = ["--val_images=N moves some of train there"] * (needed == "val")
        if others:
            hints.insert(0, f"if it is {' or '.join(others[:3])}, rename that")
        known = f", only in {', '.join(splits)}" * bool(splits)
        hint = "; ".join(hints) or "check --captions"
        raise UserError(f"{cfg.captions}: no images in split `{needed}`{known}: {hint}")
    return splits


def mark_uncaptioned(records: list[Record], split: str, cfg) -> None:
    """Mark images without captions as bad, unless a split to be captioned has only such images.

    Raise UserError if a split has captions, or should, and none can be used.
    """
    is_captioned = split in NEEDED or any(record.captions for record in records)
    for record in records:
        if record.captions or not is_captioned:
            record.bad = ""
        else:
            record.bad = record.bad or "caption: missing"
    if all(record.bad for record in records):
        raise UserError(
            f"{cfg.captions}: none of the {len(records)} images of split `{split}` has a caption "
            f"that can be used; {records[0].file_name}: {records[0].bad}"
        )


def render_scenes(cfg) -> dict[str, list[Record]]:
    """Render the built-in scenes into data/<dataset>/images and return their records."""
    for setting in ("captions", "images", "embeddings"):
        if getattr(cfg, setting):
            raise UserError(
                f"source=shapes renders its own scenes and takes no {setting}: "
                f"add --source=NAME, one of {' '.join(READERS)}"
            )
    meta = cfg.data_dir / "meta.json"
    if meta.is_file() and (source := read_json(meta).get("source")) != cfg.source:
        raise UserError(f"{cfg.data_dir} is of --source={source}: add that, or another --dataset")
    counts = {"train": cfg.shapes_train, **dict.fromkeys(("val", "test", "novel"), cfg.shapes_eval)}
    scenes = shapes.build(cfg.data_dir / "images", counts, cfg.seed)
    number = itertools.count()
    return {
        split: [Record(next(number), **scene, split=split) for scene in scenes[split]]
        for split in scenes
    }


def locate(record: Record, cfg) -> tuple[str, int, int]:
    """Return the (path, offset, size) of a record's image, as `encoder.read_image` takes them."""
    return record.place or (os.path.join(images_folder(cfg, record.split), record.file_name), 0, -1)


def images_folder(cfg, split: str) -> str:
    return (cfg.images or str(cfg.data_dir / "images")).replace("{split}", split)


# ---------------------------------------------------------------------------------------------
# Checks: rows -> records


def text_problem(text) -> str:
    """Return what is wrong with a caption or a file name, empty if it can be used."""
    if not isinstance(text, str):
        return "missing" if text is None else "not text"
    if len(text) > LONGEST:
        return f"more than {LONGEST} characters"
    if CONTROL.search(text):
        return "a control character, or not UTF-8"
    return "" if any(c.isprintable() and c != " " for c in text) else "empty"


def token_ids(tokens, tokenizer) -> list[int] | None:
    """Return a caption's ids, from a list or from text such as `5 12 7` or `[5, 12, 7]`, without
    bos and eos. Return None if it is neither, or not all are the tokenizer's ordinary ids or unk.
    """
    special = {tokenizer.pad, tokenizer.bos, tokenizer.eos} - {tokenizer.unk}
    if isinstance(tokens, str):
        with contextlib.suppress(ValueError):
            tokens = [int(word) for word in re.sub(r"[\[\],]", " ", tokens).split()]
    if not isinstance(tokens, list):
        return None
    if tokens[:1] == [tokenizer.bos]:
        tokens = tokens[1:]
    if tokens[-1:] == [tokenizer.eos]:
        tokens = tokens[:-1]
    for i in tokens:
        if type(i) is not int or not 0 <= i < len(tokenizer) or i in special:
            return None
    return tokens or None


class Gathering:
    """The records of each split, made of the rows that readers yield; what is wrong goes to
    `problems`."""

    def __init__(self, cfg, problems: Problems, tokenizer=None):
        self.cfg = cfg
        self.problems = problems
        self.tokenizer = tokenizer
        self.splits: dict[str, list[Record]] = defaultdict(list)
        self.images: dict[str, dict] = defaultdict(dict)  # folder -> name within it -> record
        self.ids: dict[tuple, set] = defaultdict(set)  # (images or captions, split) -> their ids
        self.given: dict[str, bool] = {}  # whether the first row has ids, or tokens
        self.folder_of = functools.cache(
            lambda split: os.path.join(os.path.abspath(images_folder(cfg, split)), "")
        )
        for where, row in read_rows(cfg, problems):
            self.tidy_captions(where, row)
            self.add(where, row)
        records = itertools.chain(*self.splits.values())
        for number, record in enumerate(record for record in records if record.id is None):
            record.id = number

    def tidy_captions(self, where: str, row: Record) -> None:
        """Tidy up captions, make their tokens lists of ids, and check both, and captions' ids.

        Empty captions are dropped: some files have them for images without one. In a tar, all that
        cannot be used are dropped, because the user cannot correct a line there.
        """
        if row.tokens is not None and len(row.tokens) != len(row.captions):
            self.problems.add("bad tokens (expected those of each caption)", where, row.tokens)
        is_kept = []
        for i, caption in enumerate(row.captions):
            if isinstance(caption, str):
                row.captions[i] = SPACES.sub(" ", caption).strip(" ")
            fault = text_problem(row.captions[i])
            is_kept.append(not fault)
            if fault in ("missing", "empty") or (fault and row.place):
                row.bad = f"caption: {fault}"
                self.problems.add(f"left out, a caption ({fault})", where, is_warning=True)
            elif fault:
                self.problems.add(f"bad caption ({fault})", where)
        if not all(is_kept):
            for name in ("captions", "caption_ids", "tokens"):
                if values := getattr(row, name):
                    setattr(row, name, list(itertools.compress(values, is_kept)))
        if not row.captions:
            row.tokens = None
            return
        if None in (row.caption_ids or [None]):
            row.caption_ids = None  # they count only if every caption has one
        for caption_id in row.caption_ids or [None]:
            self.check_id(where, "captions", row.split, caption_id)
        self.check_given(where, "tokens", row.tokens)
        if row.tokens is None:
            return
        if not self.tokenizer:
            raise UserError(f"{where}: tokens need --tokenizer=FILE, the model that made them")
        tokens = [token_ids(caption, self.tokenizer) for caption in row.tokens]
        if None in tokens:
            expected = f"ids of {self.cfg.tokenizer}, none of them pad, bos or eos"
            self.problems.add(f"bad tokens (expected {expected})", where, row.tokens)
        row.tokens = tokens

    def add(self, where: str, row: Record) -> None:
        """Make a row its image's record, or add its captions to that, if its names can be used."""
        name = row.file_name
        if not (isinstance(row.split, str) and SPLIT_NAME.fullmatch(row.split)):
            expected = "expected lower-case letters, digits, - or _"
            self.problems.add(f"bad split name ({expected})", where, row.split)
            return
        if fault := text_problem(name):
            self.problems.add(f"bad file name ({fault})", where)
            return
        folder = self.folder_of(row.split)
        path = os.path.normpath(os.path.join(folder, name))
        if not path.startswith(folder):
            problem = "file name outside the images folder"
            if os.path.isabs(name):  # as the other rows' names are, most likely
                problem += f" (names are relative to {folder}; --images=/ takes absolute ones)"
            self.problems.add(problem, where, name)
            if os.path.isabs(name):
                self.problems.stop(self.cfg.captions)
            return
        path = path.removeprefix(folder)
        if path == name:
            path = name  # one string in memory: there may be millions
        record = self.images[folder].setdefault(path, row)
        if record is row:
            self.splits[row.split].append(row)
            self.check_id(where, "images", row.split, row.id)
            file = locate(row, self.cfg)[0]
            if not row.place and not self.cfg.embeddings and not os.path.isfile(file):
                self.problems.add("no such image", where, file)
            return
        if record.split != row.split:
            hint = "if each has a folder, set --images=FOLDER/{split}"
            self.problems.add(f"image in two splits ({hint})", where, name)
            self.check_id(where, "images", row.split, row.id)
        elif self.cfg.source not in SEVERAL_ROWS:
            self.problems.add("image listed twice", where, name)
        elif row.id not in (None, record.id):
            problem = "image with two ids (if they number captions, rename the column)"
            self.problems.add(problem, where, f"{name}: {record.id!r} and {row.id!r}")
        record.captions += row.captions
        record.tokens = (record.tokens or []) + (row.tokens or []) or None

    def check_id(self, where: str, what: str, split: str, value) -> None:
        """Check the id of an image or caption, unique within its split, unless none has one."""
        self.check_given(where, f"ids of {what} in split {split}", value)
        if value is None:
            return
        ids = self.ids[what, split]
        if type(value) is not int and text_problem(value):
            self.problems.add("bad id (expected a whole number or a text)", where, repr(value))
        elif value in ids:
            self.problems.add(f"id of two {what}", where, repr(value))
        else:
            ids.add(value)

    def check_given(self, where: str, what: str, value) -> None:
        """Check that something is given everywhere, if it was given the first time, or nowhere."""
        is_given = value is not None
        if self.given.setdefault(what, is_given) != is_given:
            self.problems.add(f"{what} for some images only", where)


# ---------------------------------------------------------------------------------------------
# Readers, one per format: each yields the Rows of a file, several per image in some, and adds to
# the problems


def read_rows(cfg, problems: Problems) -> Iterator[Row]:
    """Yield the rows of all caption files: one file per split, or a single one if the name has no
    {split}. A row that names no split gets its file's, or train."""
    if not cfg.captions:
        raise UserError(f"source={cfg.source} needs --captions=FILE")
    reader = READERS[cfg.source]
    if cfg.source == "shards":
        reader = functools.partial(read_shards, setting=cfg.captions)
    for split in SPLITS if "{split}" in cfg.captions else ("train",):
        path = cfg.captions.replace("{split}", split)
        if path != cfg.captions and not (os.path.exists(path) or glob.glob(path)):
            continue
        if os.path.realpath(path) == os.path.realpath(cfg.data_dir / f"{split}.json"):
            raise UserError(f"{path} would be replaced: move it elsewhere, or set --data")
        for where, record in reader(path, problems):
            if record.split is None:
                record.split = split
            yield where, record


def open_text(path: str):
    """Open UTF-8, with or without a BOM, or UTF-16 with one. Other bytes become surrogates, which
    `text_problem` refuses."""
    file = open(path, "rb")  # noqa: SIM115 - once: a pipe cannot be read again
    encoding = "utf-8-sig"
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # some spreadsheets' way
        encoding = "utf-16"
    return io.TextIOWrapper(file, encoding, "surrogateescape", newline="")


def columns_of(names: list[str], where: str) -> tuple[str, str]:
    """Return which column of a CSV, or key of a JSON line, has the image and which the caption.

    file_name and text are Hugging Face's, filename and raw Karpathy's. Raise UserError if there is
    none, or if one that is read is there twice.
    """
    image = [name for name in ("image", "file_name", "filename") if name in names]
    caption = [name for name in ("caption", "captions", "text", "raw") if name in names]
    if not image or not caption:
        got = ",".join(names)[:60]
        raise UserError(f"{where}: expected a header or keys with image,caption, got `{got}`")
    for name in (image[0], caption[0], "id", "split", "tokens"):
        if names.count(name) > 1:
            raise UserError(f"{where}: {name} is there twice: rename one")
    return image[0], caption[0]


def row_of(entry: dict, columns: tuple[str, str]) -> Record:
    """Return the image of a CSV's or JSONL's line, with as many `tokens` as `captions`."""
    name, captions = (entry[column] for column in columns)
    if isinstance(captions, str) and LISTED.fullmatch(captions):
        with contextlib.suppress(ValueError, SyntaxError):  # of a backslash; it stays one text
            captions = [ast.literal_eval(text) for text in re.findall(QUOTED, captions)]
    tokens = entry.get("tokens")
    if tokens is not None and not (isinstance(captions, list) and isinstance(tokens, list)):
        tokens = [tokens]
    if not isinstance(captions, list):
        captions = [captions]
    return Record(entry.get("id"), name, captions, tokens=tokens, split=entry.get("split"))


def read_csv(path: str, problems: Problems) -> Iterator[Row]:
    """CSV with a header: image, caption, optionally id, split and tokens; others are ignored."""
    with open_text(path) as file:
        reader = csv_reader(csv.reader, file, strict=True, skipinitialspace=True)
        header: list[str] = []
        cells: list[str] | None = []
        while cells is not None:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                problems.add("malformed CSV", where, error)
                continue
            if not cells:  # an empty line, or the end
                continue
            if not header:
                header = [name.strip().lower() for name in cells]
                columns = columns_of(header, where)
            elif len(cells) != len(header):
                detail = f"{len(cells)} for {len(header)} columns (a comma without quotes?)"
                problems.add("wrong number of cells", where, detail)
            else:
                entry: dict = dict(zip(header, cells, strict=True))
                if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", entry.get("id", "")):
                    entry["id"] = int(entry["id"])
                yield where, row_of(entry, columns)


def read_jsonl(path: str, problems: Problems) -> Iterator[Row]:
    """One JSON object per line: image, caption or captions, optionally id, split and tokens."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if line.strip() and (entry := json_object(where, line, problems)) is not None:
                if {"caption", "captions"} <= entry.keys():
                    raise UserError(f"{where}: caption and captions are both there: rename one")
                yield where, row_of(entry, columns_of(list(entry), where))


def json_object(where: str, text: str | bytes, problems: Problems) -> dict | None:
    """Return the object that a JSON text is; None if it is none, which is a problem."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    problems.add("not a JSON object", where, text)
    return None


# Headers of Flickr8k's captions.txt and of Flickr30k's captions.txt and results.csv.
FLICKR_HEADER = re.compile(r"image(_name)?([,|]) ?(comment_number\2 ?)?(caption|comment)")
# What is wrong in the files as they were published: Flickr8k's has captions of x.jpg.1, an image
# that it lacks, and one line of Flickr30k's has no bar between number and caption.
UNPUBLISHED = re.compile(r".+\.jpg\.[0-9]")
NO_BAR = re.compile(r" *[0-9]+ +(.+)")


def read_flickr(path: str, problems: Problems) -> Iterator[Row]:
    """Flickr8k's and Flickr30k's lines: `name#number<tab>caption`, `name,caption`, or if the
    header says so `name,number,caption` or `name| number| caption`."""
    bar = ","
    is_numbered = False
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            line = line.strip(" \t\r\n")  # other spaces are the user's text
            where = f"{path}:{number}"
            name, found, caption = line.partition("\t" if "\t" in line else bar)
            if number == 1 and (header := FLICKR_HEADER.fullmatch(line)):
                bar = header[2]
                is_numbered = bool(header[3])
                continue
            if found == "\t":
                name = name.rpartition("#")[0] or name
                if UNPUBLISHED.fullmatch(name):
                    problems.add("left out, of an image never published", where, line, True)
                    continue
            elif is_numbered and bar in caption:
                caption = caption.partition(bar)[2]
            elif is_numbered and (match := NO_BAR.fullmatch(caption)):
                problems.add(f"`{bar}` put after a number", where, line, True)
                caption = match[1]
            elif line and (is_numbered or not found):
                problems.add("neither a tab nor the header's columns", where, line)
                continue
            caption = caption.strip(" ")
            if found == "," and caption[:1] == caption[-1:] == '"':
                caption = caption[1:-1].replace('""', '"')
            if line:
                yield where, Record(None, name, [caption])


def entries(content, name: str, path: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) for each object in the list `name` of a JSON file's content."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise UserError(f'{path}: expected an object with a list "{name}"')
    for i, entry in enumerate(content[name]):
        if isinstance(entry, dict):
            yield f"{path}: {name}[{i}]", entry
        else:
            problems.add("not a JSON object", f"{path}: {name}[{i}]", entry)


def read_karpathy(path: str, problems: Problems) -> Iterator[Row]:
    """Karpathy's JSON of COCO, Flickr8k or Flickr30k (2015); `restval` joins train."""
    for where, image in entries(read_json(path), "images", path, problems):
        try:
            sentences = image.get("sentences") or []  # test images may have none
            captions = [sentence.get("raw") for sentence in sentences]
            caption_ids = [sentence.get("sentid") for sentence in sentences]
        except (TypeError, AttributeError):
            problems.add("`sentences` is not a list of objects", where)
            continue
        name = image.get("filename")
        if name and image.get("filepath"):
            name = f"{image['filepath']}/{name}"
        split = image.get("split", "")
        if split == "restval":
            split = "train"
        image_id = image.get("cocoid", image.get("imgid"))
        yield where, Record(image_id, name, captions, caption_ids, split=split)


def read_coco(path: str, problems: Problems) -> Iterator[Row]:
    """COCO's caption annotations, one file per split; those of test images have none."""
    content = read_json(path)
    if isinstance(content, dict):
        content["annotations"] = content.get("annotations") or []
    annotations = defaultdict(list)  # repr of an image's id, which may be any JSON value -> its own
    for where, annotation in entries(content, "annotations", path, problems):
        annotations[repr(annotation.get("image_id"))].append((where, annotation))
    for where, image in entries(content, "images", path, problems):
        own = annotations.pop(repr(image.get("id", "")), [])
        captions = [annotation.get("caption") for _, annotation in own]
        caption_ids = [annotation.get("id") for _, annotation in own]
        yield where, Record(image.get("id"), image.get("file_name"), captions, caption_ids)
    for where, annotation in itertools.chain(*annotations.values()):
        image_id = annotation.get("image_id")
        problems.add("caption of an image that is not listed", where, f"image_id {image_id}")


def read_shards(pattern: str, problems: Problems, setting: str) -> Iterator[Row]:
    """Tar shards as img2dataset writes them: KEY.jpg with KEY.txt or KEY.json's "caption".

    `pattern` is a folder of .tar files, or a glob pattern; `setting` is the one that it comes
    from. Nothing is unpacked: images are read in place, from the tar. Members of other types are
    ignored. An image's id is its KEY, or if keys begin anew in each tar, TAR/KEY.
    """
    root = re.match(r"[^*?\[{]*/|", setting)[0]  # names are relative to the fixed part
    if os.path.isdir(pattern):
        if "{" not in setting:
            root = os.path.join(pattern, "")
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError(f"{pattern}: no .tar files")
    rows: list[Row] = []
    for path in paths:
        rows.extend(read_shard(path, path.removeprefix(root), problems))
    is_repeated = len({record.id for _, record in rows}) < len(rows)
    for where, record in rows:
        if is_repeated:
            tar = record.place[0].removeprefix(root).removesuffix(".tar")
            record.id = f"{tar}/{record.id}"
        yield where, record


def read_shard(path: str, name: str, problems: Problems) -> Iterator[Row]:
    """Yield the rows of one tar. An image's file name is NAME/<its name in the tar>."""
    for key, sample in tar_samples(path, problems).items():
        first = next(iter(sample.values()))[0]
        caption = None
        if ".txt" in sample:
            caption = sample[".txt"][2].decode("utf-8-sig", "surrogateescape")
        elif ".json" in sample:
            where, _, text = sample[".json"]
            caption = (json_object(where, text, problems) or {}).get("caption")
        if "image" in sample:
            member = sample.pop("image")[1]
            record = Record(key, f"{name}/{member.name}", [caption])
            record.place = (path, member.offset_data, member.size)
            if caption is None:
                record.captions = []
            if caption is None and sample:
                expected = "KEY.txt or `caption` in KEY.json"
                others = " ".join(sorted(sample))
                record.bad = f"caption: missing (expected {expected}, found {others})"
            yield first, record
        elif ".txt" in sample or ".json" in sample:
            members = ", ".join(member.name for _, member, _ in sample.values())
            problems.add("captions without an image", first, members)


def tar_samples(path: str, problems: Problems) -> dict[str, dict[str, tuple]]:
    """Return a tar's files as {key: {suffix: (where, member, text)}}. The suffix of an image is
    `image`; the text is that of a .txt or .json.

    Links, names that leave the tar, truncated tars and trailing data are problems.
    """
    samples: dict[str, dict] = defaultdict(dict)
    try:
        with tarfile.open(path, "r:") as tar:
            for i, member in enumerate(tar):
                where = f"{path}: member {i}"
                key, suffix = os.path.splitext(os.path.normpath(member.name))
                suffix = suffix.lower()
                is_text = suffix in (".txt", ".json")
                text = b""
                if suffix in IN_TARS:
                    suffix = "image"
                if member.isdir() or MACOS.search(member.name):
                    continue
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    problems.add("file name outside the tar", where, member.name)
                elif not member.isfile() or member.issparse():
                    problems.add("neither a plain file nor a folder", where, member.name)
                elif is_text and member.size > 1 << 20:
                    problems.add("text of more than 1 MiB", where, member.name)
                elif suffix in samples[key]:
                    problems.add("two members of one key and type", where, member.name)
                else:
                    if is_text:
                        text = tar.extractfile(member).read()
                    samples[key][suffix] = (where, member, text)
        with open(path, "rb") as file:  # tarfile stops at what it cannot read, whatever follows
            file.seek(tar.offset)
            rest = file.read(1 << 24)
        if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
            detail = f"no end mark at byte {tar.offset} of {os.path.getsize(path)}"
            problems.add("truncated or concatenated tar (download or write it again)", path, detail)
    except (tarfile.TarError, EOFError) as error:
        problems.add("broken tar", path, f"{error} (if it is compressed, gunzip it first)")
    return samples


READERS = {
    "karpathy": read_karpathy,
    "coco": read_coco,
    "flickr": read_flickr,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "shards": read_shards,
}
SEVERAL_ROWS = ("csv", "jsonl", "flickr")  # formats in which an image may have several rows

# ---------------------------------------------------------------------------------------------
# Downloads. An entry of the setting `downloads` is "URL PATH" or "URL PATH CHECKSUM": a zip, the
# file or folder at its top to unpack and where to, and the zip's MD5 or SHA-256. Without a
# checksum, the SHA-256 is noted as <zip>.json, and a later download must be the same.

TRIES = 8  # consecutive attempts without progress
WAIT = 1.0  # seconds before the second attempt; doubled each time
AGAIN = "deleted; rerun the same command to download it again"
# What zipfile raises on broken zips, and on those that it cannot unpack.
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)


def fetch(cfg) -> None:
    """Download and unpack the archives whose contents are missing, after asking (or --yes).

    Raise UserError if that cannot be done. What has arrived stays, and the next run resumes.
    """
    captions = [Path(cfg.captions.replace("{split}", split)) for split in SPLITS]
    folders = [images_folder(cfg, split) for split in SPLITS]
    missing = []
    for entry in filter(str.strip, cfg.downloads):
        url, name, checksum = [*entry.split(), "", ""][:3]
        path = Path(os.path.expanduser(name))
        if not url.startswith(("http://", "https://")) or not name:
            raise UserError(f"downloads: expected `URL PATH [CHECKSUM]`, got `{entry.strip()}`")
        has_images = not cfg.embeddings and any(map(path.is_relative_to, folders))
        plain, query, _ = url.partition("?")
        archive = path.parent / plain.rstrip("/").rpartition("/")[2]
        if query:  # which may be all that distinguishes two archives
            digest = hashlib.sha256(url.encode()).hexdigest()
            archive = archive.with_name(f"{archive.name}-{digest[:8]}")
        if not path.exists() and (has_images or path in captions):
            missing.append((url, path, checksum, archive))
    if missing:
        ask(missing, cfg.yes)
    for i, (url, path, checksum, archive) in enumerate(missing):
        lock = archive.with_name(f"{archive.name}.lock")
        with owning(lock, f"prepare.py is downloading {archive}"):
            if path.exists():  # another one has done so in the meantime
                continue
            if not archive.is_file():  # one zip may hold what several entries need
                download(url, archive, checksum)
            elif checksum:
                check(url, archive, archive, checksum)
            unpack(archive, path)
            if archive not in [later for *_, later in missing[i + 1 :]]:
                archive.unlink()


def ask(missing: list[tuple], yes: bool) -> None:
    """Show the sizes and ask for consent, unless `yes`. Raise UserError without it."""
    if not shutil.which("curl"):
        raise UserError(f"{missing[0][1]} is missing, and downloading it needs curl: install curl")
    for url, path, *_ in missing:
        size = server_size(url)
        amount = f"{size / 1e6:,.1f} MB" if size else "of unknown size"
        print(f"{url}, {amount}, for {path}", flush=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{missing[0][1]} is missing: add --yes to download it")
    answer = ""
    with contextlib.suppress(EOFError):
        answer = input("download? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was downloaded")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def server_size(url: str) -> int:
    """Return the bytes of a file on a server, 0 if it does not say."""
    command = ["curl", "-fsIL", "--globoff", "--max-time", "60", url]
    reply = subprocess.run(command, capture_output=True, encoding="latin-1")
    final = reply.stdout.split("HTTP/")[-1]  # after redirections
    size = re.search(r"^content-length: *(\d+)", final, re.IGNORECASE | re.MULTILINE)
    return int(size[1]) if size and not reply.returncode else 0


def download(url: str, archive: Path, checksum: str = "") -> None:
    """Download to `archive` by way of <archive>.part, from which a later attempt resumes.

    curl's own --retry is not used: it throws away what the failed attempt has received. If the
    file changed on the server in between, the checksum or the zip's CRC-32s will tell.

    Raise UserError if the server refuses, keeps failing, or sends a file with another checksum.
    """
    part = archive.with_name(archive.name + ".part")
    archive.parent.mkdir(parents=True, exist_ok=True)
    size = server_size(url)
    failures = 0
    while size == 0 or size_of(part) != size:
        before = size_of(part)
        problem = transfer(url, part, size)
        if not problem:
            break
        failures = 0 if size_of(part) > before else failures + 1
        if failures == TRIES:
            hint = "rerun the same command to resume"
            raise UserError(f"{url}: {problem}: gave up after {TRIES} attempts; {hint}")
        wait = WAIT * 2 ** max(0, failures - 1)
        print(f"{url}: {problem}: next attempt in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    check(url, part, archive, checksum)
    os.replace(part, archive)


def transfer(url: str, part: Path, size: int) -> str:
    """Make one attempt to complete `part`. Return what went wrong, empty if nothing did."""
    command = ["curl", "-fL", "--progress-bar", "--globoff", "--connect-timeout", "60",
               "--speed-limit", "1", "--speed-time", "60", "--write-out", "%{http_code}",
               "--continue-at", "-", "--output", part, url]  # fmt: skip
    # A curl that outlives a killed prepare.py keeps the lock on the part that it writes.
    options = {"stdout": subprocess.PIPE, "encoding": "latin-1", "close_fds": False}
    result = subprocess.run(command, **options)
    status = result.stdout
    error = result.returncode
    if error == 23:
        raise UserError(f"{part}: curl cannot write it: free some space, then rerun to resume")
    if error == 22 and status[0] == "4" and status not in ("408", "416", "429"):
        raise UserError(f"{url}: HTTP error {status}: correct the address in `downloads`")
    if error == 33 or status == "416" or 0 < size < size_of(part):
        part.unlink(missing_ok=True)
        return "the server cannot resume this file, starting over"
    if error:
        return f"curl error {error}"
    return "" if size in (0, size_of(part)) else f"{size_of(part)} of {size} bytes arrived"


def check(url: str, file: Path, archive: Path, checksum: str) -> None:
    """Compare a download with its checksum; without one, with the SHA-256 noted the first time.

    Raise UserError, and delete the file, if they differ.
    """
    note = Path(f"{archive}.json")
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "md5" if len(checksum) == 32 else "sha256")
    found = digest.hexdigest()
    expected = checksum.lower()
    hint = AGAIN
    if not checksum:
        if not note.is_file():
            size = file.stat().st_size
            write_text(note, json.dumps({"url": url, "bytes": size, "sha256": found}))
        expected = read_json(note).get("sha256")
        hint = f"deleted; delete {note} too to accept the new file"
    if found != expected:
        file.unlink()
        raise UserError(f"{url}: its checksum is not {expected}: {hint}")


def unpack(archive: Path, path: Path) -> None:
    """Unpack the file or folder `path.name` at the top of a zip to `path`, whole or not at all.

    Raise UserError if it is not there or points outside, or if the disk has no room. A broken zip
    is deleted, and its note, so that the next run downloads it again.
    """
    temporary = path.with_name(path.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [m for m in content.infolist() if m.filename.split("/")[0] == path.name]
            for member in members:
                if ".." in member.filename.split("/") or "\\" in member.filename:
                    raise UserError(f"{archive}: member {member.filename} points outside")
            if not members:
                raise UserError(f"{archive}: holds no {path.name}")
            size = sum(member.file_size for member in members)
            room = shutil.disk_usage(path.parent).free
            if size > room:
                raise UserError(f"{archive}: holds {size} bytes, the disk has room for {room}")
            for member in tqdm(members, desc=f"unpacking {path.name}", unit="file"):
                content.extract(member, temporary)
        os.replace(temporary / path.name, path)
    except BROKEN as error:
        archive.unlink()
        Path(f"{archive}.json").unlink(missing_ok=True)
        raise UserError(f"{archive}: not a zip that can be unpacked: {error}; {AGAIN}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
