"""Where images come from: image folders, parquet in the Hugging Face layout, tar shards, scikit-learn's digits.

A source knows how many images it has before any is read, gives any rows in order, and is small enough to send to a worker.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from dist_scan.config import StrictModel

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LOOKED_AT = 16  # images whose bytes are part of the data's fingerprint
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SplitConfig(StrictModel):
    """One set of images."""

    source: str = Field(min_length=1)
    """An image folder, parquet file/folder/glob (image: {bytes, path}, optional label), tar shards, or sklearn:digits."""
    format: Literal["auto", "folder", "parquet", "tar", "digits"] = "auto"
    limit: int | None = Field(default=None, ge=1)
    """Take only so many images, evenly spaced over the source (a trial run)."""
    classes: str | None = None
    """A text file whose lines begin with class folder names: only these, in this order (ImageNet subsets)."""


class DataConfig(StrictModel):
    """The images of a run and how they are stored."""

    train: SplitConfig
    val: SplitConfig | None = None
    size: int = Field(default=224, ge=8)
    """Side in pixels of what the network sees."""
    stored: Literal["raw", "jpeg", "original"] = "jpeg"
    """raw: pixels; jpeg: re-encoded at `resolution`; original: JPEG bytes passed through where they already are RGB JPEG."""
    resolution: int = Field(default=256, ge=8)
    """Shorter side in pixels of what is stored (bilinear; smaller images are enlarged, as Resize does)."""
    max_side: int = Field(default=1024, ge=8)
    """Cap on the longer side of what is stored."""
    quality: int = Field(default=90, ge=1, le=100)
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Above this share of unreadable images the build refuses."""


class Sample(NamedTuple):
    """One image as it comes: its file's bytes, its label (-1 unknown), its name."""

    data: bytes
    label: int
    name: str


class Source(ABC):
    """`len(source)` images in a fixed order."""

    class_names: list[str] | None = None
    rows: np.ndarray
    """The underlying row of each image, after `limit`."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Sequence[int]) -> Iterator[Sample]:
        """The images at these places (ascending), in order."""
        return self._read([int(self.rows[i]) for i in index])

    @abstractmethod
    def _read(self, rows: list[int]) -> Iterator[Sample]: ...

    @abstractmethod
    def _facts(self) -> Iterator[str]:
        """What tells this data from other data, cheaply: names and sizes."""

    def fingerprint(self) -> str:
        """16 hex digits over the names and sizes of what is read, and the bytes of a few images: other pictures may have the same sizes."""
        digest = hashlib.sha256()
        for sample in self.read(
            np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)).tolist()
            if len(self)
            else []
        ):
            digest.update(sample.data)
        for fact in self._facts():
            digest.update(fact.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]
