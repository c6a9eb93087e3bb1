"""Fetches the archives that a config names in `downloads`, where what they hold is missing.

Entries are "URL PATH" or "URL PATH CHECKSUM", with semicolons between: a zip file, the file or
folder that it holds at its top and where that goes, and the zip's MD5 or SHA-256. An entry is
needed if PATH does not exist and `captions` or `images` lies there. Sizes are shown and consent is
asked for (or --yes); the zip is deleted when it is unpacked.

A broken download goes on from where it was, in this run or the next. Without a checksum in the
config, a file is checked by its size and, in unpacking, by the zip's own CRC-32s; its SHA-256 is
noted in PATH's folder as <zip>.json, and a later download of it must be the same.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from configurator import Config, UserError
from data import naming, read_json, write_text
from sources import SPLITS

TRIES = 8  # in a row without a byte
WAIT = 1.0  # seconds before the second try; doubled each time
# What zipfile raises on broken zips, and on those that it cannot unpack.
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)


def fetch(cfg: Config) -> None:
    """Downloads and unpacks what is missing. Raises UserError where that cannot be done."""
    missing = []
    for entry in filter(str.strip, cfg.downloads.split(";")):
        url, path, checksum = (entry.split() + ["", ""])[:3]
        if not url.startswith(("http://", "https://")) or not path:
            raise UserError(f"downloads: expected `URL PATH [CHECKSUM]`, got `{entry.strip()}`")
        path, needed = Path(path), []
        for split in SPLITS:
            needed += [Path(cfg.captions.replace("{split}", split)) == path]
            folder = Path(cfg.images.replace("{split}", split))
            needed += [bool(cfg.images) and not cfg.embeddings and folder in (path, *path.parents)]
        if any(needed) and not path.exists():
            missing.append((url, path, checksum))
    if not missing:
        return
    for url, path, _ in missing:
        size = size_of(url)
        told = f"{size / 1e6:,.1f} MB" if size else "of unknown size"
        print(f"{url}, {told}, for {path}")
    if not cfg.yes:
        if not sys.stdin.isatty():
            raise UserError(f"{missing[0][1]} is missing: add --yes to download it")
        answer = ""
        with contextlib.suppress(EOFError):
            answer = input("download? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise UserError("nothing was downloaded")
    archives = [path.parent / archive_name(url) for url, path, _ in missing]
    for i, ((url, path, checksum), archive) in enumerate(zip(missing, archives, strict=True)):
        if not archive.is_file():  # one zip may hold what several entries need
            download(url, archive, checksum)
        elif checksum:
            check(url, archive, note_of(archive), {}, checksum)
        unpack(archive, path)
        if archive not in archives[i + 1 :]:
            archive.unlink()


def archive_name(url: str) -> str:
    """What a URL's archive is called: its last part, made distinct where it has a query."""
    plain, query, _ = url.partition("?")
    name = plain.rstrip("/").rpartition("/")[2]
    return f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}" if query else name


def note_of(archive: Path) -> Path:
    """Where an archive's size and SHA-256 are noted."""
    return archive.with_name(f"{archive.name}.json")


def size_of(url: str) -> int:
    """The bytes of a file on a server; 0 where it does not tell."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=60
        ) as reply:
            return int(reply.headers.get("Content-Length") or 0)
    except (OSError, http.client.HTTPException, ValueError):
        return 0


def download(url: str, path: Path, checksum: str = "") -> None:
    """Downloads to `path`, by way of <path>.part, which a broken download leaves to go on from."""
    part, note = path.with_name(path.name + ".part"), note_of(path)
    known = read_json(note) if note.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        have = part.stat().st_size if part.is_file() else 0
        if have and have == known.get("size"):
            break
        try:
            size = request(url, part, note, known, have)
            if part.stat().st_size == size or size == -1:
                break
            problem = f"{part.stat().st_size} of {size} bytes came"
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            if error.code == 416:  # the server's file is not the one that was begun
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url}: {problem}") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = str(error) or type(error).__name__
        came = (part.stat().st_size if part.is_file() else 0) > have
        failures = 0 if came else failures + 1
        if failures == TRIES:
            raise UserError(f"{url}: {problem}: tried {TRIES} times; the same command goes on")
        wait = WAIT * 2 ** max(0, failures - 1)
        print(f"{url}: {problem}: trying again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    check(url, part, note, known, checksum)
    os.replace(part, path)


def request(url: str, part: Path, note: Path, known: dict, have: int) -> int:
    """One try: appends to `part`, of `have` bytes, what comes. Returns the whole file's size, or
    -1 where the server does not tell."""
    headers = {"User-Agent": "nanoCaption"}
    if have and known.get("validator"):  # the rest, if the file is still the same; else all
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if reply.status == 206:
            if not told or int(told[1]) != have:
                part.unlink()  # from the beginning
                raise http.client.HTTPException("another part came than was asked for")
            size = int(told[2])
        else:
            have, size = 0, int(reply.headers.get("Content-Length", -1))
        known["size"] = size
        tag = reply.headers.get("ETag", "")
        known["validator"] = tag if tag.startswith('"') else reply.headers.get("Last-Modified", "")
        write_text(note, json.dumps(known))
        bar = tqdm(total=max(size, 0) or None, initial=have, unit="B", unit_scale=True,
                   desc=part.stem)  # fmt: skip
        with bar, naming(part), open(part, "ab" if have else "wb") as file:
            while block := reply.read(1 << 18):
                file.write(block)
                bar.update(len(block))
    return size


def check(url: str, part: Path, note: Path, known: dict, checksum: str) -> None:
    """Compares a download with its checksum, or with the one noted the first time."""
    found = {}
    for name in ("sha256", "md5") if len(checksum) == 32 else ("sha256",):
        with open(part, "rb") as file:
            found[name] = hashlib.file_digest(file, name).hexdigest()
    expected = checksum or known.get("sha256", found["sha256"])
    if expected.lower() not in found.values():
        part.unlink()
        hint = "the same command fetches it again"
        hint = hint if checksum else f"delete {note} to accept the new file"
        raise UserError(f"{url}: its checksum is not {expected}: deleted; {hint}")
    size = part.stat().st_size
    write_text(note, json.dumps({"url": url, "bytes": size, "sha256": found["sha256"]}))


def unpack(archive: Path, path: Path) -> None:
    """Takes the file or folder called `path.name` from the top of a zip to `path`, whole or not
    at all. Raises UserError where it is not there, points outside, or the disk has no room. A
    broken zip is deleted, with its note, so that the next run fetches it anew."""
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
            size, room = sum(m.file_size for m in members), shutil.disk_usage(path.parent).free
            if size > room:
                raise UserError(f"{archive}: holds {size} bytes, the disk has room for {room}")
            for member in tqdm(members, desc=f"unpacking {path.name}", unit="file"):
                content.extract(member, temporary)
    except BROKEN as error:
        archive.unlink()
        note_of(archive).unlink(missing_ok=True)
        told = f"not a zip that can be unpacked: {error}"
        raise UserError(f"{archive}: {told}; deleted, the same command fetches it again") from None
    else:
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
