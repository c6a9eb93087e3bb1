"""Image files of every sort, and embeddings: the oracle is what transformers computes itself."""

import contextlib
import copy
import errno
import io
import json
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from helpers import PATCH, ROOT, SIDE, RunsCode, picture, tiny_clip
from PIL import Image, ImageOps

from parts.common import UserError
from parts.encoder import BadImage, Encoder, find_images, read_image

# ---------------------------------------------------------------------------------------------
# The model


@pytest.fixture(scope="module", params=["clip", "siglip"])
def tower(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, str(folder), *tiny_clip(folder, request.param)


IMAGES = [picture(60, 40), picture(33, 90, 1), picture(32, 32, 2), picture(3, 50, 3)]


def test_pooled_is_what_get_image_features_gives(tower):
    kind, folder, model, processor = tower
    with torch.no_grad():
        out = model.get_image_features(**processor(images=IMAGES, return_tensors="pt"))
    expected = getattr(out, "pooler_output", out)  # (B, D)
    encoder = Encoder(folder)
    x = encoder(IMAGES)
    assert x.dtype == torch.float16
    assert x.shape == (4, 1, encoder.embedding_dim) == (4, encoder.n_positions, len(expected[0]))
    assert encoder.kind == kind
    near = dict(atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(x[:, 0].float(), expected, **near)
    torch.testing.assert_close(F.normalize(x[:, 0].float()), F.normalize(expected), **near)


@pytest.mark.parametrize("grid", [0, 2, 3])
def test_grid_is_the_last_layers_tokens(tower, grid):
    kind, folder, model, processor = tower
    with torch.no_grad():
        out = model.vision_model(**processor(images=IMAGES, return_tensors="pt"))
        tokens = out.last_hidden_state
        if kind == "clip":
            tokens = model.vision_model.post_layernorm(tokens)
    first = tokens.shape[1] - (SIDE // PATCH) ** 2  # 1 with a class token
    patches = tokens[:, first:].unflatten(1, (SIDE // PATCH, SIDE // PATCH))  # (B, 4, 4, D)
    if grid:
        edges = [(i * 4 // grid, -(-(i + 1) * 4 // grid)) for i in range(grid)]
        patches = torch.stack(
            [patches[:, a:b, c:d].mean((1, 2)) for a, b in edges for c, d in edges], 1
        )
    expected = torch.cat((tokens[:, :first], patches.reshape(4, -1, tokens.shape[2])), 1)
    encoder = Encoder(folder, "grid", grid)
    x = encoder(IMAGES)
    assert x.shape == (4, encoder.n_positions, encoder.embedding_dim)
    torch.testing.assert_close(x.float(), expected, atol=1e-3, rtol=1e-3)


TEXTS = [
    "a red circle",
    "two small blue squares above a large green triangle on a white background",
]


def test_texts_are_what_get_text_features_gives(capsys):
    transformers = pytest.importorskip("transformers")
    folder = str(ROOT / "assets" / "shapes-clip")
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, return_tensors="pt"
    )
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out = model.get_text_features(**inputs)
    encoder = Encoder(folder, text=True)
    x = encoder.encode_text(TEXTS)
    torch.testing.assert_close(x, getattr(out, "pooler_output", out), atol=1e-5, rtol=1e-5)
    assert torch.allclose(x[:1], encoder.encode_text(TEXTS[:1]), atol=1e-5)  # padding is no part
    assert "were cut" not in capsys.readouterr().err
    assert encoder.encode_text([TEXTS[1] * 9]).isfinite().all()  # longer than the model's block
    assert capsys.readouterr().err == "1 captions were cut for CLIP, which reads 32 tokens\n"


def test_texts_of_siglip(tmp_path):
    """SigLIP reads the last position, so that its texts are padded to their full length."""
    transformers = pytest.importorskip("transformers")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "spiece"), vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tiny_clip(tmp_path, "siglip", vocab=60)
    transformers.SiglipTokenizer(str(tmp_path / "spiece.model")).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(
        TEXTS, padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    )
    model = transformers.SiglipModel.from_pretrained(tmp_path)
    with torch.no_grad():
        out = model.get_text_features(input_ids=inputs["input_ids"])
    x = Encoder(str(tmp_path), text=True).encode_text(TEXTS)
    torch.testing.assert_close(x, getattr(out, "pooler_output", out), atol=1e-5, rtol=1e-5)


def test_a_clip_without_a_tokenizer_encodes_images_only(clip):
    """Where there is none, transformers makes a CLIP tokenizer that knows no word."""
    Encoder(clip)
    with pytest.raises(UserError, match="lacks its tokenizer: add its files"):
        Encoder(clip, text=True)


def test_half_precision_weights_are_computed_in_single(tower, tmp_path):
    _, folder, model, _ = tower
    shutil.copytree(folder, tmp_path / "half")
    copy.deepcopy(model).half().save_pretrained(tmp_path / "half")
    half, full = Encoder(str(tmp_path / "half")), Encoder(folder)
    assert half.model.dtype == torch.float32
    torch.testing.assert_close(half(IMAGES), full(IMAGES), atol=1e-2, rtol=1e-2)


def test_workers_give_the_same_bytes_as_none(clip, tmp_path):
    encoder = Encoder(clip)
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"")
    names = [["0", "1"], ["bad"], ["2", "bad", "3"], ["bad", "bad"]]
    batches = [[(tmp_path / f"{name}.png",) for name in batch] for batch in names]
    alone, helped = (list(encoder.stream(batches, workers)) for workers in (0, 2))
    assert [list(bad) for _, bad in helped] == [[], [0], [1], [0, 1]]
    for (x, bad), (y, worse) in zip(alone, helped, strict=True):
        assert torch.equal(x, y) and bad == worse
    assert torch.equal(helped[2][0], encoder(IMAGES[2:]))
    assert list(encoder.stream([], 2)) == []


def test_torchvision_changes_no_image(monkeypatch):
    """Where it is installed, transformers chose a processor that took our arrays the wrong way."""
    transformers = pytest.importorskip("transformers")
    asked = []
    plain = transformers.AutoImageProcessor.from_pretrained

    def from_pretrained(*args, **options):
        asked.append(options.get("backend"))
        return plain(*args, **options)

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", from_pretrained)
    encoder = Encoder(str(ROOT / "assets" / "shapes-clip"))
    assert asked == ["pil"] and type(encoder.processor).__name__.endswith("Pil")


def test_a_model_that_cannot_be_used_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Encoder("./nowhere")
    tiny_clip(tmp_path / "clip")
    with pytest.raises(UserError, match="grid=9: .* has only 4 x 4 patches"):
        Encoder(str(tmp_path / "clip"), "grid", 9)

    weights = tmp_path / "clip" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="could not be loaded"):
        Encoder(str(tmp_path / "clip"))
    weights.unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        Encoder(str(tmp_path / "clip"))

    from safetensors.torch import load, save_file

    tensors = load(whole)
    save_file({k: v for k, v in tensors.items() if "visual_projection" not in k}, weights,
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="lacks weights: visual_projection.weight"):
        Encoder(str(tmp_path / "clip"))

    weights.unlink()  # pickled weights that would run code were a traceback
    torch.save({"logit_scale": RunsCode()}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match="clip holds more than weights: not loaded"):
        Encoder(str(tmp_path / "clip"))

    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="is a bert model; CLIP or SigLIP is needed"):
        Encoder(str(tmp_path / "clip"))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_broken_or_missing_config_of_the_model_is_one_line(tmp_path, name):
    tiny_clip(tmp_path)
    for content in ("", "{", "null", "\0", '{"size": 5, "crop_size": "x", "model_type": 5}'):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="could not be loaded"):
            Encoder(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        Encoder(str(tmp_path))


# ---------------------------------------------------------------------------------------------
# Image files


def written(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    def read(data: bytes) -> np.ndarray:
        (tmp_path / "x").write_bytes(data)
        image = read_image(tmp_path / "x")
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)

    return read


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(read, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = written(picture(20, 12), exif=exif)
    assert (read(data) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).all()


def test_a_photo_taken_upright_with_a_turned_camera(read):
    """Orientation 6: the left column of the stored image is the top row of the upright one."""
    stored = Image.new("RGB", (8, 6), "black")
    stored.paste("red", (0, 0, 2, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = read(written(stored, exif=exif))
    assert pixels.shape == (8, 6, 3)
    assert (pixels[:2] == (255, 0, 0)).all() and (pixels[2:] == 0).all()


def test_broken_exif_is_no_orientation(read):
    data = written(picture(20, 12), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert read(data).shape == (12, 20, 3)


@pytest.mark.parametrize("orientation", (3, 6))
def test_16_bits_and_transparency_are_turned_too(read, orientation):
    """The turn comes first, so that a 16-bit or transparent image is turned like any other."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    grey = picture(20, 12).convert("L")
    expected = np.asarray(grey.transpose(turn))[..., None]
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert (read(written(sixteen, kind, exif=exif)) == expected).all()
    assert (read(written(sixteen, transparency=1, exif=exif)) == expected).all()
    palette = picture(20, 12).quantize(16)
    image = palette.convert("RGB")
    image.paste("white", mask=Image.fromarray(np.asarray(palette) == 0))
    data = written(palette, transparency=0, exif=exif)
    assert (read(data) == np.asarray(image.transpose(turn))).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(read, kind):
    image = picture(16, 16)
    pixels = read(
        written(image.convert("CMYK"), kind, **({"quality": 98} if kind == "JPEG" else {}))
    )
    assert abs(pixels - np.asarray(image)).max() <= 12


def test_palette_and_bits_and_gray(read):
    image = picture(16, 16)
    palette = image.quantize(16)
    assert (read(written(palette)) == np.asarray(palette.convert("RGB"))).all()
    assert (read(written(palette, "GIF")) == np.asarray(palette.convert("RGB"))).all()
    gray = np.asarray(image.convert("L"))
    assert (read(written(image.convert("L"))) == gray[..., None]).all()
    bits = image.convert("1")
    assert (read(written(bits)) == np.asarray(bits.convert("RGB"))).all()


def test_transparency_is_white(read):
    for mode, clear, half in (("RGBA", (9, 9, 9, 0), (0, 0, 0, 128)), ("LA", (9, 0), (0, 128))):
        image = Image.new(mode, (4, 2), clear)
        image.paste(half, (2, 0, 4, 2))
        pixels = read(written(image))
        assert (pixels[:, :2] == 255).all() and abs(pixels[:, 2:] - 127).max() <= 1
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.paste(1, (2, 0, 4, 2))
    pixels = read(written(palette, transparency=0))
    assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == (200, 100, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(read, kind):
    values = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    assert (read(written(Image.fromarray(values), kind)) == (values >> 8)[..., None]).all()


def chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check


def png_of(values: np.ndarray, clear: tuple) -> bytes:
    """A PNG of 16 bits, (h, w) or (h, w, 3), with one colour that is transparent."""
    (h, w), colours = values.shape[:2], 2 if values.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", w, h, 16, colours, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))  # fmt: skip


def test_transparency_of_sixteen_bits(read):
    image = np.asarray(picture(16, 16)).astype(int)
    for eight, clear in ((image, (1000, 2000, 3000)), (image[..., 0], (1234,))):
        values = eight * 257
        values[:8] = clear if len(clear) == 3 else clear[0]
        pixels, expected = read(png_of(values, clear)), eight.copy()
        expected[:8] = 255
        assert (pixels == (expected if expected.ndim == 3 else expected[..., None])).all()


def tiff_of(data: bytes, w: int, h: int, bits: int, photometric: int) -> bytes:
    tags = [(256, w), (257, h), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1),
            (278, h), (279, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_tiffs_of_twelve_bits_and_with_white_as_zero(read):
    grey = np.asarray(picture(16, 16).convert("L")).astype(int)
    negative = (65535 - grey * 257).astype("<u2").tobytes()
    assert (read(tiff_of(negative, 16, 16, 16, 0)) == grey[..., None]).all()
    pairs = (grey * 4095 // 255).reshape(-1, 2)
    packed = bytes(x for a, b in pairs for x in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    assert (read(tiff_of(packed, 16, 16, 12, 1)) == grey[..., None]).all()


def test_pgm_of_sixteen_bits(read):
    grey = np.asarray(picture(16, 16).convert("L")).astype(int)
    for most in (65535, 1023):
        data = (grey * most // 255).astype(">u2").tobytes()
        assert (read(b"P5 16 16 %d\n" % most + data) == grey[..., None]).all()


def test_a_large_colour_profile_is_no_reason_to_refuse(read):
    image = picture(9, 9)
    pixels = read(written(image, icc_profile=np.random.default_rng(0).bytes(3_000_000)))
    assert (pixels == np.asarray(image)).all()


def test_animations_show_their_first_frame(read):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = written(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (read(data) == (255, 0, 0)).all()


def test_one_pixel_is_an_image(read, tower):
    assert read(written(Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]
    encoder = Encoder(tower[1])
    one, many = (encoder([Image.new("RGB", (n, n), "red")]) for n in (1, SIDE))
    assert torch.equal(one, many)


def png_header(width, height) -> bytes:
    """A PNG that says it is so large, with next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n"
BAD = {
    "empty file": b"",
    "no image in a known format": b"this is not an image",
    "no image in a known format ": EPS,  # Pillow would start Ghostscript
    "broken: image file is truncated": written(picture(200, 200), "JPEG")[:2000],
    "broken: ": written(picture(200, 200))[:2000],
    "broken: .* exceeds limit of [0-9]+ pixels": png_header(20_000, 20_000),
    "more than [0-9]+ pixels": png_header(10_000, 10_000),
    "1 x 20000 pixels: too narrow": png_header(1, 20_000),
    r"32-bit pixels \(mode F\)": written(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_files_are_refused_with_the_reason(read, reason):
    with pytest.raises(BadImage, match=reason.strip()):
        read(BAD[reason])


def test_every_cut_and_every_flipped_byte_is_read_or_refused(read):
    """Whatever Pillow raises on broken data must end in BadImage."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "AVIF"):
        whole = written(picture(9, 7), kind, **({"exif": exif} if kind == "JPEG" else {}))
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            data[rng.integers(len(data))] = rng.integers(256)
            with contextlib.suppress(BadImage):
                read(bytes(data))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="directory"):
        read_image(tmp_path)
    with pytest.raises(BadImage, match="too long"):
        read_image(tmp_path / ("long" * 100))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadImage, match="symbolic links"):
        read_image(tmp_path / "loop")
    with pytest.raises(UserError, match="clip: expected a model's name or folder"):
        Encoder("")


def readers() -> list[str]:
    """The threads that read images and still run; others, of transformers for one, come and go."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("prefetch")]


def test_a_disk_or_network_at_fault_stops_and_blames_no_image(tmp_path, monkeypatch, clip):
    """A stumbling NFS once made prepare.py skip good images, up to 1 % of them, as unreadable."""
    picture(8, 8).save(tmp_path / "a.png")
    encoder = Encoder(clip)

    def stumbles(path, *args, real=open, **options):
        if str(path).endswith("a.png"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", stumbles)
    for workers in (0, 1):
        with pytest.raises(UserError, match="a.png: Input/output error; rerun the same command"):
            list(encoder.stream([[(tmp_path / "a.png",)]], workers))
    assert not readers()


def test_readers_end_when_nobody_asks_for_more(tmp_path, clip):
    picture(8, 8).save(tmp_path / "a.png")
    encoder = Encoder(clip)
    stream = encoder.stream([[(tmp_path / "a.png",)]] * 50, 2)
    next(stream)
    assert readers()
    stream.close()
    assert not readers()


def test_an_image_within_a_larger_file(tmp_path):
    data = written(picture(8, 8))
    (tmp_path / "x.tar").write_bytes(b"before" + data + b"after")
    assert read_image(tmp_path / "x.tar", 6, len(data)).size == (8, 8)


def test_find_images(tmp_path):
    """HEIC, .jfif, files without a suffix and links to folders were left out without a word, and
    macOS's `._` files were taken for images. So were Windows' Thumbs.db and desktop.ini, of which
    most folders have one: sample.py ended with status 1."""
    names = ["a.png", "b.JPG", "c/x.webp", "d.jfif", "e.HEIC", "f.jpe", "noext"]
    others = ["notes.txt", "c/x.json"]
    hidden = [".DS_Store", "._a.png", "c/._x.webp", "__MACOSX/a.png", ".thumbnails/a.png"]
    hidden += ["Thumbs.db", "c/desktop.ini"]
    for name in names + others + hidden:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images, skipped = find_images([str(tmp_path), str(tmp_path / "notes.txt")])
    assert images == [tmp_path / name for name in (*names, "notes.txt")]
    text, json = tmp_path / "notes.txt", tmp_path / "c/x.json"
    assert skipped == [f"{json}: application/json", f"{text}: text/plain"]
    with pytest.raises(UserError, match="no such file or folder"):
        find_images([str(tmp_path / "none")])
    (tmp_path / "album.jpg").mkdir()  # a folder, whatever its name
    assert find_images([str(tmp_path)]) == (images[:-1], skipped)
    (tmp_path / "c/up").symlink_to(tmp_path)  # a circle
    line = f"{tmp_path}/c/up: a link to a folder; name it too"
    assert find_images([str(tmp_path)]) == (images[:-1], sorted([*skipped, line]))
    assert find_images([str(tmp_path / "c/up")])[0][0] == tmp_path / "c/up/a.png"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/notes.txt").write_bytes(b"")
    with pytest.raises(UserError, match="bare: no images in it"):
        find_images([str(tmp_path / "bare")])
