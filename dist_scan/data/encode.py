"""Encode the bytes of one image for storage, or say why it cannot be read.

Imports neither torch nor ffcv, so that worker processes start quickly.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dist_scan.config.data import DataConfig

JPEG, RAW = 0, 1  # modes of an image in the .beton format
MAX_PIXELS = 2**27  # read from the header: a decompression bomb is refused before it is decoded
MAX_BYTES = 8 * 2**20 - 64  # an image must fit into a page of the file
MEMORY_ADDRESS = re.compile(r" <_io\.BytesIO[^>]*>")
EXIF_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """The reason why an image cannot be stored."""


class EncodedImage(NamedTuple):
    """One image as it is stored."""

    data: bytes
    mode: int
    height: int
    width: int


def encode(data: bytes, config: DataConfig, pass_through: bool = True) -> EncodedImage:
    """Decode, apply the EXIF rotation, convert to RGB, resize, and encode for storage.

    With stored=original, a plain RGB JPEG is stored as it is, unless `pass_through` is False.
    Raises UnreadableImageError with the reason.
    """
    if not data:
        raise UnreadableImageError("empty or not readable")
    try:
        return _encode(data, config, pass_through)
    except UnreadableImageError:
        raise
    except Exception as error:
        # PIL raises struct.error and a dozen others for damaged files: none may end a build.
        # Memory addresses are removed: the list of unreadable images is the same at each build.
        text = MEMORY_ADDRESS.sub("", f"{type(error).__name__}: {error}")
        raise UnreadableImageError(text[:200]) from None


def _encode(data: bytes, config: DataConfig, pass_through: bool) -> EncodedImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about odd metadata of images that it reads
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImageError(
                f"{image.width} x {image.height} pixels (allowed: {MAX_PIXELS:,})"
            )
        is_original = pass_through and config.stored == "original"
        if is_original and _can_pass_through(image, len(data), config):
            image.load()  # raises if the file is truncated
            return EncodedImage(data, JPEG, image.height, image.width)
        upright = _to_rgb(ImageOps.exif_transpose(image))
        return _to_stored(_resize(upright, config), config)


def _can_pass_through(image: Image.Image, size: int, config: DataConfig) -> bool:
    """True for an upright RGB JPEG of `size` bytes that is small enough."""
    is_rgb_jpeg = image.format == "JPEG" and image.mode == "RGB"
    is_upright = image.getexif().get(EXIF_ORIENTATION, 1) == 1
    return is_rgb_jpeg and is_upright and size <= MAX_BYTES and max(image.size) <= config.max_side


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB image of any mode.

    16-bit and float greys are scaled (PIL would clip them to white); alpha is dropped.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImageError("has pixels that are NaN or Inf")
    scaled = values / _white_level(image, float(values.max())) * 255 + 0.5
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8)).convert("RGB")


def _white_level(image: Image.Image, largest: float) -> float:
    """The value of white in a grey image.

    Given by the format if possible, else the end of the smallest usual range with all values.
    """
    if image.mode.startswith("I;16") or image.format == "PNG":
        return 65535.0
    levels = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((level for level in levels if largest <= level), largest)


def _resize(image: Image.Image, config: DataConfig) -> Image.Image:
    """Resize the shorter side to `resolution`, unless the longer one then exceeds `max_side`."""
    width, height = image.size
    scale = 1.0
    if config.stored != "original":
        scale = config.resolution / min(width, height)
    scale = min(scale, config.max_side / max(width, height))
    size = (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _to_stored(image: Image.Image, config: DataConfig) -> EncodedImage:
    """Pixels or a JPEG. Raises UnreadableImageError if it does not fit into a page."""
    if config.stored == "raw":
        mode, data = RAW, np.asarray(image).tobytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=config.quality)
        mode, data = JPEG, buffer.getvalue()
    if len(data) > MAX_BYTES:
        raise UnreadableImageError(
            f"{len(data):,} bytes when stored (allowed: {MAX_BYTES:,}); "
            "lower data.resolution or data.max_side"
        )
    return EncodedImage(data, mode, image.height, image.width)
