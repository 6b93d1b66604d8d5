"""MMDC's targets: points on the unit sphere from a Gaussian mixture, each a function of (seed, its id), none of them stored."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.special import ndtri

from dist_scan.data.hashing import uniform

COMPONENT, NOISE, MEANS = 501, 502, 503  # streams of the hash, one per use


class SphereCodes:
    """`num_drawn` codes of unit length in `dim` dimensions (Shiran and Weinshall, ICPR 2020, Sec. III-A).

    Ids 0..num_drawn-1 are the drawn ones: component uniform (so sizes are multinomial, not equal), then the component's mean plus noise
    of variance `variance` in each dimension, then normalised. Ids num_drawn..num_drawn+num_components-1 are the means themselves.
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
                f"code_dim: {dim} dimensions do not hold {num_components} one-hot means; allowed: {num_components}. "
                "Leave code_dim out, or set means: random"
            )
        self.num_drawn, self.num_components, self.dim, self.variance, self.seed = (
            num_drawn,
            num_components,
            dim,
            variance,
            seed,
        )
        if means == "one_hot":
            self.means = np.eye(num_components)
        else:  # uniform in a small cube, then normalised, as released
            self.means = _unit(
                0.2 * uniform(seed, MEANS, np.arange(num_components)[:, None], np.arange(dim)) - 0.1
            )

    def component(self, ids: np.ndarray) -> np.ndarray:
        """Which mean each id belongs to [n] int64. Raises ValueError for ids there are not."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_drawn + self.num_components):
            raise ValueError(
                f"code ids {ids.min()}..{ids.max()}: allowed 0..{self.num_drawn + self.num_components - 1}"
            )
        drawn = np.floor(uniform(self.seed, COMPONENT, ids) * self.num_components).astype(np.int64)
        return np.where(ids < self.num_drawn, drawn, ids - self.num_drawn)

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """Their places [n, dim] float64, of unit length."""
        ids = np.asarray(ids, np.int64)
        places = self.means[self.component(ids)]
        if self.variance == 0:
            return places
        half_step = 2.0**-54  # uniform draws may be 0, whose quantile is infinite
        noise = ndtri(uniform(self.seed, NOISE, ids[:, None], np.arange(self.dim)) + half_step)
        return np.where(
            (ids < self.num_drawn)[:, None], _unit(places + self.variance**0.5 * noise), places
        )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
