"""Base class of the sources of images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NUM_FINGERPRINTED = 16  # images whose bytes are part of a source's fingerprint


class Sample(NamedTuple):
    """One image as it is stored in its source."""

    data: bytes
    """Content of its file; empty if that cannot be read."""
    label: int
    """Class number; -1 if unknown."""
    name: str


class Source(ABC):
    """`len(source)` images in a fixed order.

    The number of images is known before any is read. Worker processes receive a copy by pickle.
    """

    class_names: list[str] | None = None
    rows: np.ndarray
    """Row in the underlying files of each image; with a `limit`, a subset of all rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Sequence[int]) -> Iterator[Sample]:
        """The images at these indices (ascending), in order."""
        return self._read([int(self.rows[i]) for i in index])

    @abstractmethod
    def _read(self, rows: list[int]) -> Iterator[Sample]:
        """The images in these rows of the underlying files."""

    @abstractmethod
    def _description(self) -> Iterator[str]:
        """Names and sizes of what is read: part of the fingerprint, and fast to collect."""

    def fingerprint(self) -> str:
        """16 hex digits that identify the images.

        sha256 of all names and sizes, and of the bytes of a few images: other images may have the
        same names and sizes.
        """
        digest = hashlib.sha256()
        if len(self):
            index = np.linspace(0, len(self) - 1, NUM_FINGERPRINTED).astype(int)
            for sample in self.read(np.unique(index).tolist()):
                digest.update(sample.data)
        for text in self._description():
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]
