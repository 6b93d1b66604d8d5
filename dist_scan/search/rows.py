"""Rows as search wants them: on float16's grid and short enough that a float64 inner product is exact in any order.

With values on multiples of 2^-24 and squared norms of at most 16, products are multiples of 2^-48 and partial sums stay below 2^5:
53 bits hold them. Scores then do not depend on the number of ranks, on how rows are cut, or on the BLAS (PERFORMANCE.md 1).
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dist_scan.data.tables import FeatureTable

Reader = Callable[[int, int], np.ndarray]


def largest_norm(table: FeatureTable, view: int) -> float:
    """The largest row norm (float64) of a view."""
    return max(float(np.sqrt((table.shard(s)[:, view].astype(np.float64) ** 2).sum(1)).max()) for s in range(table.num_shards))


def prepared(table: FeatureTable, normalise: bool, view: int = 0) -> tuple[Reader, float]:
    """(read(start, stop) -> [n, D] float16 ready for exact products, what scores must be multiplied with).

    normalise: to unit length. Otherwise all rows are scaled by one power of two, so that no norm exceeds 2.
    Raises ValueError naming rows of length zero when they must be normalised.
    """
    if normalise:
        _refuse_zero_rows(table, view)
        return lambda start, stop: unit_rows(table.rows(np.arange(start, stop), view)), 1.0
    scale = 2.0 ** -max(0, math.ceil(math.log2(max(largest_norm(table, view), 1e-30) / 2)))
    return lambda start, stop: (table.rows(np.arange(start, stop), view).astype(np.float64) * scale).astype(np.float16), scale ** -2


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """[n, D] to unit length, in float64, rounded to float16."""
    wide = rows.astype(np.float64)
    return (wide / np.sqrt((wide * wide).sum(1, keepdims=True))).astype(np.float16)


def _refuse_zero_rows(table: FeatureTable, view: int) -> None:
    for s in range(table.num_shards):
        zero = np.flatnonzero(~table.shard(s)[:, view].any(1))
        if len(zero):
            raise ValueError(f"features of rows {(zero[:8] + table.shard_range(s)[0]).tolist()} are all zero and have no direction; "
                             "use another metric (l2, inner_product), or look at these images")
