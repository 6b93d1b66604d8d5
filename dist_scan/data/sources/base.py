"""Where images come from: image folders, parquet in the Hugging Face layout, tar shards, scikit-learn's digits.

A source knows how many images it has before any is read, gives any rows in order, and is small enough to send to a worker.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LOOKED_AT = 16  # images whose bytes are part of the data's fingerprint


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
