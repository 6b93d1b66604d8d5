"""scikit-learn's handwritten digits."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_scan.config import ConfigError
from dist_scan.data.sources.base import Sample, Source


class DigitsSource(Source):
    """The 1,797 handwritten digits (8 x 8) that scikit-learn carries: real images that need no download."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("sklearn")
        if spec is None:
            raise ConfigError(
                "source 'sklearn:digits': scikit-learn is not installed; pip install scikit-learn, or give images of your own"
            )
        # Its file, not load_digits: importing scikit-learn takes every start of a run two seconds.
        table = np.loadtxt(
            Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=","
        )
        self.images, self.labels = (
            np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8),
            table[:, -1].astype(int),
        )
        self.class_names, self.rows = [str(d) for d in range(10)], np.arange(len(table))

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        from PIL import Image

        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(self.images[row]).save(buffer, "PNG")
            yield Sample(buffer.getvalue(), int(self.labels[row]), f"digit-{row:04d}.png")

    def _facts(self) -> Iterator[str]:
        yield "sklearn:digits:1797"
