"""Small datasets for tests: folders of made images, and .beton files built from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source


def settings(source: Path | str, **kwargs) -> DataConfig:
    """A DataConfig of small images."""
    return DataConfig(
        train=SplitConfig(source=str(source)), **{"resolution": 40, "max_side": 128, **kwargs}
    )


def picture(seed: int = 0, height: int = 48, width: int = 64) -> Image.Image:
    """A smooth coloured picture, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def folder(root: Path, count: int = 12, kind: str = "JPEG") -> Path:
    """`count` images in two class folders."""
    for i in range(count):
        path = root / f"class{i % 2}" / f"{i:03d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i, 44 + i, 70 - i), kind))
    return root


def build(source: Path | str, out: Path, **kwargs) -> Path:
    """Build a .beton in this process."""
    config = settings(source, **kwargs)
    write_beton(open_source(config.train), out, config, 1, show=False)
    return out
