"""Turn the predictions of sample.py into one HTML page: images, captions, scores, attention.

    python gallery.py predictions.json                     # gallery.html next to it, in one file
    python gallery.py predictions.json --images=Images     # where to look for the image files
    python gallery.py predictions.json --external          # thumbnails in a folder next to the page

Any COCO result file will do. What else an entry may hold, and the page then shows, is in `FORMAT`.
The page with its style and script is `assets/gallery.html`; this file builds its data.
"""

if __name__ == "__main__":
    import parts.start  # noqa: F401 - before the slow imports, during which Ctrl-C is quiet
import base64
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from configurator import configure
from parts.common import UserError, read_json, run, write_text

TEMPLATE = Path(__file__).parent / "assets" / "gallery.html"
SIDE = 320  # pixels, the longer side of a thumbnail
SMALL = 40_000  # bytes; a smaller image is embedded as it is


@dataclass(frozen=True)
class GalleryConfig:
    predictions: str  # of sample.py, or any COCO result file; needs no --predictions=
    out: str = ""  # the page; empty: gallery.html next to the predictions
    images: str = ""  # folder in which to look for the images first
    external: bool = False  # thumbnails in a folder next to the page, for thousands of images
    title: str = ""  # of the page; empty: the path of the predictions


# ---------------------------------------------------------------------------------------------
# Checking

FORMAT = {  # of an entry of predictions.json; all but image_id and caption may be absent
    "image_id": int | str,
    "caption": str,
    "file_name": str,
    "path": str,  # of the image file
    "references": [str],
    "tokens": [str],  # the caption's
    "logprobs": [int | float],  # of each token in nats (0 in a prompt), perhaps that of the end
    "n_best": [{"caption": str, "logprob": int | float}],
    "scores": {str: int | float},  # bleu, rouge_l, cider
    "facts": {"stated": [str], "true": [str]},
    "attention": [[int | float]],  # (tokens, prefix positions)
    "grid": int,  # patches per side, 0 for none
    "uncropped": bool,  # the encoder saw the whole image, not only the square in its middle
}


def fits(value, form) -> bool:
    """Return whether a value has a form of FORMAT."""
    match form:
        case [item]:
            return isinstance(value, list) and all(fits(x, item) for x in value)
        case dict() if str in form:  # whatever the keys
            return isinstance(value, dict) and all(fits(x, form[str]) for x in value.values())
        case dict():
            return isinstance(value, dict) and all(fits(value.get(k), x) for k, x in form.items())
    too_large = type(value) is int and abs(value) > 1e300  # for a float
    return isinstance(value, form) and not too_large


def check(predictions, path: str = "predictions") -> None:
    """Raise UserError for the first entry that the page cannot show; `path` is for the message."""
    if not isinstance(predictions, list) or not predictions:
        raise UserError(f"{path}: expected a list of captions: give a COCO result file")
    for n, entry in enumerate(predictions):
        if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
            raise UserError(f"{path}: entry {n} lacks image_id or caption: add them")
        wrong = [k for k, form in FORMAT.items() if k in entry and not fits(entry[k], form)]
        if not wrong and len({len(row) for row in entry.get("attention", [])}) > 1:
            wrong = ["attention"]
        if wrong:
            raise UserError(f"{path}: entry {n}: {wrong[0]} is malformed: correct or remove it")


# ---------------------------------------------------------------------------------------------
# The page's data

SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def thumbnail(path: Path) -> tuple[str, bytes] | None:
    """Return the type and bytes of an image of at most SIDE pixels per side, None if it is broken.

    A file of at most SMALL bytes that a browser shows is returned unchecked, as it is. So is a
    larger one if pillow is not installed.
    """
    with open(path, "rb") as file:
        content = file.read(SMALL + 1)
    kind = next((k for start, k in SIGNATURES.items() if content.startswith(start)), None)
    if kind and len(content) <= SMALL:
        return kind, content
    from parts.encoder import BadImage, read_image  # takes seconds

    try:
        image = read_image(path)
    except ImportError:
        return kind and (kind, path.read_bytes())
    except BadImage:
        return None
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "jpeg", quality=82)
    return "jpeg", out.getvalue()


def pack_attention(attention: list[list[float]], grid: int | None) -> dict:
    """Return attention (tokens, P) as one byte per weight, scaled by each token's largest.

    The P prefix positions are grid x grid patches, perhaps after a class token; grid=0 means that
    they are not patches. With None, the grid is guessed from P, but only from 4 x 4 on: ten
    embeddings of a pooled image are not a class token and 3 x 3.
    """
    weights = np.nan_to_num(np.asarray(attention, np.float64)).clip(0, 1)
    P = weights.shape[1]
    largest = weights.max(1)
    scaled = np.rint(255 * weights / np.maximum(largest, 1e-12)[:, None]).astype(np.uint8)
    if grid is None:
        grid = math.isqrt(P) if P >= 16 else 0
    if grid < 0 or P - grid * grid not in (0, 1):
        grid = 0
    return {
        "P": P,
        "grid": grid,
        "largest": largest.round(4).tolist(),
        "bytes": base64.b64encode(scaled.tobytes()).decode(),
    }


def embed(data) -> str:
    """Return JSON that may stand in a <script>, whatever its strings hold.

    Numbers are rounded to four decimal places. NaN and infinity, which JSON lacks, become null.
    """
    rounded = json.loads(
        json.dumps(data), parse_float=lambda x: round(float(x), 4), parse_constant=lambda x: None
    )
    text = json.dumps(rounded, separators=(",", ":"), allow_nan=False)  # ASCII, so no U+2028
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def write(
    predictions: list[dict], page: Path, title="", images_root: Path | str = "", external=False
) -> list[str]:
    """Write the page of some predictions, entries as in FORMAT.

    Look for images in `images_root` first. They become data URIs, or with `external` files in the
    folder <page>_files, which must stay next to the page.

    Return the names of the images that are missing or broken; the page shows them without a
    picture. Raise UserError for an entry that cannot be shown.
    """
    check(predictions)
    folder = page.with_name(f"{page.stem}_files")
    (folder if external else page.parent).mkdir(parents=True, exist_ok=True)
    shown = []
    missing = []
    for n, entry in enumerate(tqdm(predictions, desc=page.name, unit="image")):
        names = [entry[key] for key in ("path", "file_name") if entry.get(key)]
        places = [Path(root, name) for root in (images_root, "") for name in names]
        # os.path.isfile is False for names that Path.is_file refuses
        image = next((place for place in places if os.path.isfile(place)), None)
        picture = thumbnail(image) if image else None
        record = {key: entry[key] for key in FORMAT if entry.get(key) not in (None, [], {}, "")}
        record |= {"image_id": entry["image_id"], "caption": entry["caption"], "src": ""}
        if picture:
            kind, content = picture
            if external:
                file = folder / f"{n:05d}.{kind}"
                file.write_bytes(content)
                record["src"] = quote(f"{folder.name}/{file.name}")
            else:
                record["src"] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        elif names:
            missing.append(names[0])
        attention = record.pop("attention", None)
        if attention and attention[0]:
            record["attention"] = pack_attention(attention, entry.get("grid"))
        shown.append(record)
    data = embed({"title": title or "Captions", "images": shown})
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data)
    write_text(page, html)
    return missing


# ---------------------------------------------------------------------------------------------
# The command


def main(cfg: GalleryConfig) -> None:
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"images={cfg.images}: no such folder")
    predictions = read_json(cfg.predictions, "`python sample.py` writes it")
    check(predictions, cfg.predictions)
    page = Path(cfg.out or Path(cfg.predictions).with_name("gallery.html"))
    missing = write(predictions, page, cfg.title or cfg.predictions, cfg.images, cfg.external)
    if missing:
        some = ", ".join(missing[:3])
        print(f"{len(missing)} images missing or broken, such as {some}", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    run(lambda: main(configure(GalleryConfig, sys.argv[1:], __doc__, positional="predictions")))
