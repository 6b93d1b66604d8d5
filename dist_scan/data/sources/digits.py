"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_scan.config.base import ConfigError
from dist_scan.data.sources.base import Sample, Source


class DigitsSource(Source):
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("sklearn")
        if spec is None or spec.origin is None:
            raise ConfigError(
                "source 'sklearn:digits': scikit-learn is not installed; "
                "pip install scikit-learn, or give images of your own"
            )
        # The file is read without load_digits: importing scikit-learn takes two seconds.
        file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(file, delimiter=",")
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
