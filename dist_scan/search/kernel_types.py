"""Groups of arrays that the compiled kernels take.

They are not in kernels.py because that imports numba, which takes a second.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_NEAR = 16  # candidates kept for the nearest centroid; with more, all centroids are compared


class TopK(NamedTuple):
    """The K best rows found so far for each query, by (score descending, id ascending).

    ids [n, K] int64, scores [n, K] float64. Free places have score -inf and id N.
    """

    ids: np.ndarray
    scores: np.ndarray


class QueryBlock(NamedTuple):
    """Rows to search neighbours for.

    values [n, D] float32, ids [n], squared_norms [n] float64, and error_bound [n] float64: the
    largest difference between float32 and exact scores of the query (neighbours.py).
    """

    values: np.ndarray
    ids: np.ndarray
    squared_norms: np.ndarray
    error_bound: np.ndarray


class DatabaseRows(NamedTuple):
    """Rows to search in: values [m, D] float32 and squared_norms [m]; ids run from `start` on."""

    values: np.ndarray
    squared_norms: np.ndarray
    start: int


class Centroids(NamedTuple):
    """Centroids to compare rows with; `index.NearestCentroid` explains half_norms and margin.

    values [k, D] float32, squared_norms [k] float64, half_norms [k] float32.
    """

    values: np.ndarray
    squared_norms: np.ndarray
    half_norms: np.ndarray
    margin: np.float32


class NearCentroids(NamedTuple):
    """Candidates for the nearest centroid of n rows.

    least [n] int32: bits of the least float32 cost so far. ids and costs [n, MAX_NEAR] int32:
    centroids that were within the margin of it, and the bits of their costs. counts [n] int32: how
    many there are; MAX_NEAR + 1 stands for more than fit.
    """

    least: np.ndarray
    ids: np.ndarray
    costs: np.ndarray
    counts: np.ndarray
