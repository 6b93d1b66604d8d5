"""Where images come from. DataConfig is read by everyone; the readers follow below."""
from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_scan.config import Strict


class SplitConfig(Strict):
    """One set of images."""

    source: str
    """An image folder, parquet file/folder/glob (image: {bytes, path}, optional label), tar shards, or sklearn:digits."""
    format: Literal["auto", "folder", "parquet", "tar", "digits"] = "auto"
    limit: int | None = Field(default=None, ge=1)
    """Take only so many images, evenly spaced over the source (a trial run)."""


class DataConfig(Strict):
    """The images of a run and how they are stored."""

    train: SplitConfig
    val: SplitConfig | None = None
    size: int = Field(default=224, ge=8)
    """Side in pixels of what the network sees."""
    stored: Literal["raw", "jpeg", "original"] = "jpeg"
    """raw: pixels; jpeg: re-encoded at `resolution`; original: JPEG bytes passed through where they already are JPEG."""
    resolution: int = Field(default=256, ge=8)
    """Shorter side in pixels of what is stored (bilinear; smaller images are enlarged, as Resize does)."""
    max_side: int = Field(default=1024, ge=8)
    """Cap on the longer side of what is stored."""
    quality: int = Field(default=90, ge=1, le=100)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Above this share of unreadable images the build refuses."""
