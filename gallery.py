"""Turns the predictions of sample.py into one HTML page: images, captions, scores, attention.

    python gallery.py predictions.json                     # gallery.html beside it, all in one file
    python gallery.py predictions.json --images=Images     # where to look for the image files
    python gallery.py predictions.json --external          # thumbnails in a folder beside the page

Any COCO result file will do. What else an entry may hold, and the page then shows, is in `KINDS`.
The page itself, with its style and script, is `assets/gallery.html`; here its data are made.
"""

import base64
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure, read_flags, run

TEMPLATE = Path(__file__).parent / "assets" / "gallery.html"
SIDE = 320  # pixels, the longer side of a thumbnail
SMALL = 40_000  # bytes; a smaller image is shown as it is


@dataclass(frozen=True)
class GalleryConfig:
    """Settings of `python gallery.py`."""

    predictions: str  # of sample.py, or any COCO result file; --predictions= may be left out
    out: str = ""  # the page; empty: gallery.html beside the predictions
    images: str = ""  # folder in which the images are looked for first
    external: bool = False  # thumbnails in a folder beside the page, for thousands of images
    title: str = ""  # of the page; empty: the path of the predictions


# ---------------------------------------------------------------------------------------------
# Reading and checking


def text(x) -> bool:
    return isinstance(x, str)


def texts(x) -> bool:
    return isinstance(x, list) and all(map(text, x))


def numbers(x) -> bool:
    return isinstance(x, list) and all(isinstance(i, int | float) for i in x)


def scores(x) -> bool:
    return isinstance(x, dict) and numbers(list(x.values()))


def facts(x) -> bool:
    return isinstance(x, dict) and texts(x.get("stated")) and texts(x.get("true"))


def n_best(x) -> bool:
    return isinstance(x, list) and all(
        isinstance(i, dict) and text(i.get("caption")) and numbers([i.get("logprob")]) for i in x
    )


def table(x) -> bool:
    return isinstance(x, list) and all(map(numbers, x)) and len(set(map(len, x))) <= 1


KINDS = {  # of an entry of predictions.json; all but image_id and caption may be absent
    "image_id": (lambda x: isinstance(x, int | str), "a number or a string"),
    "caption": (text, "a string"),
    "file_name": (text, "a string"),
    "path": (text, "a string"),  # of the image file
    "references": (texts, "a list of strings"),
    "tokens": (texts, "a list of strings"),  # the caption's
    "logprobs": (numbers, "a list of numbers"),  # of each token, in nats, and perhaps of the end
    "n_best": (n_best, "a list of {caption, logprob}"),
    "scores": (scores, "a dict of numbers"),  # bleu, rouge_l, cider
    "facts": (facts, "{stated, true}, two lists of strings"),
    "attention": (table, "as many numbers for each token"),  # over the P prefix positions
    "grid": (lambda x: x in range(1000), "a whole number"),  # patches a side, 0 = none
}


def check(predictions, where: str = "predictions") -> None:
    """Raises UserError, which names the first entry of `predictions` that a page cannot show."""
    if not isinstance(predictions, list) or not predictions:
        raise UserError(f"{where}: expected a list of captions, as sample.py or COCO tools write")
    for n, entry in enumerate(predictions):
        if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
            raise UserError(f"{where}: entry {n} lacks image_id or caption")
        for name, (fits, expected) in KINDS.items():
            if name in entry and not fits(entry[name]):
                raise UserError(f"{where}: entry {n}: expected {name} to be {expected}")


def read(path: str) -> list[dict]:
    """The content of a predictions.json. Raises UserError."""
    try:
        predictions = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} not found: `python sample.py` writes it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    check(predictions, path)
    return predictions


# ---------------------------------------------------------------------------------------------
# Images

SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def find(entry: dict, folder: str) -> Path | None:
    """The image file of an entry: its path or file_name, in `folder` or else from here."""
    names = [entry[name] for name in ("path", "file_name") if entry.get(name)]
    tries = [Path(folder) / name for name in names] if folder else []
    tries += [Path(name) for name in names]
    return next((path for path in tries if os.path.isfile(path)), None)  # False for any odd name


def thumbnail(path: Path) -> tuple[str, bytes] | None:
    """The kind and bytes of an image of at most SIDE pixels a side, or None where it is broken.

    A file that is small, or all files where pillow is missing, are taken as they are.
    """
    content = path.read_bytes()
    kind = next((k for start, k in SIGNATURES.items() if content.startswith(start)), None)
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return kind and (kind, content)
    if kind and len(content) <= SMALL:
        return kind, content
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at no more than it needs
            image = ImageOps.exif_transpose(image)
            image.thumbnail((SIDE, SIDE))
            kind = "png" if image.has_transparency_data else "jpeg"
            out = io.BytesIO()
            image.convert("RGBA" if kind == "png" else "RGB").save(out, kind, quality=82)
            return kind, out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


# ---------------------------------------------------------------------------------------------
# The page's data


def finite(value):
    """`value`, with None for each NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def side_of(P: int) -> int:
    """Patches a side of P prefix positions that are a grid, with or without a class token; else 0.

    Ten embeddings of a pooled image are not a class token and 3 x 3: such small grids must say so.
    """
    side = math.isqrt(P)
    return side if side >= 4 and P - side * side in (0, 1) else 0


def packed(attention: list[list[float]], grid: int | None) -> dict:
    """Attention (tokens, P) as one byte a weight, scaled by each token's largest."""
    weights = np.nan_to_num(np.asarray(attention, np.float64)).clip(0, 1)
    P = weights.shape[1]
    largest = weights.max(1)
    scaled = np.rint(255 * weights / np.maximum(largest, 1e-12)[:, None]).astype(np.uint8)
    if grid is None:
        grid = side_of(P)
    elif P - grid * grid not in (0, 1):
        grid = 0
    return {
        "P": P,
        "grid": grid,
        "largest": largest.round(4).tolist(),
        "bytes": base64.b64encode(scaled.tobytes()).decode(),
    }


def record(entry: dict, image: str) -> dict:
    """What the page knows of an image; `image` is the address of its picture, or empty."""
    shown = {name: entry[name] for name in KINDS if entry.get(name) not in (None, [], {}, "")}
    attention, grid = shown.pop("attention", None), entry.get("grid")
    if attention and attention[0]:
        shown["attention"] = packed(attention, grid)
    return finite(
        shown | {"image_id": entry["image_id"], "caption": entry["caption"], "src": image}
    )


def embed(data) -> str:
    """JSON that may stand in a <script>, whatever its strings hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # and ASCII, so no U+2028
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write(
    predictions: Sequence[dict], path: Path | str, *,
    title: str = "", images_root: Path | str = "", external: bool = False,
) -> list[str]:  # fmt: skip
    """Writes the page of some predictions, entries as in KINDS, to `path`.

    Images are looked for in `images_root` first. They become data URIs, or with `external` files
    in the folder <page>_files, which must stay beside the page.

    Returns the names of the images that were not found or are broken; the page shows them without
    a picture. Raises UserError.
    """
    predictions, page = list(predictions), Path(path)
    check(predictions)
    folder = page.with_name(f"{page.stem}_files")
    (folder if external else page.parent).mkdir(parents=True, exist_ok=True)
    records, missing = [], []
    for n, entry in enumerate(tqdm(predictions, desc=page.name, unit="image")):
        found = find(entry, str(images_root))
        picture, address = found and thumbnail(found), ""
        if picture and external:
            name = f"{n:05d}.{picture[0]}"
            (folder / name).write_bytes(picture[1])
            address = quote(f"{folder.name}/{name}")
        elif picture:
            address = f"data:image/{picture[0]};base64,{base64.b64encode(picture[1]).decode()}"
        elif entry.get("path") or entry.get("file_name"):
            missing.append(entry.get("path") or entry["file_name"])
        records.append(record(entry, address))
    head, mark, tail = TEMPLATE.read_text(encoding="utf-8").partition("{{data}}")
    assert mark, "the template has no place for the data"
    data = embed({"title": title or "Captions", "images": records})
    page.write_text(head + data + tail, encoding="utf-8")
    return missing


# ---------------------------------------------------------------------------------------------
# The command


def main(cfg: GalleryConfig) -> None:
    page = Path(cfg.out) if cfg.out else Path(cfg.predictions).with_name("gallery.html")
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"images={cfg.images}: no such folder")
    missing = write(read(cfg.predictions), page, title=cfg.title or cfg.predictions,
                    images_root=cfg.images, external=cfg.external)  # fmt: skip
    if missing:
        some = ", ".join(missing[:3])
        print(f"{len(missing)} images not found or broken, such as {some}", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    argv = sys.argv[1:]
    paths = [] if "-h" in argv else read_flags(GalleryConfig, argv)[0]
    argv = [f"--predictions={arg}" if arg in paths[:1] else arg for arg in argv]
    run(main, configure(GalleryConfig, argv, __doc__, files=False))
