"""Downloads, from a server on loopback that breaks: resuming, checksums, consent, hostile zips."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, finish, many, start

import prepare
from configurator import Config
from data import Split
from parts import sources
from parts.common import UserError, owning


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; each of the first `breaks` GETs ends after 1,000 bytes."""

    files: dict[str, bytes] = {}
    asked: list[str | None] = []  # the Range of each GET
    breaks = 0
    ranges = True  # whether it can send a part of a file
    shift = 0  # it sends a part that begins so many bytes later
    length = True  # whether it says how long a part is
    errors: list[int] = []  # the statuses of the first GETs
    dead = False  # closes every connection
    hangs = False  # sends 100,000 bytes and then nothing

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def reply(self, body):
        cls = type(self)
        if cls.dead:
            return self.connection.close()
        if body and cls.errors:
            return self.send_error(cls.errors.pop(0))
        data = cls.files.get(self.path)
        if data is None:
            return self.send_error(404)
        wanted, begin = self.headers.get("Range"), 0
        if body:
            cls.asked.append(wanted)
        if wanted and cls.ranges:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-")) + cls.shift
            if begin >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if cls.length or not wanted:
            self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if not body:
            return
        if cls.breaks or cls.hangs:
            cls.breaks = max(0, cls.breaks - 1)
            self.wfile.write(data[begin : begin + (100_000 if cls.hangs else 1000)])
            self.wfile.flush()
            if cls.hangs:
                self.rfile.read(1)  # until the client is gone
            self.connection.close()
        else:
            self.wfile.write(data[begin:])

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, ValueError):  # the client, or we, closed it
            super().handle()


@pytest.fixture
def server(monkeypatch):
    handler = type("Fresh", (Server,), {"files": {}, "asked": [], "errors": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sources, "WAIT", 0.0)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield handler
        server.shutdown()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as content:
        for name, data in files.items():
            content.writestr(name, data)
    return file.getvalue()


def test_a_broken_download_resumes(here, server):
    """It continues with the byte after the last, however often it breaks: more often than TRIES."""
    data = random.Random(0).randbytes(11500)
    server.files["/x.zip"], server.breaks = data, 11
    sources.download(f"{server.url}/x.zip", Path("d/x.zip"))
    assert Path("d/x.zip").read_bytes() == data
    assert server.asked == [None, *(f"bytes={1000 * i}-" for i in range(1, 12))]
    note = json.loads(Path("d/x.zip.json").read_text())
    assert note["sha256"] == hashlib.sha256(data).hexdigest() and note["bytes"] == 11500
    assert [p.name for p in sorted(Path("d").iterdir())] == ["x.zip", "x.zip.json"]


def test_after_giving_up_the_next_run_resumes(here, server, monkeypatch):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks = data, 1
    monkeypatch.setattr(sources, "TRIES", 1)

    def transfer(*args, real=sources.transfer):
        server.dead = Path("x.zip.part").exists()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "transfer", transfer)
        with pytest.raises(UserError, match="gave up after 1 attempts; rerun .* to resume"):
            sources.download(f"{server.url}/x.zip", Path("x.zip"))
    server.dead = False
    sources.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data and server.asked == [None, "bytes=1000-"]


def test_a_complete_part_of_a_killed_run_is_not_downloaded_again(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"] = data
    Path("x.zip.part").write_bytes(data)
    sources.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data and server.asked == []


def test_without_ranges_it_starts_over(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks, server.ranges = data, 1, False
    sources.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data


def test_a_part_that_is_longer_than_the_file_starts_over(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"] = data
    Path("x.zip.part").write_bytes(b"old" * 3000)
    sources.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data


@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_that_changes_meanwhile_never_ends_up_half_old_half_new(here, server, pinned):
    """The rest of the new file is appended to a part of the old one; no unpacking may accept it."""
    old, new = (zipped({"photos/a": random.Random(i).randbytes(4500)}) for i in range(2))
    checksum = hashlib.sha256(new).hexdigest() if pinned else ""
    options = dict(
        dataset="d", downloads=[f"{server.url}/x.zip raw/photos {checksum}"], images="raw", yes=True
    )
    server.files["/x.zip"], server.breaks = new, 0
    Path("raw").mkdir()
    Path("raw/x.zip.part").write_bytes(old[:1000])
    expected = "its checksum is not" if pinned else "not a zip that can be unpacked: Bad CRC-32"
    with pytest.raises(UserError, match=f"{expected}.*deleted; rerun the same command"):
        sources.fetch(Config(**options))
    assert not list(Path("raw").iterdir())
    sources.fetch(Config(**options))
    assert Path("raw/photos/a").read_bytes() == random.Random(1).randbytes(4500)


def test_a_server_that_sends_another_part_or_no_length(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.breaks, server.shift = data, 1, 500
    sources.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data  # the other part was taken for the whole file
    assert server.asked == [None, "bytes=1000-", None]
    server.breaks, server.shift, server.length = 2, 0, False
    sources.download(f"{server.url}/x.zip", Path("y.zip"))
    assert Path("y.zip").read_bytes() == data  # the end of a broken part passed as the file's end


def test_http_errors_are_retried_unless_they_are_final(here, server):
    data = random.Random(0).randbytes(4500)
    server.files["/x.zip"], server.errors = data, [503, 429, 408]
    sources.download(f"{server.url}/x.zip", Path("x.zip"))
    assert Path("x.zip").read_bytes() == data
    server.errors = [403]
    with pytest.raises(UserError, match="/x.zip: HTTP error 403: correct the address"):
        sources.download(f"{server.url}/x.zip", Path("y.zip"))


def test_a_full_disk_and_a_missing_curl_are_told_in_one_line(here, server, monkeypatch):
    server.files["/x.zip"] = random.Random(0).randbytes(4500)
    Path("x.zip.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="x.zip.part: curl cannot write it: free some space"):
        sources.download(f"{server.url}/x.zip", Path("x.zip"))
    monkeypatch.setenv("PATH", "")
    cfg = Config(dataset="d", downloads=[f"{server.url}/x.zip raw"], images="raw", yes=True)
    with pytest.raises(UserError, match="raw is missing, .* needs curl: install curl"):
        sources.fetch(cfg)


def test_ctrl_c_leaves_no_traceback_and_a_part_to_resume(here, clip, server):
    server.files["/a.zip"], server.hangs = random.Random(0).randbytes(200_000), True
    options = many(here, 6) | {"clip": clip, "images": "raw/photos", "yes": True}
    options["downloads"] = f"{server.url}/a.zip raw/photos"
    process = start(
        "prepare.py", *(f"--{k}={v}" for k, v in options.items()), start_new_session=True
    )  # as in a terminal, where curl gets the signal too
    deadline = time.monotonic() + PATIENCE
    while not Path("raw/a.zip.part").exists() or not Path("raw/a.zip.part").stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, 130)
    assert output.endswith("interrupted\n") and "Traceback" not in output
    assert 0 < Path("raw/a.zip.part").stat().st_size <= 100_000


def test_one_archive_is_downloaded_by_one_process(here, server):
    """Two prepare.py, of datasets that share their images, wrote to one x.zip.part."""
    server.files["/x.zip"] = zipped({"photos/a": b"x"})
    entry = f"{server.url}/x.zip raw/photos"
    cfg = Config(dataset="d", downloads=(entry,), images="raw/photos", yes=True)
    with (
        owning(Path("raw/x.zip.lock"), ""),
        pytest.raises(UserError, match="^another prepare.py is downloading raw/x.zip: wait"),
    ):
        sources.fetch(cfg)
    assert not Path("raw").exists()
    sources.fetch(cfg)
    assert sorted(os.listdir("raw")) == ["photos", "x.zip.json"]


def test_archives_are_distinguished_checked_and_deleted_after_use(here, server):
    server.files |= {"/dl?id=1": zipped({"photos/a": b"x"}), "/dl?id=2": zipped({"x.csv": b"y"})}
    both = [f"{server.url}/dl?id=1 raw/photos", f"{server.url}/dl?id=2 raw/x.csv"]
    options = dict(dataset="d", downloads=both, images="raw/photos", captions="raw/x.csv", yes=True)
    second = server.files.pop("/dl?id=2")
    with pytest.raises(UserError, match="id=2: HTTP error 404"):
        sources.fetch(Config(**options))
    assert [p.suffix for p in sorted(Path("raw").iterdir())] == [".json", ""]  # a note, photos
    server.files["/dl?id=2"] = second
    sources.fetch(Config(**options))
    assert Path("raw/x.csv").read_bytes() == b"y" and len(list(Path("raw").iterdir())) == 4
    server.files["/b.zip"] = zipped({"b": b"right"})
    Path("raw/b.zip").write_bytes(zipped({"b": b"wrong"}))
    checksum = hashlib.sha256(server.files["/b.zip"]).hexdigest()
    options = dict(
        dataset="d", downloads=[f"{server.url}/b.zip raw/b {checksum}"], images="raw/b", yes=True
    )
    with pytest.raises(UserError, match="its checksum is not .*deleted"):
        sources.fetch(Config(**options))
    sources.fetch(Config(**options))
    assert Path("raw/b").read_bytes() == b"right"


def test_checksums(here, server):
    data = zipped({"c.csv": b"x"})
    server.files["/x.zip"] = data
    url, path = f"{server.url}/x.zip", Path("x.zip")
    for name in ("sha256", "md5"):
        sources.download(url, path, hashlib.new(name, data).hexdigest())
    with pytest.raises(UserError, match="its checksum is not 0000"):
        sources.download(url, path, "0" * 64)
    sources.download(url, path)
    server.files["/x.zip"] = zipped({"c.csv": b"y"})
    with pytest.raises(UserError, match="delete x.zip.json too to accept the new file"):
        sources.download(url, path)
    with pytest.raises(UserError, match="404"):
        sources.download(f"{server.url}/none.zip", Path("none.zip"))


def test_prepare_fetches_what_is_missing_after_asking(here, clip, server, monkeypatch, capsys):
    options = many(here, 6) | {"clip": clip, "workers": 0, "images": "raw/photos"}
    names = {f"photos/{p.name}": p.read_bytes() for p in Path("photos").iterdir()}
    names |= {"__MACOSX/photos/x": b"junk", "other.txt": b"not asked for"}
    server.files |= {"/a.zip": zipped(names), "/c.zip": zipped({"x.csv": b"image,caption\n"})}
    shutil.rmtree("photos")
    options["downloads"] = [f"{server.url}/a.zip raw/photos", f"{server.url}/c.zip raw/x.csv", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="raw/photos is missing: add --yes to download it"):
        prepare.main(Config(**options))
    out = capsys.readouterr().out
    assert "/a.zip, 0.0 MB, for raw/photos" in out and "c.zip" not in out  # captions lie elsewhere

    def end(_):
        raise EOFError

    for answer in (lambda _: "n", lambda _: "", end):  # end: Ctrl-D
        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        with pytest.raises(UserError, match="nothing was downloaded"):
            prepare.main(Config(**options))
    assert not Path("raw").exists()
    server.breaks = 2
    prepare.main(Config(**options, yes=True))
    assert len(Split("data/mine", "train")) == 6
    assert sorted(p.name for p in Path("raw").iterdir()) == ["a.zip.json", "photos"]
    server.files.clear()
    prepare.main(Config(**options))  # all is there: nothing is asked


def test_hostile_zips(here, server, monkeypatch):
    def fetch(files, name="photos"):
        Path("a.zip").write_bytes(files if isinstance(files, bytes) else zipped(files))
        sources.unpack(Path("a.zip"), Path("raw") / name)

    Path("raw").mkdir()
    with pytest.raises(UserError, match=r"member photos/../../escape.txt points outside"):
        fetch({"photos/a.txt": b"", "photos/../../escape.txt": b""})
    with pytest.raises(UserError, match=r"points outside"):
        fetch({"photos/..\\escape.txt": b""})
    with pytest.raises(UserError, match="holds no photos"):
        fetch({"../photos/a": b"", "/photos/b": b""})
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4))
        with pytest.raises(UserError, match="holds 5 bytes, the disk has room for 4"):
            fetch({"photos/a": b"12345"})
    text = {"photos/a": b"hello world, " * 5000 + random.Random(0).randbytes(3000)}
    deflated, flipped = bytearray(zipped(text, zipfile.ZIP_DEFLATED)), bytearray(zipped(text))
    flipped[200] ^= 1
    deflated[120:500] = bytes(380)
    for broken in (b"no zip", zipped(text)[:500], deflated, flipped):
        Path("a.zip.json").write_text("{}")
        with pytest.raises(
            UserError, match="not a zip.*deleted; rerun the same command to download it"
        ):
            fetch(bytes(broken))
        assert not Path("a.zip").exists() and not Path("a.zip.json").exists()
    assert not Path("raw/photos").exists() and not Path("escape.txt").exists()
    fetch({"photos/a": b"x"})
    assert Path("raw/photos/a").read_bytes() == b"x"
    with pytest.raises(UserError, match="downloads: expected `URL PATH"):
        sources.fetch(Config(dataset="d", downloads=["file:///etc/passwd x"]))
