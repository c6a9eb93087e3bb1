"""The frozen image encoder: image files -> embeddings, through transformers' CLIP or SigLIP.

    encoder = Encoder("openai/clip-vit-base-patch32", "pooled")
    embeddings = encoder([read_image("dog.jpg")])                    # (1, 1, 512) float16

`pooled` is one projected embedding an image, as CLIP compares it with text; `grid` is the class
token (SigLIP has none) and every patch after the last layer norm, optionally averaged down to
grid x grid patches. Embeddings are stored as they come: `model.ClipLM.project` normalises them.
Needs the extras: pip install -r requirements-clip.txt
"""

import contextlib
import errno
import hashlib
import io
import os
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError

# ---------------------------------------------------------------------------------------------
# Reading image files


class BadImage(Exception):
    """An image that cannot be read, or not read right; its text is the reason."""


# Formats that Pillow decodes by itself: to open EPS, for one, it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = tuple(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .avif".split())
LARGEST = 1 << 28  # bytes of a file
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
NARROWEST = 200  # width : height, or the reverse; the resize to CLIP's height grows with it
# Its warnings would stand between the lines of a progress bar; what matters becomes BadImage.
warnings.filterwarnings("ignore", module="PIL")
# What Pillow raises on broken files, besides its own UnidentifiedImageError (an OSError).
BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError,
          AttributeError, ArithmeticError, MemoryError, struct.error, zlib.error)  # fmt: skip


def read_image(path: Path | str, offset: int = 0, size: int = -1):
    """The image in a file, or in `size` bytes of it from `offset`, as an upright PIL RGB image.

    Turned as its EXIF tag says, transparency on white, 16 bits scaled to 8, of an animation the
    first frame. Size and format are looked at before any pixel is decoded. Raises BadImage, and
    UserError where not the image but the reading fails: no permission, a disk or network at fault.
    """
    from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a colour profile may be large
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(LARGEST + 1 if size < 0 else min(size, LARGEST + 1))
    except OSError as error:
        if error.errno in MISSING:
            raise BadImage(error.strerror) from None
        raise UserError(f"{path}: {error.strerror}: the same command goes on") from None
    if not data:
        raise BadImage("empty file")
    if len(data) > LARGEST:
        raise BadImage(f"more than {LARGEST >> 20} MiB")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels")
        if max(width, height) > NARROWEST * min(width, height):
            raise BadImage(f"{width} x {height} pixels: too narrow")
        image.load()
        turn = orientation(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            image = eight_bits(image)
        clear = image.info.get("transparency")
        if isinstance(clear, tuple) and max(clear) > 255:  # of RGB, Pillow keeps 8 high bits
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        if image.mode in ("I", "F"):
            raise BadImage(f"32-bit pixels (mode {image.mode}), of no known range")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)
    except Image.UnidentifiedImageError:
        raise BadImage(f"no image in a known format ({' '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # more than twice as many
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except BROKEN as error:
        raise BadImage(f"broken: {error or type(error).__name__}") from None


def eight_bits(image):
    """A grey image of 16 bits, or of 9 to 15 in a TIFF, with 8."""
    from PIL import Image

    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    grey = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)  # 258: BitsPerSample
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        grey = 255 - grey
    if (clear := image.info.get("transparency")) is None:
        return Image.fromarray(grey)
    opaque = np.where(values == clear, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack((grey, opaque), -1))


def orientation(image):
    """How Pillow has to turn the image, as its EXIF says. A broken tag is none."""
    from PIL.Image import Transpose

    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
             5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
             8: Transpose.ROTATE_90}  # fmt: skip
    with contextlib.suppress(*BROKEN):
        return turns.get(image.getexif().get(0x0112))


def find_images(paths: Iterable[str]) -> list[Path]:
    """The files among `paths`, and the images in those that are folders, sorted by name.

    Raises UserError where a path does not exist, or a folder holds no image or cannot be read.
    """

    def unreadable(error: OSError):
        raise UserError(f"{error.filename}: {error.strerror}")

    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path, onerror=unreadable)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES
        )
        if not inside:
            raise UserError(f"{path}: no images in it ({' '.join(SUFFIXES)})")
        found += inside
    return found


class Reader:
    """Files -> pixels. It knows the processor, but not the model."""

    def __init__(self, processor):
        self.processor = processor

    def pixels(self, images: list) -> torch.Tensor:
        """RGB PIL images -> (B, 3, H, W) uint8, resized and cropped as the model wants them."""
        return self.processor(
            images=images, do_rescale=False, do_normalize=False, return_tensors="pt",
            input_data_format="channels_last",  # else guessed, wrongly for images 3 pixels high
        )["pixel_values"]  # fmt: skip

    def __call__(self, files: list[tuple]) -> tuple[torch.Tensor, dict[int, str]]:
        """The pixels of the readable files, and the reason for each other one, by its place."""
        images, bad = [], {}
        for i, file in enumerate(files):
            try:
                images.append(read_image(*file))
            except BadImage as error:
                bad[i] = str(error)
        return self.pixels(images) if images else torch.empty(0), bad


# ---------------------------------------------------------------------------------------------
# The model


def extras() -> None:
    """Raises UserError where the packages that an encoder needs are missing."""
    try:
        import PIL  # noqa: F401 - the processor needs it, and says so only in use
        import transformers  # noqa: F401
    except ImportError as error:
        need = "pip install -r requirements-clip.txt"
        raise UserError(f"{error.name} is missing: {need}") from None


class Encoder:
    """A CLIP or SigLIP vision tower, in float32; on CUDA its layers run in float16 (autocast).

    Args:
        name: a transformers model name, or a folder in its format.
        features: "pooled" or "grid".
        grid: for grid features, patches a side after average pooling; 0 keeps them all.

    embedding_dim is D and n_positions P of the (B, P, D) that a call returns; kind is "clip" or
    "siglip". Raises UserError where the extras or the model cannot be had.
    """

    def __init__(self, name: str, features: str = "pooled", grid: int = 0, device: str = "cpu"):
        if not name:
            raise UserError("clip: expected a model's name or folder, got nothing")
        extras()
        import transformers
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoImageProcessor

        where = os.path.expanduser(name)
        if name.startswith((".", "/", "~", "assets/")) and not Path(where).is_dir():
            raise UserError(f"clip={name}: no such folder; --clip=FOLDER tells where it lies")
        transformers.logging.set_verbosity_error()  # it would advise torchvision
        transformers.logging.disable_progress_bar()
        try:
            processor = AutoImageProcessor.from_pretrained(where)
            kind = AutoConfig.from_pretrained(where).model_type
            if kind in ("clip", "clip_vision_model"):
                cls = transformers.CLIPVisionModelWithProjection
            elif kind in ("siglip", "siglip_vision_model"):
                cls = transformers.SiglipVisionModel
            else:
                raise UserError(f"clip={name} is a {kind} model; CLIP or SigLIP is needed")
            model, info = cls.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"clip={name} could not be loaded: {reason}") from None
        if lacking := sorted(info["missing_keys"]):
            raise UserError(f"clip={name} lacks weights: {', '.join(lacking[:3])}")
        self.name, self.features, self.grid = name, features, grid
        self.kind = kind.split("_")[0]
        self.device = torch.device(device)
        self.model, self.reader = model.eval().to(self.device), Reader(processor)
        self.tower = getattr(model, "vision_model", model)
        config, self.has_class = model.config, self.kind == "clip"
        self.side = config.image_size // config.patch_size
        if grid > self.side:
            raise UserError(f"grid={grid}: {name} has only {self.side} x {self.side} patches")
        if features == "pooled":
            self.n_positions = 1
            self.embedding_dim = config.projection_dim if self.has_class else config.hidden_size
        else:
            self.n_positions = self.has_class + (grid or self.side) ** 2
            self.embedding_dim = config.hidden_size
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        normal = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
        mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in normal)
        self.mean, self.std = (x.to(self.device) / scale for x in (mean, std))  # of 8-bit pixels

    def digest(self) -> str:
        """SHA-256 of the weights and of how images are prepared for them."""
        sha = hashlib.sha256(self.reader.processor.to_json_string().encode())
        for value in self.model.state_dict().values():
            sha.update(value.cpu().numpy())
        return sha.hexdigest()

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> (B, P, D) float16 on the encoder's device."""
        pixels = (pixels.to(self.device, non_blocking=True) - self.mean) / self.std
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            out = self.tower(pixel_values=pixels)
            if self.features == "pooled":
                x = out.pooler_output
                x = self.model.visual_projection(x) if self.has_class else x
                x = x[:, None]
            else:
                x = out.last_hidden_state
                x = self.tower.post_layernorm(x) if self.has_class else x
                if self.grid:
                    first, patches = x[:, : self.has_class], x[:, self.has_class :]
                    patches = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
                    patches = F.adaptive_avg_pool2d(patches, self.grid)  # (B, D, grid, grid)
                    x = torch.cat((first, patches.flatten(2).transpose(1, 2)), 1)
        return x.half()

    def __call__(self, images: list) -> torch.Tensor:
        """PIL images -> (B, P, D) float16 on the CPU."""
        return self.encode(self.reader.pixels([image.convert("RGB") for image in images])).cpu()

    def stream(self, batches: Iterable[list[tuple]], workers: int) -> Iterator[tuple]:
        """Encodes batches of files, each file the arguments of `read_image`.

        Files are read by `workers` threads (0: by this one) while the model computes, and the
        next batch is given to the device before the last one is waited for.

        Yields, for each batch in order: (n, P, D) float16 of its n readable files, and the
        reason for each other file, by its place in the batch. Raises UserError where files cannot
        be read for another reason than their own.
        """
        empty = torch.empty(0, self.n_positions, self.embedding_dim, dtype=torch.float16)
        begun = None
        for pixels, bad in read_ahead(self.reader, batches, workers):
            next_ = (self.encode(pixels) if len(pixels) else empty, bad)
            if begun:
                yield begun[0].cpu(), begun[1]
            begun = next_
        if begun:
            yield begun[0].cpu(), begun[1]


def read_ahead(read, batches: Iterable, threads: int) -> Iterator:
    """Yield read(batch) for each batch in order; `threads` threads read the next ones meanwhile.

    Threads, not processes: Pillow decodes and resizes without Python's lock, and a forked process
    would inherit every lock that another thread holds, but not the thread that releases it.
    """
    if not threads:
        yield from map(read, batches)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            pending: deque = deque()
            for batch in batches:
                pending.append(pool.submit(read, batch))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # after an error, or when nobody asks for more
            pool.shutdown(cancel_futures=True)
