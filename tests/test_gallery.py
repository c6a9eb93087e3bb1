"""The gallery: its data in Python, its page in headless Chromium at two widths."""

import base64
import io
import json
import re
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from helpers import outcome

import gallery
from parts.common import UserError

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028&amp;"
DOT = base64.b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def predictions(n=100):
    """Entries with everything that sample.py writes; CIDEr goes up and down with the index."""
    made = []
    for i in range(n):
        made.append({
            "image_id": i, "caption": f"a dog number {i}", "file_name": f"{i}.png", "path": "",
            "references": [f"the reference of {i}", "another"],
            "tokens": ["▁a", "▁dog", "▁num", "ber", f"▁{i}"],
            "logprobs": [-0.1, -0.7, -0.01, -3.0, -0.2, -0.01],
            "n_best": [{"caption": f"a dog number {i}", "logprob": -4.0},
                       {"caption": "a cat", "logprob": -5.5}],
            "scores": {"bleu": 0.25, "rouge_l": 0.5, "cider": (i * 37 % 100) / 10},
            "facts": {"stated": ["dog: red"], "true": ["dog: red" if i % 4 else "dog: blue"]},
            "attention": [[0.1] + [0.01 * (p == t) for p in range(36)] for t in range(5)],
        })  # fmt: skip
    made[7] |= {"caption": EVIL, "file_name": f"{EVIL}.png", "references": [EVIL], "tokens": [EVIL],
                "logprobs": [-1.0], "attention": [[0.2, 0.3, 0.1]]}  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------
# The data


def data_of(page):
    found = re.search('<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(found[1])


def test_whatever_the_strings_hold_the_page_stays_whole(tmp_path):
    page = tmp_path / "gallery.html"
    odd = "\ud800 {{data}} <!-- <script> \u2028\u2029 ]]> é 日本"
    gallery.write([{"image_id": odd, "caption": EVIL, "references": [odd]}], page, title=EVIL)
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 2
    data = data_of(page)
    assert data["title"] == EVIL and data["images"][0]["caption"] == EVIL
    assert data["images"][0]["image_id"] == odd and data["images"][0]["references"] == [odd]


def test_images_are_embedded_as_they_are_or_as_thumbnails(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="needs requirements-clip.txt")
    (tmp_path / "small.png").write_bytes(DOT)
    image_module.effect_noise((900, 600), 90).convert("RGB").save(tmp_path / "large.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 50_000)
    (tmp_path / "text.png").write_text("not an image")
    names = ["small.png", "large.jpg", "broken.jpg", "text.png", "absent.png", "x" * 9999, "\0"]
    entries = [{"image_id": n, "caption": "x", "file_name": n} for n in names]

    missing = gallery.write(entries, tmp_path / "page.html", images_root=tmp_path)
    assert missing == ["broken.jpg", "text.png", "absent.png", "x" * 9999, "\0"]
    small, large, *others = (image["src"] for image in data_of(tmp_path / "page.html")["images"])
    assert base64.b64decode(small.removeprefix("data:image/png;base64,")) == DOT
    thumbnail = base64.b64decode(large.removeprefix("data:image/jpeg;base64,"))
    assert image_module.open(io.BytesIO(thumbnail)).size == (320, 213)
    assert others == [""] * 5

    gallery.write(entries, tmp_path / "a #1.html", images_root=tmp_path, external=True)
    small = data_of(tmp_path / "a #1.html")["images"][0]["src"]
    assert small == "a%20%231_files/00000.png"
    assert (tmp_path / "a #1_files" / "00000.png").read_bytes() == DOT


def test_a_thumbnail_of_16_bits_is_scaled_not_clipped(tmp_path):
    """It was white: all values above 255 were."""
    image_module = pytest.importorskip("PIL.Image", reason="needs requirements-clip.txt")
    grey = np.random.default_rng(0).integers(20_000, 30_000, (300, 300)).astype(np.uint16)
    image_module.fromarray(grey).save(tmp_path / "16.png")
    kind, content = gallery.thumbnail(tmp_path / "16.png")
    shown = np.asarray(image_module.open(io.BytesIO(content)))
    assert kind == "jpeg" and shown.mean() == pytest.approx(25_000 / 256, abs=1)


def test_attention_survives_packing_and_a_grid_is_recognised_by_its_size():
    weights = [[0.5, 0.25, 0.0, 0.125], [0.0, 0.0, 0.0, 0.0], [float("nan"), 0.1, 0.2, 0.3]]
    packed = gallery.pack_attention(weights, None)
    scaled = list(base64.b64decode(packed["bytes"]))
    for i, row in enumerate(weights):
        for p, weight in enumerate(row):
            unpacked = scaled[4 * i + p] / 255 * packed["largest"][i]
            assert unpacked == pytest.approx(0 if weight != weight else weight, abs=0.5 / 255)

    def grid(P, given=None):
        return gallery.pack_attention([[0.1] * P], given)["grid"]

    assert list(map(grid, (1, 10, 16, 17, 36, 37, 38, 49, 50))) == [0, 0, 4, 4, 6, 6, 0, 7, 7]
    assert grid(10, given=3) == 3  # if the entry says so
    assert grid(50, given=0) == 0
    assert grid(16, given=5) == 0 and grid(16, given=-4) == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 1}, "lacks image_id or caption"),
        ("text", "lacks image_id or caption"),
        ({"image_id": 1, "caption": None}, "caption is malformed"),
        ({"image_id": [1], "caption": "x"}, "image_id is malformed"),
        ({"image_id": 1, "caption": "x", "file_name": 1}, "file_name is malformed"),
        ({"image_id": 1, "caption": "x", "references": "x"}, "references is malformed"),
        ({"image_id": 1, "caption": "x", "references": None}, "references is malformed"),
        ({"image_id": 1, "caption": "x", "tokens": [1]}, "tokens is malformed"),
        ({"image_id": 1, "caption": "x", "logprobs": [None]}, "logprobs is malformed"),
        ({"image_id": 1, "caption": "x", "scores": {"cider": "1"}}, "scores is malformed"),
        ({"image_id": 1, "caption": "x", "scores": [1]}, "scores is malformed"),
        ({"image_id": 1, "caption": "x", "n_best": [{"caption": "x"}]}, "n_best is malformed"),
        ({"image_id": 1, "caption": "x", "facts": {"stated": []}}, "facts is malformed"),
        ({"image_id": 1, "caption": "x", "attention": [[1], [1, 2]]}, "attention is malformed"),
        ({"image_id": 1, "caption": "x", "attention": [1, 2]}, "attention is malformed"),
        ({"image_id": 1, "caption": "x", "attention": [[10**400]]}, "attention is malformed"),
        ({"image_id": 1, "caption": "x", "grid": "6"}, "grid is malformed"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, capfd, entry, message):
    source = tmp_path / "results.json"
    source.write_text(json.dumps([{"image_id": 0, "caption": "fine"}, entry]))
    status, _, err = outcome("gallery.py", [str(source)], capfd)
    assert status == 1 and len(err.splitlines()) == 1
    assert err.startswith(f"{source}: entry 1") and message in err
    assert not (tmp_path / "gallery.html").exists()
    with pytest.raises(UserError, match=message):
        gallery.write(json.loads(source.read_text()), tmp_path / "gallery.html")


def test_the_command_reads_a_plain_coco_file_and_reports_mistakes(tmp_path, capfd):
    source = tmp_path / "results.json"
    source.write_text(json.dumps([{"image_id": 42, "caption": "a dog", "score": 0.5}]))
    assert outcome("gallery.py", [str(source)], capfd)[0] == 0
    assert data_of(tmp_path / "gallery.html") == {
        "title": str(source),
        "images": [{"image_id": 42, "caption": "a dog", "src": ""}],
    }
    for text, message in (("{", "not valid JSON"), ("[]", "expected a list"), ("{}", "a list")):
        source.write_text(text)
        with pytest.raises(UserError, match=message):
            gallery.main(gallery.GalleryConfig(str(source)))
    with pytest.raises(UserError, match="not found"):
        gallery.main(gallery.GalleryConfig(str(tmp_path / "absent.json")))


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    entry = {"image_id": 1, "caption": "x", "logprobs": [float("nan"), float("-inf"), -1.23456]}
    gallery.write([entry], tmp_path / "page.html")
    assert data_of(tmp_path / "page.html")["images"][0]["logprobs"] == [None, None, -1.2346]


# ---------------------------------------------------------------------------------------------
# The page


class Browser:
    """Headless Chromium, driven over HTTP through chromedriver's WebDriver protocol."""

    def __init__(self, profile, width, height, phone):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE)
        for line in self.driver.stdout:
            if found := re.search(rb"successfully on port (\d+)", line):
                self.url = f"http://127.0.0.1:{found[1].decode()}/session"
                break
        flags = (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-dev-shm-usage "
            f"disable-background-networking disable-component-update disable-sync "
            f"window-size={width},{height} user-data-dir={profile}"
        )
        options = {"args": [f"--{flag}" for flag in flags.split()]}
        if phone:
            size = {"width": width, "height": height, "pixelRatio": 2}
            options["mobileEmulation"] = {"deviceMetrics": size}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.post("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def post(self, path, method="POST", **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def js(self, script, *args):
        return self.post("/execute/sync", script=script, args=args)

    def wait(self, script, expected):
        for _ in range(100):
            if (found := self.js(script)) == expected:
                return
            time.sleep(0.1)
        raise AssertionError(f"{script}: {found!r}, not {expected!r}, after 10 seconds")

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.js(script, selector)

    def click(self, selector):
        found = self.post("/element", using="css selector", value=selector)
        self.post(f"/element/{next(iter(found.values()))}/click")

    def type(self, text):
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def log(self):
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def close(self):
        self.post("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()


ENTER, ESCAPE, TAB, LEFT, RIGHT = "\ue007", "\ue00c", "\ue004", "\ue012", "\ue014"


def test_the_heat_map_lies_on_what_the_encoder_saw(tmp_path):
    """CLIP crops an image to a square, SigLIP squeezes it into one."""
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver: apt-get install chromium chromium-driver")
    image = pytest.importorskip("PIL.Image", reason="needs requirements-clip.txt")
    image.new("RGB", (400, 200), "red").save(tmp_path / "wide.png")
    entry = {"file_name": "wide.png", "caption": "a", "tokens": ["a"], "logprobs": [-0.1]}
    entry |= {"attention": [[0.25] * 4], "grid": 2}
    entries = [entry | {"image_id": i, "uncropped": bool(i)} for i in range(2)]
    gallery.write(entries, tmp_path / "page.html", images_root=tmp_path)
    browser = Browser(tmp_path / "profile", 1280, 900, False)
    try:
        browser.post("/url", url=(tmp_path / "page.html").as_uri())
        for i, ratio in enumerate((1, 2)):
            browser.click(f"#cards li:nth-child({i + 1}) .card")
            browser.wait("return document.querySelector('#heat').style.height !== ''", True)
            style = "parseFloat(document.querySelector('#heat').style[side])"
            size = browser.js(f"return ['width', 'height'].map((side) => {style})")
            assert size[0] == pytest.approx(ratio * size[1], rel=0.02) and size[1] > 50
            browser.type(ESCAPE)
    finally:
        browser.close()


@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)])
def test_in_a_browser(tmp_path, width, height, phone):
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver: apt-get install chromium chromium-driver")
    entries = predictions()
    (tmp_path / "0.png").write_bytes(DOT)
    gallery.write(entries, tmp_path / "page.html", title=EVIL, images_root=tmp_path)
    browser = Browser(tmp_path / "profile", width, height, phone)
    try:
        browser.post("/url", url=(tmp_path / "page.html").as_uri())
        look_around(browser, entries, width)
        assert browser.log() == []
    finally:
        browser.close()


def look_around(browser, entries, width):
    by_cider = sorted(entries, key=lambda entry: entry["scores"]["cider"])
    captions = ".card > .caption"

    # Script-like strings are text. Cards are made as they are needed.
    assert browser.texts("h1") == [EVIL] and browser.js("return document.title") != "owned"
    assert browser.texts(captions)[:60] == [entry["caption"] for entry in entries[:60]]
    assert browser.js("return document.images.length") == 1
    assert browser.js("return document.images[0].naturalWidth") == 1
    assert browser.texts(".card .picture")[7] == f"{EVIL}.png"
    assert browser.js("return document.documentElement.scrollWidth") <= width
    browser.js("scrollTo(0, 1e6)")
    browser.wait("return document.querySelectorAll('.card > .caption').length", 100)

    # Order.
    browser.js("document.querySelector('[value=best]').click()")
    assert browser.texts(captions)[:3] == [entry["caption"] for entry in by_cider[:-4:-1]]
    browser.js("document.querySelector('[value=worst]').click()")
    assert browser.texts(captions)[:3] == [entry["caption"] for entry in by_cider[:3]]
    browser.js("document.querySelector('[value=random]').click()")
    first = browser.texts(captions)[:60]
    browser.js("document.querySelector('[value=random]').click()")
    assert browser.texts(captions)[:60] != first
    browser.js("document.querySelector('[value=input]').click()")

    # Search and filters, in captions and references.
    browser.js("scrollTo(0, 0)")
    browser.click("#search")
    browser.type("REFERENCE 42")
    assert browser.texts(captions) == ["a dog number 42"]
    assert browser.texts("#summary")[0].startswith("1 of 100 images · mean CIDEr 5.400")
    set_value = "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
    set_value += "e.dispatchEvent(new Event('input'))"
    browser.js(set_value, "#search", "<script>")
    assert browser.texts(captions) == [EVIL]
    browser.js(set_value, "#search", "")
    browser.js(set_value, "#truth", "wrong")
    assert browser.texts("#summary")[0].startswith("25 of 100 images")
    browser.js(set_value, "#truth", "all")
    browser.js(set_value, "#low", "9.5")
    assert sorted(browser.texts(captions)) == sorted(e["caption"] for e in by_cider[-5:])
    browser.js(set_value, "#low", "")

    # Details, by keyboard: right to the second card, open, a token, the next image, close.
    browser.js("document.querySelector('.card').focus()")
    browser.type(RIGHT + ENTER)
    assert browser.js("return document.querySelector('#dialog').open")
    assert browser.texts("#heading") == ["a dog number 1"]
    assert browser.texts("#tokens b") == ["a", "dog", "num", "ber", "1", "end"]
    assert browser.texts("#tokens small") == ["90 %", "50 %", "99 %", "5.0 %", "82 %", "99 %"]
    assert browser.texts("dd") == ["0.250", "0.500", "3.700"]
    lists = browser.texts(".list li")
    assert lists == ["the reference of 1", "another", "a dog number 1-4.00", "a cat-5.50"]
    browser.type(TAB + TAB)
    assert browser.texts("[aria-pressed=true] b") == ["dog"]
    assert browser.texts("#read") == [
        "“dog”: 11 % of its attention is on the image; 10 % on the class token; "
        "most at row 1, column 2."
    ]
    opacity = "return [...document.querySelector('#heat').getContext('2d')"
    opacity += ".getImageData(0, 0, 6, 6).data].filter((_, i) => i % 4 == 3)"
    opaque = browser.js(opacity)
    assert len(opaque) == 36 and [i for i, a in enumerate(opaque) if a] == [1]
    browser.type(RIGHT)
    assert browser.texts("#heading") == ["a dog number 2"]
    browser.type(RIGHT * 5)
    assert browser.texts("#heading") == [EVIL] and browser.texts("#tokens b")[0] == EVIL
    assert browser.js("return document.querySelectorAll('#bars i').length") == 3
    assert browser.js("return document.querySelector('#dialog').scrollWidth") <= width
    browser.type(LEFT)
    assert browser.texts("#heading") == ["a dog number 6"]
    browser.type(ESCAPE)
    assert not browser.js("return document.querySelector('#dialog').open")
    focused = "return document.activeElement.querySelector('.caption').textContent"
    browser.wait(focused, "a dog number 6")  # set by the close event, which comes a little later

    # And by pointer.
    browser.js("scrollTo(0, 0)")
    browser.click("#cards li:nth-child(2) .card")
    assert browser.texts("#heading") == ["a dog number 1"]
    browser.click("#next")
    browser.click("#tokens .word:nth-child(3) .token:nth-child(2)")
    assert browser.texts("[aria-pressed=true] b") == ["ber"]
    browser.click("#close")
    assert not browser.js("return document.querySelector('#dialog').open")


def test_five_thousand_images_open_in_under_three_seconds(tmp_path):
    """With thumbnails next to the page. The best of three, as the machine may be busy."""
    image_module = pytest.importorskip("PIL.Image", reason="needs requirements-clip.txt")
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver: apt-get install chromium chromium-driver")
    entries = predictions(5000)
    for i, entry in enumerate(entries):
        entry["file_name"] = f"{i % 50}.jpg"
        if i < 50:
            image_module.effect_noise((320, 240), 60).save(tmp_path / f"{i}.jpg", quality=40)
    page = tmp_path / "page.html"
    assert gallery.write(entries, page, images_root=tmp_path, external=True) == []
    browser, took = Browser(tmp_path / "profile", 1280, 900, False), []
    try:
        for _ in range(3):
            browser.post("/url", url=page.as_uri())
            browser.js("return new Promise(done => setTimeout(done, 100))")
            loaded = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
            took.append(browser.js(loaded) / 1000)
            assert browser.texts("#summary")[0].startswith("5,000 images")
            assert browser.js("return document.images[0].naturalWidth") == 320
    finally:
        browser.close()
    print("seconds until loaded:", *took)
    assert 0 < min(took) < 3
