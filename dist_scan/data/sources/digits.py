"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.metadata import distribution

import numpy as np

from dist_scan.data.sources.base import Sample, Source


class DigitsSource(Source):
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""

    def __init__(self) -> None:
        # The file is read without load_digits: importing scikit-learn takes two seconds.
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        table = np.loadtxt(str(file), delimiter=",")
        pixels = table[:, :-1].reshape(-1, 8, 8)
        self.images = np.round(pixels * (255 / 16)).astype(np.uint8)
        self.labels = table[:, -1].astype(int)
        self.class_names = [str(digit) for digit in range(10)]
        self.rows = np.arange(len(table))

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        from PIL import Image

        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(self.images[row]).save(buffer, "PNG")
            yield Sample(buffer.getvalue(), int(self.labels[row]), f"digit-{row:04d}.png")

    def _description(self) -> Iterator[str]:
        yield "sklearn:digits:1797"
