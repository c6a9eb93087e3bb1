"""Sources: captions and the names of their images, read from the formats that people have.

    splits = read(cfg)      # {split: [{"id", "file_name", "captions", ...}, ...]}

Everything is looked at before anything is done: files are there, ids are unique, captions are
text of a sane length, no image is in two splits. What is wrong is listed with its line, at most
20 of each kind, and ends in one error. Nothing is left out silently, nothing is unpacked or run,
and no name may point outside the images folder.
"""

import csv
import glob
import json
import os
import random
import re
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import shapes
from configurator import Config, UserError, printable
from data import Tokenizer, read_json

SPLITS = ("train", "val", "test")  # what {split} stands for
LONGEST = 2000  # characters of a caption or a name


class Row(NamedTuple):
    """What a reader yields: an image with captions; several rows of an image add up."""

    where: str  # file:line or the like, for messages
    split: str
    file_name: str
    captions: list
    id: int | str | None = None  # the source's own, where it has one
    caption_ids: list | None = None
    tokens: list | None = None  # each caption's ids, by the user's own tokenizer
    at: tuple | None = None  # (path, offset, size) of the image, if not <images>/<file_name>


class Problems:
    """What is wrong with a source: all are counted, 20 of each kind are kept."""

    def __init__(self):
        self.kinds: dict[str, list] = {}  # kind -> [count, lines]

    def add(self, kind: str, where: str, detail: object = "") -> None:
        known = self.kinds.setdefault(kind, [0, []])
        known[0] += 1
        if known[0] <= 20:
            detail = str(detail)
            detail = detail if len(detail) <= 80 else detail[:79] + "…"
            known[1].append(f"  {where}: {detail}" if detail else f"  {where}")

    def stop(self, source: str) -> None:
        """Lists the problems on stderr and raises UserError, if there are any."""
        for kind, (count, lines) in self.kinds.items():
            more = [f"  and {count - 20} more"] if count > 20 else []
            for line in (f"{kind}: {count}", *lines, *more):
                print(printable(line), file=sys.stderr)
        if self.kinds:
            count = sum(count for count, _ in self.kinds.values())
            plural = "s" if count > 1 else ""
            raise UserError(f"{source}: {count} problem{plural}, listed above; nothing was written")


# ---------------------------------------------------------------------------------------------
# Readers, one a format: each yields Rows and adds to the problems


def files_of(cfg: Config) -> list[tuple[str, str]]:
    """(split, path) of the caption files: without {split} in the setting, one file, of train."""
    if not cfg.captions:
        raise UserError(f"source={cfg.source} needs --captions=FILE")
    found = [(split, cfg.captions.replace("{split}", split)) for split in SPLITS]
    if "{split}" not in cfg.captions:
        return found[:1]
    return [(s, p) for s, p in found if s == "train" or os.path.exists(p) or glob.glob(p)]


def open_text(path: str):
    """Opens UTF-8, with or without a BOM; other bytes become surrogates, refused by `bad_text`."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


KNOWN = ("image", "caption", "id", "split", "tokens")  # columns of a CSV, keys of a JSON line


def read_csv(cfg: Config, problems: Problems) -> Iterator[Row]:
    """CSV with a header: image, caption, optionally id, split and tokens; others are ignored."""
    for split, path in files_of(cfg):
        with open_text(path) as file:
            reader, line, header = csv.reader(file, strict=True), 1, None
            while True:
                where, cells = f"{path}:{line}", []
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    problems.add("malformed CSV", where, error)
                line = reader.line_num + 1
                if header is None:
                    header = [name.strip().lower() for name in cells]
                    if not {"image", "caption"} <= set(header):
                        raise UserError(f"{where}: expected a header with image,caption, "
                                        f"got `{','.join(header)[:60]}`")  # fmt: skip
                    if twice := [name for name in KNOWN if header.count(name) > 1]:
                        raise UserError(f"{where}: two columns are called {twice[0]}")
                elif cells and len(cells) != len(header):
                    told = f"{len(cells)} for {len(header)} columns (a comma without quotes?)"
                    problems.add("wrong number of cells", where, told)
                elif cells:
                    entry = dict(zip(header, cells, strict=True))
                    if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", entry.get("id", "")):
                        entry["id"] = int(entry["id"])
                    yield row_of(entry, split, where)


def read_jsonl(cfg: Config, problems: Problems) -> Iterator[Row]:
    """A JSON object a line: image, caption or captions, and optionally id, split and tokens."""
    for split, path in files_of(cfg):
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    entry = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError) as error:
                    problems.add("not JSON", where, error)
                    continue
                if isinstance(entry, dict) and {"caption", "captions"} <= set(entry):
                    problems.add("both `caption` and `captions`", where)
                elif isinstance(entry, dict):
                    yield row_of(entry, split, where)
                elif line.strip():
                    problems.add("not a JSON object", where, line.strip())


def row_of(entry: dict, split: str, where: str) -> Row:
    """The Row of a CSV's or JSONL's line. One caption has its tokens as text or a list of ids."""
    captions, tokens = entry.get("captions"), entry.get("tokens")
    if not isinstance(captions, list):
        captions, tokens = [entry.get("caption")], None if tokens is None else [tokens]
    return Row(where, entry.get("split", split), entry.get("image"), captions, entry.get("id"),
               tokens=tokens)  # fmt: skip


# Headers of Flickr8k's captions.txt and of Flickr30k's, captions.txt and results.csv.
FLICKR_HEADER = re.compile(r"image(_name)?([,|]) ?(comment_number\2 ?)?(caption|comment)")


def read_flickr(cfg: Config, problems: Problems) -> Iterator[Row]:
    """Flickr8k's and Flickr30k's lines: `name#number<tab>caption`, `name,caption`, or with the
    header that says so `name,number,caption` or `name| number| caption`."""
    for split, path in files_of(cfg):
        comma, columns = ",", 2
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                line, where = line.strip(), f"{path}:{number}"
                if number == 1 and (header := FLICKR_HEADER.fullmatch(line)):
                    comma, columns = header[2], 3 if header[3] else 2
                    continue
                name, tab, caption = line.partition("\t")
                if tab:
                    name = name.rpartition("#")[0] or name
                elif line:
                    cells = line.split(comma, columns - 1)
                    name, caption = cells[0], cells[-1].strip()
                    if len(cells) < columns:
                        problems.add(f"neither a tab nor {columns} columns", where, line)
                        continue
                    if comma == "," and caption[:1] == caption[-1:] == '"':
                        caption = caption[1:-1].replace('""', '"')
                if line:
                    yield Row(where, split, name, [caption])


def entries(content, name: str, path: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    """(where, object) of each object in the list `name` of a JSON file's content."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise UserError(f'{path}: expected an object with a list "{name}"')
    for i, entry in enumerate(content[name]):
        if isinstance(entry, dict):
            yield f"{path}: {name}[{i}]", entry
        else:
            problems.add("not a JSON object", f"{path}: {name}[{i}]", entry)


def read_karpathy(cfg: Config, problems: Problems) -> Iterator[Row]:
    """Karpathy's JSON of COCO, Flickr8k or Flickr30k (2015); `restval` joins train."""
    for _, path in files_of(cfg):
        for where, image in entries(read_json(path), "images", path, problems):
            sentences = image.get("sentences")
            if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
                problems.add("no list of `sentences`", where)
                continue
            split, name, folder = image.get("split"), image.get("filename"), image.get("filepath")
            if isinstance(folder, str) and isinstance(name, str) and folder:
                name = f"{folder}/{name}"
            ids = [s.get("sentid") for s in sentences]
            yield Row(where, "train" if split == "restval" else split, name,
                      [s.get("raw") for s in sentences], image.get("cocoid", image.get("imgid")),
                      None if None in ids else ids)  # fmt: skip


def read_coco(cfg: Config, problems: Problems) -> Iterator[Row]:
    """COCO's caption annotations, one file a split."""
    for split, path in files_of(cfg):
        content, of = read_json(path), {}
        for where, annotation in entries(content, "annotations", path, problems):
            image = annotation.get("image_id")
            if isinstance(image, int | str):
                of.setdefault(image, []).append(annotation)
            else:
                problems.add("annotation without an image_id", where)
        for where, image in entries(content, "images", path, problems):
            known = isinstance(image.get("id"), int | str)
            mine = of.pop(image["id"], []) if known else []
            ids = [a.get("id") for a in mine]
            yield Row(where, split, image.get("file_name"), [a.get("caption") for a in mine],
                      image.get("id"), None if None in ids else ids)  # fmt: skip
        for image in of:
            problems.add("captions of an image that is not listed", path, f"image_id {image}")


def read_shards(cfg: Config, problems: Problems) -> Iterator[Row]:
    """Tar shards as img2dataset writes them: KEY.jpg with KEY.txt or KEY.json's "caption".

    `captions` is a folder of .tar files, or a glob pattern. Nothing is unpacked: images are read
    where they lie in the tar. Members of other kinds are ignored.
    """
    root = re.match(r"[^*?\[{]*/|", cfg.captions)[0]  # names are relative to the fixed part
    for split, pattern in files_of(cfg):
        folder = os.path.isdir(pattern)
        root = os.path.join(pattern, "") if folder and "{" not in cfg.captions else root
        found = sorted(
            glob.glob(os.path.join(glob.escape(pattern), "*.tar") if folder else pattern)
        )
        if not found:
            raise UserError(f"{pattern}: no .tar files")
        for path in found:
            samples: dict[str, dict] = {}  # key -> what is known of it
            for where, member, text in tar_members(path, problems):
                key, kind = os.path.splitext(os.path.normpath(member.name))
                sample, kind = samples.setdefault(key, {"where": where}), kind.lower()
                if kind in (".jpg", ".jpeg", ".png", ".webp"):
                    kind = "image"
                    sample["name"] = f"{path[len(root) :]}/{member.name}"
                    sample["at"] = (path, member.offset_data, member.size)
                if kind in sample:
                    problems.add("two members of one key and kind", where, member.name)
                sample[kind] = text
                if kind == ".json" and text is not None:
                    try:
                        sample["told"] = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        problems.add("not JSON", where, error)
            for key, sample in samples.items():
                told = sample.get("told") if isinstance(sample.get("told"), dict) else {}
                caption = told.get("caption")
                if ".txt" in sample:
                    caption = (sample[".txt"] or b"").decode("utf-8", "surrogateescape")
                if "at" in sample:
                    yield Row(sample["where"], split, sample["name"], [caption],
                              told.get("key") or key, at=sample["at"])  # fmt: skip
                elif ".txt" in sample or ".json" in sample:
                    problems.add("captions without an image", sample["where"], key)


def tar_members(path: str, problems: Problems) -> Iterator[tuple]:
    """(where, member, content of a .txt or .json) of a tar's plain files. Links, names that leave
    it and a tar that is cut or goes on after its end are problems."""
    try:
        with tarfile.open(path, "r:") as tar:
            for i, member in enumerate(tar):
                where, text = f"{path}: member {i}", None
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    problems.add("file name outside the tar", where, member.name)
                elif member.isdir():
                    continue
                elif not member.isfile() or member.issparse():
                    problems.add("neither a plain file nor a folder", where, member.name)
                else:
                    is_text = member.name.lower().endswith((".txt", ".json"))
                    if is_text and member.size > 1 << 20:
                        problems.add("text of more than 1 MiB", where, member.name)
                    elif is_text:
                        text = tar.extractfile(member).read()
                    yield where, member, text
            if not ends_at(path, tar.offset):  # where tarfile stops, whatever follows
                told = f"no end mark at byte {tar.offset} of {os.path.getsize(path)}"
                problems.add("tar that is cut, damaged, or two in one", path, told)
    except (tarfile.TarError, EOFError) as error:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        problems.add("broken tar", path, "compressed: gunzip it first" if packed else error)


def ends_at(path: str, end: int) -> bool:
    """Whether a block of zeros, and nothing but zeros, follows byte `end` of a tar."""
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            return False
        while block and not block.strip(b"\0"):
            block = file.read(1 << 20)
    return not block


READERS = {
    "karpathy": read_karpathy,
    "coco": read_coco,
    "flickr": read_flickr,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "shards": read_shards,
}
ADD_UP = ("csv", "jsonl", "flickr")  # where an image may have several rows

# ---------------------------------------------------------------------------------------------
# Checks


def bad_text(text) -> str:
    """What is wrong with a caption or a name; nothing if it can be used."""
    if not isinstance(text, str):
        return "missing" if text is None else "not text"
    if len(text) > LONGEST:
        return f"more than {LONGEST} characters"
    if text.isprintable() and text.strip():
        return ""
    kinds = {unicodedata.category(c) for c in text}
    if kinds & {"Cc", "Cs"}:
        return "a control character, or not UTF-8"
    return "" if any(c.isprintable() and c != " " for c in text) else "empty"


def bad_split(split) -> bool:  # it becomes part of file names
    return not (isinstance(split, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,40}", split)
                and split != "meta")  # fmt: skip


def bad_id(number) -> bool:
    return type(number) is not int and (not isinstance(number, str) or bool(bad_text(number)))


def folder_of(cfg: Config, split: str) -> str:
    return (cfg.images or str(cfg.data_dir / "images")).replace("{split}", split)


def locate(record: dict, split: str, cfg: Config) -> tuple[str, int, int]:
    """The arguments of `encoder.read_image` for a record's image."""
    folder = folder_of(cfg, record.get("from", split))
    return record.get("at") or (os.path.join(folder, record["file_name"]), 0, -1)


def ids_of(tokens, tokenizer: Tokenizer) -> list[int] | None:
    """A caption's ids, of a list or of text such as `5 12 7` or `[5, 12, 7]`, without bos and eos.

    None if it is neither, or not of the tokenizer's ordinary ids, unk included.
    """
    if isinstance(tokens, str):
        words = tokens.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
        good = all(w.isascii() and w.isdecimal() and len(w) < 10 for w in words)
        tokens = [int(w) for w in words] if good else None
    if not isinstance(tokens, list):
        return None
    tokens = tokens[tokens[:1] == [tokenizer.bos] :]
    tokens = tokens[: len(tokens) - (tokens[-1:] == [tokenizer.eos])]
    special = {tokenizer.pad, tokenizer.bos, tokenizer.eos} - {tokenizer.unk}
    usual = (type(t) is int and 0 <= t < len(tokenizer) and t not in special for t in tokens)
    return tokens if tokens and all(usual) else None


def gather(rows: Iterator[Row], cfg: Config, problems: Problems) -> dict[str, list[dict]]:
    """The rows as records of each split, checked."""
    names: dict[str, dict[str, dict]] = {}  # split -> file name -> record
    roots: dict[str, str] = {}  # split -> images folder
    ids, caption_ids, unnumbered, tokenizer = set(), set(), 0, None
    first: dict[str, bool] = {}  # whether the first row has what all must have, or none
    if cfg.tokenizer:
        tokenizer = Tokenizer(Path(cfg.tokenizer).read_bytes(), cfg.tokenizer)
    for row in rows:
        where, split, name = row.where, row.split, row.file_name
        captions = [" ".join(c.split()) if isinstance(c, str) else c for c in row.captions]
        wrong = [problem for problem in map(bad_text, captions) if problem]
        wrong = wrong if captions else ["none"]
        lenient = bool(row.at) and not cfg.embeddings  # who would repair a line within a tar?
        for problem in () if lenient else wrong:
            problems.add(f"bad caption ({problem})", where)
        if bad_split(split):
            problems.add("bad split name", where, split)
            continue
        if problem := bad_text(name):
            problems.add(f"bad file name ({problem})", where)
            continue
        if split not in names:
            names[split] = {}
            roots[split] = os.path.join(os.path.abspath(folder_of(cfg, split)), "")
        here, root = names[split], roots[split]
        if not os.path.abspath(os.path.join(root, name)).startswith(root):
            problems.add("file name outside the images folder", where, name)
            continue
        path = os.path.normpath(name)
        path = name if path == name else path  # one string less for each of millions
        if any(path in there and roots[other] == root
               for other, there in names.items() if other != split):  # fmt: skip
            problems.add("image in two splits", where, name)
        record = here.get(path)
        if record is None:
            record = here[path] = {"id": row.id, "file_name": name, "captions": []}
            if row.at:
                record["at"] = row.at
                record |= {"bad": f"caption: {wrong[0]}"} if lenient and wrong else {}
            elif not cfg.embeddings and not os.path.isfile(locate(record, split, cfg)[0]):
                problems.add("no such image", where, locate(record, split, cfg)[0])
            key = (split, row.id) if row.at else row.id  # shards count anew in each folder
            if row.id is None:
                unnumbered += 1
            elif bad_id(row.id):
                problems.add("bad id", where, row.id)
            elif key in ids:
                problems.add("id of two images", where, row.id)
            else:
                ids.add(key)
        elif cfg.source not in ADD_UP:
            problems.add("image listed twice", where, name)
        elif row.id is not None and row.id != record["id"]:
            problems.add("image with two ids", where, f"{name}: {row.id}")
        record["captions"] += captions
        with_tokens = row.tokens is not None
        for what, has in (("caption ids for some images", bool(row.caption_ids)),
                          ("tokens for some captions", with_tokens)):  # fmt: skip
            if first.setdefault(what, has) != has:
                problems.add(f"{what} only", where)
        if row.caption_ids:
            record.setdefault("caption_ids", []).extend(row.caption_ids)
            for number in row.caption_ids:
                if bad_id(number) or number in caption_ids:
                    problems.add("caption id bad or used twice", where, number)
                else:
                    caption_ids.add(number)
        if with_tokens and first["tokens for some captions"]:
            if not tokenizer:
                raise UserError(f"{where}: tokens need --tokenizer=FILE, the model that made them")
            given = row.tokens if isinstance(row.tokens, list) else [None]
            tokens = [ids_of(t, tokenizer) for t in given]
            if None in tokens or len(tokens) != len(captions):
                kind = f"bad tokens (expected ids of {cfg.tokenizer}, none of them pad, bos or eos)"
                problems.add(kind, where, row.tokens)
            record.setdefault("tokens", []).extend(tokens)
    splits = {split: list(records.values()) for split, records in names.items()}
    if unnumbered and ids:
        problems.add("images without an id, where others have one", cfg.captions, unnumbered)
    elif unnumbered:
        for number, record in enumerate(r for records in splits.values() for r in records):
            record["id"] = number
    return splits


def scenes(cfg: Config) -> dict[str, list[dict]]:
    """The built-in scenes, rendered into data/<dataset>/images."""
    counts = {"train": cfg.shapes_train, **dict.fromkeys(("val", "test", "novel"), cfg.shapes_eval)}
    splits = shapes.build(cfg.data_dir / "images", counts, cfg.seed)
    for number, record in enumerate(r for records in splits.values() for r in records):
        record["id"] = number
    return splits


def read(cfg: Config) -> dict[str, list[dict]]:
    """The records of each split: "id", "file_name", "captions", and where the source has them
    "caption_ids", "facts" and "tokens". An image of a tar shard has its place in "at" and, if its
    caption cannot be used, the reason in "bad"; one moved to val the split it came from in "from".

    Raises UserError, the problems listed on stderr, where the source cannot be used as it is.
    """
    if cfg.source == "shapes":
        if given := [k for k in ("captions", "images", "embeddings") if getattr(cfg, k)]:
            raise UserError(f"source=shapes renders scenes of its own and takes no {given[0]}: "
                            f"give --source as well, one of {' '.join(READERS)}")  # fmt: skip
        return scenes(cfg)
    problems = Problems()
    splits = gather(READERS[cfg.source](cfg, problems), cfg, problems)
    problems.stop(cfg.captions)
    if not splits.get("train"):
        raise UserError(f"{cfg.captions}: no images in split `train`")
    if "val" not in splits and cfg.val_images:
        train = splits["train"]
        if cfg.val_images >= len(train):
            raise UserError(
                f"val_images={cfg.val_images}, but there are {len(train)} images in all"
            )
        chosen = set(random.Random(cfg.seed).sample(range(len(train)), cfg.val_images))
        splits["train"] = [r for i, r in enumerate(train) if i not in chosen]
        splits["val"] = [{**r, "from": "train"} for i, r in enumerate(train) if i in chosen]
    if "val" not in splits:
        raise UserError(f"{cfg.captions}: no images in split `val`, only in {', '.join(splits)}: "
                        f"--val_images=N moves some of train there")  # fmt: skip
    return splits
