"""Settings of the images of a run: the `data:` block."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_scan.config.base import StrictModel

STORAGE_SETTINGS = ("stored", "resolution", "max_side", "quality")
"""The settings of DataConfig that decide the bytes of a stored image."""
Positive = Annotated[float, Field(gt=0)]
Split = Literal["train", "val"]


class SplitConfig(StrictModel):
    """One set of images."""

    source: str = Field(min_length=1)
    """Where the images are: an image folder, tar shards, parquet or sklearn:digits.

    Parquet is a file, a folder or a glob with a column image: {bytes, path} and optionally label.
    """
    format: Literal["auto", "folder", "parquet", "tar", "digits"] = "auto"
    limit: int | None = Field(default=None, ge=1)
    """Use only this many images, evenly spaced over the source (for a trial run)."""
    classes: str | None = None
    """A text file with one class folder per line; only these are used, in this order.

    For subsets of ImageNet.
    """


class DataConfig(StrictModel):
    """The images of a run and how they are stored."""

    train: SplitConfig
    val: SplitConfig | None = None
    size: int = Field(default=224, ge=8)
    """Side in pixels of the network's input."""
    stored: Literal["raw", "jpeg", "original"] = "jpeg"
    """raw: pixels; jpeg: re-encoded at `resolution`; original: RGB JPEG files stay as they are."""
    resolution: int = Field(default=256, ge=8)
    """Shorter side in pixels of the stored images.

    Bilinear; smaller images are enlarged, as torchvision's Resize does.
    """
    max_side: int = Field(default=1024, ge=8, le=65535)
    """Largest longer side in pixels of the stored images; the file format has 16 bits for it."""
    quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of re-encoded images."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """The build fails if a larger share of the images cannot be read."""

    def splits(self) -> dict[Split, SplitConfig]:
        """The sets of images by name: train, and val if it is set."""
        if self.val is None:
            return {"train": self.train}
        return {"train": self.train, "val": self.val}
