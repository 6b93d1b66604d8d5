"""Small data sets for tests: folders of generated images, and .beton files built from them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source


def data_config(source: Path | str, **settings: Any) -> DataConfig:
    """A DataConfig for small images."""
    small = {"resolution": 40, "max_side": 128}
    return DataConfig(train=SplitConfig(source=str(source)), **small | settings)


def make_image(seed: int = 0, height: int = 48, width: int = 64) -> Image.Image:
    """A smooth coloured image, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The content of the image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_image_folder(root: Path, count: int = 12, kind: str = "JPEG") -> Path:
    """Write ``count`` images into two class folders; returns ``root``."""
    for i in range(count):
        path = root / f"class{i % 2}" / f"{i:03d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(make_image(i, 44 + i, 70 - i), kind))
    return root


def build_beton(source: Path | str, out: Path, **settings: Any) -> Path:
    """Build a .beton file in this process; returns ``out``."""
    config = data_config(source, **settings)
    write_beton(open_source(config.train), out, config, 1, show_progress=False)
    return out
