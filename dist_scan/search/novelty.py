"""How unlike the training images new images are: cosine distance to the nearest training row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.exact_rows import unit_rows
from dist_scan.search.neighbours import RunningSearch

CHUNK_ROWS = 65_536  # training rows at a time


def nearest_row(
    features: np.ndarray,
    table: FeatureTable,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of view 0 for each of `features` [n, D], exactly.

    Returns (cosine distance [n] float32, row [n] int64); of equally near rows the first. Features
    of zeros have distance 1 from every row. `advance(rows)` is called after every chunk. Raises
    ValueError when the widths differ.
    """
    from dist_scan.search.index import thread_pool

    if features.shape[1] != table.dim:
        raise ValueError(
            f"features of width {features.shape[1]} against a table of width {table.dim}; "
            "give the table made with the same backbone"
        )
    no_ids = np.full(len(features), -1)
    queries = _unit_or_zero(features).astype(np.float32)
    search = RunningSearch(no_ids, queries, 1, table.num_rows, is_l2=False)
    with thread_pool() as pool:
        for start in range(0, table.num_rows, CHUNK_ROWS):
            index = np.arange(start, min(start + CHUNK_ROWS, table.num_rows))
            search.add_chunk(_unit_or_zero(table.rows(index)), start, pool)
            advance(len(index))
    distance = np.maximum(1 - search.top.scores[:, 0], 0).astype(np.float32)
    return distance, search.top.ids[:, 0]


def _unit_or_zero(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length; rows of zeros stay zero."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(unit_rows(rows))


def training_distances(table: NeighbourTable) -> np.ndarray:
    """Cosine distances [N] of the training images to their nearest neighbours, ascending.

    The metric of the table must be cosine.
    """
    shards = range(table.num_shards)
    scores = [table.rows(np.arange(*table.shard_range(s)))[1][:, 0] for s in shards]
    return np.sort(np.maximum(1 - np.concatenate(scores), 0).astype(np.float32))


def fraction_nearer(distance: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Fraction [n] float32 of `training` distances below each `distance` [n]; near 1: novel.

    training: ascending distances of the training images to their nearest neighbours.
    """
    return (np.searchsorted(training, distance, side="left") / len(training)).astype(np.float32)
