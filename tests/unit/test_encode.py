"""One image's bytes: what is stored, and that every kind of damage becomes a reason."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dist_scan.data.encode import JPEG, RAW, UnreadableImageError, encode
from tests.support.images import data_config, encode_image, make_image

RAW40, ORIGINAL = data_config("x", stored="raw"), data_config("x", stored="original")


def pixels(data: bytes) -> np.ndarray:
    stored = encode(data, RAW40)
    assert stored.mode == RAW
    return np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, 3)


def flat(value, dtype, **kwargs) -> bytes:
    return encode_image(Image.fromarray(np.full((48, 64), value, dtype)), **kwargs)


def test_it_imports_neither_torch_nor_ffcv() -> None:
    code = "import sys, dist_scan.data.encode; sys.exit(any(m in sys.modules for m in ('torch', 'ffcv')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_shorter_side_is_resized_as_pillow_does() -> None:
    expected = np.asarray(make_image().resize((53, 40), Image.BILINEAR))
    assert np.array_equal(pixels(encode_image(make_image())), expected)


@pytest.mark.parametrize(
    "size, expected",
    [((1, 1), (40, 40)), ((640, 64), (13, 128))],
    ids=["one pixel", "longer side capped"],
)
def test_odd_sizes(size, expected) -> None:
    assert pixels(encode_image(make_image(0, size[1], size[0]))).shape[:2] == expected


@pytest.mark.parametrize(
    "data, grey",
    [
        (flat(32896, np.uint16), 128),  # 16-bit grey: PIL alone makes it white
        (flat(200, np.int32, kind="TIFF"), 200),  # 32-bit whole numbers that hold 8-bit values
        (
            flat(0.1, np.float32, kind="TIFF"),
            26,
        ),  # float grey 0..1 is not stretched to the image's own range
        (encode_image(Image.new("L", (64, 48), 77)), 77),
        (encode_image(Image.new("RGBA", (64, 48), (77, 77, 77, 10))), 77),
        (encode_image(Image.new("P", (64, 48), 0).convert("P")), 0),
        (encode_image(Image.new("CMYK", (64, 48), (0, 0, 0, 0)), "JPEG"), 255),
    ],
    ids=["grey16", "int32", "float", "grey", "alpha", "palette", "cmyk"],
)
def test_every_mode_becomes_rgb_of_the_right_brightness(data, grey) -> None:
    assert np.abs(pixels(data).astype(int) - grey).max() <= 1


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encode_image(make_image(0, 48, 64), "JPEG", exif=exif)).shape[:2] == (53, 40)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (64, 48), (v, v, v)) for v in (10, 200)]
    assert (
        np.abs(
            pixels(encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:])).astype(
                int
            )
            - 10
        ).max()
        <= 2
    )


JPG = encode_image(make_image(), "JPEG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "zero bytes"),
        (b"hello" * 50, "cannot identify"),
        (JPG[: len(JPG) // 2], "OSError"),
        (flat(np.nan, np.float32, kind="TIFF"), "NaN or Inf"),
        (encode_image(Image.new("1", (20000, 20000))), "bomb"),
    ],
    ids=["empty", "garbage", "truncated", "nan", "bomb"],
)
def test_what_cannot_be_read_says_why(data, reason) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        encode(data, RAW40)


def test_damage_of_any_kind_is_listed_and_never_escapes() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    seeds = [
        encode_image(make_image(), "JPEG", exif=exif),
        *(encode_image(make_image(), kind) for kind in ("PNG", "GIF", "WEBP", "BMP")),
        flat(0.5, np.float32, kind="TIFF"),
    ]
    rng, listed = random.Random(0), 0
    for _ in range(1500):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(min(len(data), rng.choice([64, 400, 10**6])))] = rng.randrange(256)
        try:
            encode(bytes(data), rng.choice([RAW40, ORIGINAL]))
        except UnreadableImageError:
            listed += 1
    assert listed > 150


def test_original_passes_plain_jpegs_through_and_nothing_else() -> None:
    assert encode(JPG, ORIGINAL).data == JPG
    for data in (
        encode_image(make_image(0, 300, 400), "JPEG"),
        encode_image(make_image(0, 300, 400)),
        encode_image(Image.new("RGB", (70000, 4))),
    ):
        stored = encode(data, ORIGINAL)  # over max_side, no JPEG, wider than a JPEG can be
        assert stored.mode == JPEG and max(stored.height, stored.width) == 128
        assert Image.open(io.BytesIO(stored.data)).size == (stored.width, stored.height)


def test_names_that_are_no_utf8_stay_apart_and_tell_their_bytes() -> None:
    from dist_scan.data.beton.write import printable_name

    assert [
        printable_name(os.fsdecode(name))
        for name in (b"caf\xe9.png", b"caf\xe8.png", "café.png".encode())
    ] == ["caf\\xe9.png", "caf\\xe8.png", "café.png"]
