"""The frozen image encoder: image files -> embeddings, through transformers' CLIP or SigLIP.

    encoder = Encoder("openai/clip-vit-base-patch32", "pooled")
    embeddings = encoder([read_image("dog.jpg")])                    # (1, 1, 512) float16

`pooled` is one projected embedding per image, the one that CLIP compares with text. `grid` is the
class token (SigLIP has none) and every patch after the last layer norm, optionally averaged down
to grid x grid patches. Embeddings are stored unnormalized: `model.ClipLM` normalizes them.
Needs the extras: pip install -r requirements-clip.txt
"""

import contextlib
import errno
import hashlib
import io
import itertools
import mimetypes
import os
import pickle
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from parts.common import UserError, extras, or_shipped, prefetch

# ---------------------------------------------------------------------------------------------
# Reading image files


class BadImage(Exception):
    """An image that cannot be read, or not read correctly; its text is the reason."""


# Formats that Pillow decodes by itself: to open EPS, for one, it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
LARGEST = 1 << 28  # bytes of a file
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
HIDDEN = re.compile(r"\.|(__MACOSX|Thumbs\.db|desktop\.ini)$", re.IGNORECASE)
NARROWEST = 200  # longer : shorter side; resizing to CLIP's height multiplies the memory by it
# Pillow's warnings would interrupt the progress bar; those that matter become a BadImage.
warnings.filterwarnings("ignore", module="PIL")
# What Pillow raises on broken images, and transformers on broken models.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError)
BROKEN += (ArithmeticError, MemoryError, RuntimeError, struct.error, zlib.error)


def read_image(path: Path | str, offset: int = 0, size: int = -1):
    """Return the image in a file, or in `size` bytes of it from `offset`, as an upright RGB image.

    Applies EXIF rotation, flattens transparency onto white, scales 16 bits to 8, and takes an
    animation's first frame. Size and format are checked before any pixel is decoded. Raise
    BadImage if the image is at fault, UserError if reading is (no permission, a bad disk).
    """
    from PIL import Image, ImageOps, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a colour profile may be large
    if not 0 <= size <= LARGEST:
        size = LARGEST + 1
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        if error.errno in MISSING:
            raise BadImage(error.strerror) from None
        raise UserError(f"{path}: {error.strerror}; rerun the same command to resume") from None
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
        with contextlib.suppress(*BROKEN):  # a broken EXIF tag is ignored
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            image = to_8_bits(image)
        transparent = image.info.get("transparency")  # for RGB, Pillow keeps the high bits only
        if isinstance(transparent, tuple) and max(transparent) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        if image.mode in ("I", "F"):
            raise BadImage(f"32-bit pixels (mode {image.mode}), whose range is unknown")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise BadImage(f"no image in a known format ({' '.join(FORMATS)})") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise BadImage(f"broken: {error or type(error).__name__}") from None


def to_8_bits(image):
    """Return a grey image of 16 bits (in a TIFF also 9 to 15) with 8 bits, opaque or with alpha."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack((grey, alpha), -1))


def find_images(paths: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Return the files among `paths`, and those in folders among them, sorted by name.

    Hidden files, and those that macOS and Windows add, are ignored. The second list has a line for
    all else that was passed over: other types of files, and links to folders, which may lead in a
    circle. Raise UserError if a path does not exist, or if a folder holds no image or cannot be
    read.
    """

    def unreadable(error: OSError):
        raise UserError(f"{error.filename}: {error.strerror}")

    images, others = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            images.append(path)
            continue
        before = len(images)
        for folder, folders, names in os.walk(path, onerror=unreadable):
            folders[:] = [name for name in folders if not HIDDEN.match(name)]
            links = [Path(folder, name) for name in folders if os.path.islink(Path(folder, name))]
            others += [f"{link}: a link to a folder; name it too" for link in links]
            for name in [name for name in names if not HIDDEN.match(name)]:
                kind = mimetypes.guess_type(name)[0] or "image"  # without a suffix, it may be one
                if kind.startswith("image"):
                    images.append(Path(folder, name))
                else:
                    others.append(f"{Path(folder, name)}: {kind}")
        if len(images) == before:
            raise UserError(f"{path}: no images in it")
        images[before:] = sorted(images[before:])
    return images, sorted(others)


# ---------------------------------------------------------------------------------------------
# The model

TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
OUTPUTS = {"clip": "image_embeds", "siglip": "pooler_output"}  # of the towers, (B, D)
TEXT_TOWERS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel"}


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Quiet transformers, and turn what it raises into a UserError: `what` was not loaded."""
    extras()
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()  # it would advise to install torchvision
    transformers.logging.disable_progress_bar()
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(f"{what} holds more than weights: not loaded") from None
    except (*BROKEN, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{what} could not be loaded: {reason}") from None


def load_model(name: str, kind: str, what: str):
    """Return a pretrained model of a class of transformers. Raise UserError if it lacks weights."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(
        or_shipped(name), dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{what} lacks weights: {missing}")
    return model.eval()


class Encoder:
    """A CLIP or SigLIP vision tower, in float32; on CUDA its layers run in float16 (autocast).

    Args:
        name: a transformers model name, or a folder in its format.
        features: "pooled" or "grid".
        grid: for grid features, patches per side after average pooling; 0 keeps them all.
        text: load the text tower too, for `encode_text`.

    embedding_dim is D and n_positions P of the (B, P, D) that a call returns; kind is "clip" or
    "siglip". Raise UserError if the extras are missing or the model cannot be loaded.
    """

    def __init__(self, name: str, features="pooled", grid: int = 0, device="cpu", text=False):
        if not name:
            raise UserError("clip: expected a model's name or folder, got nothing")
        folder, what = or_shipped(name), f"clip={name}"
        if name.startswith((".", "/", "assets/")) and not Path(folder).is_dir():
            raise UserError(f"{what}: no such folder: set --clip to a folder or a model's name")
        self.name = name
        self.features = features
        self.grid = grid
        self.device = torch.device(device)
        with loading(what):
            import transformers

            # With torchvision, another would be chosen, which resizes a little differently.
            processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
            model_type = transformers.AutoConfig.from_pretrained(folder).model_type
            self.kind = model_type.removesuffix("_vision_model")
            if self.kind not in TOWERS:
                raise UserError(f"{what} is a {model_type} model; CLIP or SigLIP is needed")
            self.model = load_model(name, TOWERS[self.kind], what).to(self.device)
            if text:
                self.text_model = load_model(name, TEXT_TOWERS[self.kind], what).to(self.device)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                # without its files, transformers makes a tokenizer that knows no word
                if len(self.tokenizer) < self.text_model.config.vocab_size // 2:
                    raise UserError(f"{what} lacks its tokenizer: add its files")

        config = self.model.config
        self.side = config.image_size // config.patch_size
        if grid > self.side:
            raise UserError(f"grid={grid}: {name} has only {self.side} x {self.side} patches")
        self.has_class = self.kind == "clip"  # a class token, and a projection
        self.n_positions = self.has_class + (grid or self.side) ** 2
        self.embedding_dim = config.hidden_size
        if features == "pooled":
            self.n_positions = 1
            self.embedding_dim = getattr(config, "projection_dim", config.hidden_size)
        self.processor = processor
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        normal = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
        mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in normal)
        self.mean, self.std = (x.to(self.device) / scale for x in (mean, std))  # of 8-bit pixels

    def digest(self) -> str:
        """Return the SHA-256 of the weights and of the processor's settings."""
        sha = hashlib.sha256(self.processor.to_json_string().encode())
        for value in self.model.state_dict().values():
            sha.update(value.cpu().numpy())
        return sha.hexdigest()

    def pixels(self, images: list) -> torch.Tensor:
        """Return RGB PIL images as (B, 3, H, W) uint8, resized and cropped for the model."""
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        # Without input_data_format, it would guess wrong for images 3 pixels high.
        return self.processor(images, input_data_format="channels_last", **options)["pixel_values"]

    def read(self, files: list[tuple]) -> tuple[torch.Tensor, dict[int, str]]:
        """Return the pixels of the readable files, and {index: reason} of the others."""
        images = []
        bad = {}
        for i, file in enumerate(files):
            try:
                images.append(read_image(*file))
            except BadImage as error:
                bad[i] = str(error)
        return self.pixels(images) if images else torch.empty(0), bad

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode (B, 3, H, W) uint8 as (B, P, D) float16 on the encoder's device."""
        if not len(pixels):
            return torch.empty(0, self.n_positions, self.embedding_dim, dtype=torch.float16)
        pixels = (pixels.to(self.device, non_blocking=True) - self.mean) / self.std
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            out = self.model(pixel_values=pixels)
            if self.features == "pooled":
                return getattr(out, OUTPUTS[self.kind])[:, None].half()
            x = out.last_hidden_state
            if self.has_class:
                x = self.model.vision_model.post_layernorm(x)
            if self.grid:
                first = x[:, : self.has_class]
                patches = x[:, self.has_class :].transpose(1, 2)
                patches = patches.unflatten(2, (self.side, self.side))
                patches = F.adaptive_avg_pool2d(patches, self.grid)  # (B, D, grid, grid)
                x = torch.cat((first, patches.flatten(2).transpose(1, 2)), 1)
            return x.half()

    def __call__(self, images: list) -> torch.Tensor:
        """Encode PIL images as (B, P, D) float16 on the CPU."""
        return self.encode(self.pixels([image.convert("RGB") for image in images])).cpu()

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Encode texts as (B, D) float32 on the CPU, comparable with pooled image embeddings.

        A text that is too long for the model is cut off, and counted on stderr.
        """
        limit = self.text_model.config.max_position_embeddings
        if long := sum(len(ids) > limit for ids in self.tokenizer(texts)["input_ids"]):
            print(f"{long} captions were cut for CLIP, which reads {limit} tokens", file=sys.stderr)
        # SigLIP reads the last position, and learned to do so with padding in it
        padding = True if self.has_class else "max_length"
        options = {"padding": padding, "truncation": True, "return_tensors": "pt"}
        options["max_length"] = limit
        embeddings = []
        for i in range(0, len(texts), 256):
            inputs = self.tokenizer(texts[i : i + 256], **options)
            out = self.text_model(input_ids=inputs["input_ids"].to(self.device))
            embeddings.append(out.text_embeds if self.has_class else out.pooler_output)
        return torch.cat(embeddings).cpu()

    def stream(self, batches: Iterable[list[tuple]], workers: int) -> Iterator[tuple]:
        """Encode batches of files; a file is the arguments of `read_image`.

        `workers` threads (0: this one) read files while the model computes. Threads, not processes:
        Pillow decodes and resizes without Python's lock, and a forked process would inherit every
        lock that another thread holds, but not the thread that releases it. A batch is given to
        the device before the previous one is waited for.

        Yield, for each batch in order: (n, P, D) float16 of its n readable files, and {index in
        the batch: reason} of the others. Raise UserError if a file cannot be read for a reason
        other than its content.
        """
        images = prefetch(self.read, batches, workers)
        encoded = ((self.encode(pixels), bad) for pixels, bad in images)
        # pairwise begins to encode the next batch before this one is waited for
        for (x, bad), _ in itertools.pairwise(itertools.chain(encoded, [None])):
            yield x.cpu(), bad
