"""Rows as search wants them: on float16's grid and short enough that a float64 inner product is exact in any order.

With values on multiples of 2^-24 and squared norms of at most 16, products are multiples of 2^-48 and partial sums stay below 2^5:
53 bits hold them. Scores then do not depend on the number of ranks, on how rows are cut, or on the BLAS (PERFORMANCE.md 1).
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dist_scan.data.tables import FeatureTable

Reader = Callable[[np.ndarray], np.ndarray]
LONGEST = 4.0


def largest_norm(table: FeatureTable, view: int) -> float:
    """The largest row norm (float64) of a view."""
    return max(float(np.sqrt(squares(table.shard(s)[:, view]).max())) for s in range(table.num_shards))


def squares(rows: np.ndarray) -> np.ndarray:
    """Squared norms [n] float64 of float16 rows, a piece at a time."""
    return np.concatenate([(rows[b:b + 8192].astype(np.float64) ** 2).sum(1) for b in range(0, len(rows), 8192)] or [np.zeros(0)])


def prepared(table: FeatureTable, normalise: bool, view: int = 0) -> tuple[Reader, float]:
    """(read(index [n]) -> [n, D] float16 ready for exact products, what scores must be multiplied with).

    normalise: to unit length. Otherwise all rows are scaled by one power of two that brings the longest to a norm of 2 to 4; rows longer
    than 4 thereby lose what falls below float16's grid, and scores are those of the scaled rows. Raises ValueError naming rows of length zero
    when they must be normalised.
    """
    if normalise:
        _refuse_zero_rows(table, view)
        return lambda index: unit_rows(table.rows(index, view)), 1.0
    scale = 2.0 ** math.floor(math.log2(LONGEST / max(largest_norm(table, view), 1e-30)))
    return lambda index: (table.rows(index, view).astype(np.float32) * np.float32(scale)).astype(np.float16), scale ** -2


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
