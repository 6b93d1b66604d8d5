"""Encoding of one image: what is stored, and that damage of any kind becomes a reason."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dist_scan.data.beton.write import printable_name
from dist_scan.data.encode import JPEG, RAW, UnreadableImageError, encode
from tests.support.images import data_config, encode_image, make_image

RAW_CONFIG = data_config("x", stored="raw")
ORIGINAL_CONFIG = data_config("x", stored="original")
JPG = encode_image(make_image(), "JPEG")
EXIF_ORIENTATION, EXIF_MAKE = 0x0112, 0x010F


def stored_pixels(data: bytes) -> np.ndarray:
    """Pixels [H, W, 3] that are stored for a file with this content."""
    image = encode(data, RAW_CONFIG)
    assert image.mode == RAW
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)


def uniform_image(value: float, dtype: npt.DTypeLike, **options: Any) -> bytes:
    """File of a grey image with one value."""
    return encode_image(Image.fromarray(np.full((48, 64), value, dtype)), **options)


def test_module_imports_neither_torch_nor_ffcv() -> None:
    code = (
        "import sys, dist_scan.data.encode; "
        "sys.exit(any(module in sys.modules for module in ('torch', 'ffcv')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_shorter_side_is_resized_as_pillow_does() -> None:
    expected = np.asarray(make_image().resize((53, 40), Image.Resampling.BILINEAR))
    assert np.array_equal(stored_pixels(encode_image(make_image())), expected)


@pytest.mark.parametrize(
    "size, expected",
    [((1, 1), (40, 40)), ((640, 64), (13, 128))],
    ids=["one pixel", "longer side capped"],
)
def test_unusual_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    width, height = size
    assert stored_pixels(encode_image(make_image(0, height, width))).shape[:2] == expected


@pytest.mark.parametrize(
    "data, grey",
    [
        (uniform_image(32896, np.uint16), 128),  # Pillow alone makes it white
        (uniform_image(200, np.int32, kind="TIFF"), 200),  # 8-bit values in 32-bit integers
        (uniform_image(0.1, np.float32, kind="TIFF"), 26),  # not stretched to the image's range
        (encode_image(Image.new("L", (64, 48), 77)), 77),
        (encode_image(Image.new("RGBA", (64, 48), (77, 77, 77, 10))), 77),
        (encode_image(Image.new("P", (64, 48), 0).convert("P")), 0),
        (encode_image(Image.new("CMYK", (64, 48), (0, 0, 0, 0)), "JPEG"), 255),
    ],
    ids=["grey16", "int32", "float", "grey", "alpha", "palette", "cmyk"],
)
def test_every_mode_becomes_rgb_of_the_same_brightness(data: bytes, grey: int) -> None:
    assert np.abs(stored_pixels(data).astype(int) - grey).max() <= 1


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    data = encode_image(make_image(0, 48, 64), "JPEG", exif=exif)
    assert stored_pixels(data).shape[:2] == (53, 40)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (64, 48), (grey, grey, grey)) for grey in (10, 200)]
    data = encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(stored_pixels(data).astype(int) - 10).max() <= 2


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty or not readable"),
        (b"hello" * 50, "cannot identify"),
        (JPG[: len(JPG) // 2], "OSError"),
        (uniform_image(np.nan, np.float32, kind="TIFF"), "NaN or Inf"),
        (encode_image(Image.new("1", (20000, 20000))), "bomb"),
    ],
    ids=["empty", "garbage", "truncated", "nan", "bomb"],
)
def test_unreadable_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        encode(data, RAW_CONFIG)


def test_damaged_files_raise_no_other_error() -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    exif[EXIF_MAKE] = "maker"
    originals = [
        encode_image(make_image(), "JPEG", exif=exif),
        *(encode_image(make_image(), kind) for kind in ("PNG", "GIF", "WEBP", "BMP")),
        uniform_image(0.5, np.float32, kind="TIFF"),
    ]
    rng = random.Random(0)
    unreadable = 0
    for _ in range(1500):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice([1, 2, 8])):
            end = min(len(data), rng.choice([64, 400, 10**6]))
            data[rng.randrange(end)] = rng.randrange(256)
        try:
            encode(bytes(data), rng.choice([RAW_CONFIG, ORIGINAL_CONFIG]))
        except UnreadableImageError:
            unreadable += 1
    assert unreadable > 150


def test_stored_original_passes_plain_jpegs_through() -> None:
    assert encode(JPG, ORIGINAL_CONFIG).data == JPG


@pytest.mark.parametrize(
    "data",
    [
        encode_image(make_image(0, 300, 400), "JPEG"),
        encode_image(make_image(0, 300, 400)),
        encode_image(Image.new("RGB", (70000, 4))),
    ],
    ids=["over max_side", "no JPEG", "wider than a JPEG can be"],
)
def test_stored_original_encodes_other_images_again(data: bytes) -> None:
    image = encode(data, ORIGINAL_CONFIG)
    assert image.mode == JPEG
    assert max(image.height, image.width) == 128
    assert Image.open(io.BytesIO(image.data)).size == (image.width, image.height)


def test_file_names_that_are_not_utf8_stay_distinct_and_readable() -> None:
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png", "café.png".encode())]
    expected = ["caf\\xe9.png", "caf\\xe8.png", "café.png"]
    assert [printable_name(name) for name in names] == expected
