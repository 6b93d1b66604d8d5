"""MMDC's targets: points on the unit sphere from a Gaussian mixture.

Each is a function of (seed, its id); none is stored.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.special import ndtri

from dist_scan.data.hashing import uniform
from dist_scan.data.order import check_rows

# Streams of the hash, one per use
COMPONENT, NOISE, MEANS = 511, 512, 513


class SphereCodes:
    """Codes of unit length in `dim` dimensions (Shiran and Weinshall, ICPR 2020, Sec. III-A).

    Ids 0..num_drawn-1 are drawn: a component uniformly (so that their sizes are multinomial, not
    equal), then its mean plus noise of variance `variance` in each dimension, then normalised. Ids
    num_drawn..num_drawn+num_components-1 are the means themselves.
    """

    def __init__(
        self,
        num_drawn: int,
        num_components: int,
        dim: int,
        means: Literal["one_hot", "random"],
        variance: float,
        seed: int,
    ) -> None:
        if means == "one_hot" and dim != num_components:
            raise ValueError(
                f"code_dim: {dim} dimensions do not hold {num_components} one-hot means; "
                f"allowed: {num_components}. Leave code_dim out, or set means: random"
            )
        self.num_drawn = num_drawn
        self.num_components = num_components
        self.dim = dim
        self.variance = variance
        self.seed = seed
        if means == "one_hot":
            self.means = np.eye(num_components)
        else:
            # As released: uniform in a small cube, then normalised.
            draws = uniform(seed, MEANS, np.arange(num_components)[:, None], np.arange(dim))
            self.means = _normalise(0.2 * draws - 0.1)

    def component(self, ids: np.ndarray) -> np.ndarray:
        """Mixture component [n] int64 of each id. Raises ValueError for ids out of range."""
        ids = np.asarray(ids, np.int64)
        check_rows(ids, self.num_drawn + self.num_components, "ids of codes")
        drawn = np.floor(uniform(self.seed, COMPONENT, ids) * self.num_components).astype(np.int64)
        return np.where(ids < self.num_drawn, drawn, ids - self.num_drawn)

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """Codes [n, dim] float64, of unit length."""
        ids = np.asarray(ids, np.int64)
        means = self.means[self.component(ids)]
        if self.variance == 0:
            return means
        # Uniform draws may be 0, whose quantile is infinite.
        half_step = 2.0**-54
        noise = ndtri(uniform(self.seed, NOISE, ids[:, None], np.arange(self.dim)) + half_step)
        drawn = _normalise(means + self.variance**0.5 * noise)
        return np.where((ids < self.num_drawn)[:, None], drawn, means)


def _normalise(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
