"""One image's bytes -> what is stored, or the reason why not. Imports neither torch nor ffcv: worker processes start quickly."""
from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dist_scan.data.sources import DataConfig

JPEG, RAW = 0, 1  # the .beton format's modes
MOST_PIXELS = 2**27  # a decompression bomb is a listed failure, decided from the header, before pixels are made
MOST_BYTES = 8 * 2**20 - 64  # a stored sample must fit into a page of the file


class Unreadable(ValueError):
    """Why an image was left out."""


class Stored(NamedTuple):
    """One image as it lies in the file."""

    data: bytes
    mode: int
    height: int
    width: int


def encode(data: bytes, config: DataConfig) -> Stored:
    """Decode, turn upright, make RGB, resize, store. Raises Unreadable with the reason."""
    if not data:
        raise Unreadable("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about odd metadata of images it reads well
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MOST_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} pixels (allowed: {MOST_PIXELS:,})")
            upright = image.getexif().get(0x0112, 1) == 1
            if config.stored == "original" and image.format == "JPEG" and image.mode == "RGB" and upright and len(data) <= MOST_BYTES:
                image.load()  # a truncated file is found here
                return Stored(data, JPEG, image.height, image.width)
            pixels = _rgb(ImageOps.exif_transpose(image))
    except Unreadable:
        raise
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, EOFError, MemoryError, Image.DecompressionBombError, ArithmeticError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}"[:200]) from None
    return _store(pixels if config.stored == "original" else _resize(pixels, config), config)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit and float greys are scaled (PIL would clip them to white), palettes and alpha over black."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-12)
        top = max(top, float(values.max())) if image.mode == "I" and values.max() > 65535 else top
        return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, config: DataConfig) -> Image.Image:
    scale = min(config.resolution / min(image.size), config.max_side / max(image.size))
    size = tuple(max(1, int(side * scale + 0.5)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.BILINEAR)


def _store(image: Image.Image, config: DataConfig) -> Stored:
    if config.stored == "raw":
        stored = Stored(np.asarray(image).tobytes(), RAW, image.height, image.width)
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=config.quality)
        stored = Stored(buffer.getvalue(), JPEG, image.height, image.width)
    if len(stored.data) > MOST_BYTES:
        raise Unreadable(f"{len(stored.data):,} bytes when stored (allowed: {MOST_BYTES:,}); lower data.resolution or data.max_side")
    return stored
