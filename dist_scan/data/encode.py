"""One image's bytes -> what is stored, or the reason why not. Imports neither torch nor ffcv: worker processes start quickly."""

from __future__ import annotations

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dist_scan.config import DataConfig

JPEG, RAW = 0, 1  # the .beton format's modes
MOST_PIXELS = (
    2**27
)  # a decompression bomb is a listed failure, decided from the header, before pixels are made
MOST_BYTES = 8 * 2**20 - 64  # a stored sample must fit into a page of the file


class UnreadableImageError(ValueError):
    """Why an image was left out."""


class EncodedImage(NamedTuple):
    """One image as it lies in the file."""

    data: bytes
    mode: int
    height: int
    width: int


def encode(data: bytes, config: DataConfig, pass_through: bool = True) -> EncodedImage:
    """Decode, turn upright, make RGB, resize, store. Raises Unreadable with the reason.

    `pass_through=False` re-encodes what stored=original would hand on untouched.
    """
    if not data:
        raise UnreadableImageError("zero bytes")
    try:
        return _encode(data, config, pass_through)
    except UnreadableImageError:
        raise
    except Exception as error:  # PIL lets struct.error and a dozen others through on damaged files; one image must not end a build
        text = re.sub(
            r" <_io\.BytesIO[^>]*>", "", f"{type(error).__name__}: {error}"
        )  # an address: the list must be the same at each build
        raise UnreadableImageError(text[:200]) from None


def _encode(data: bytes, config: DataConfig, pass_through: bool) -> EncodedImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about odd metadata of images it reads well
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise UnreadableImageError(
                f"{image.width} x {image.height} pixels (allowed: {MOST_PIXELS:,})"
            )
        if pass_through and config.stored == "original" and _as_it_is(image, len(data), config):
            image.load()  # a truncated file is found here
            return EncodedImage(data, JPEG, image.height, image.width)
        return _store(_resize(_rgb(ImageOps.exif_transpose(image)), config), config)


def _as_it_is(image: Image.Image, size: int, config: DataConfig) -> bool:
    plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    return plain and size <= MOST_BYTES and max(image.size) <= config.max_side


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit and float greys are scaled (PIL would clip them to white), palettes and alpha over black."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            raise UnreadableImageError("has pixels that are no numbers")
        return Image.fromarray(
            np.clip(values / _top(image, float(values.max())) * 255 + 0.5, 0, 255).astype(np.uint8)
        ).convert("RGB")
    return image.convert("RGB")


def _top(image: Image.Image, most: float) -> float:
    """What counts as white: by the format where it says, else the smallest usual range that holds the values."""
    if image.mode.startswith("I;16") or image.format == "PNG":
        return 65535.0
    return next(
        (top for top in (1.0, 255.0, 65535.0) if most <= top and (top > 1 or image.mode == "F")),
        most,
    )


def _resize(image: Image.Image, config: DataConfig) -> Image.Image:
    wanted = 1.0 if config.stored == "original" else config.resolution / min(image.size)
    scale = min(wanted, config.max_side / max(image.size))
    size = tuple(max(1, int(side * scale + 0.5)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.BILINEAR)


def _store(image: Image.Image, config: DataConfig) -> EncodedImage:
    if config.stored == "raw":
        stored = EncodedImage(np.asarray(image).tobytes(), RAW, image.height, image.width)
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=config.quality)
        stored = EncodedImage(buffer.getvalue(), JPEG, image.height, image.width)
    if len(stored.data) > MOST_BYTES:
        raise UnreadableImageError(
            f"{len(stored.data):,} bytes when stored (allowed: {MOST_BYTES:,}); lower data.resolution or data.max_side"
        )
    return stored
