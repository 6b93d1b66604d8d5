"""Rows of each step of an epoch, as pure functions of (seed, epoch).

An epoch is the same for any number of ranks: a rank takes its part of each global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_scan.data.hashing import hash_keys, uniform

# Streams of random numbers, one per use; see data/hashing.py.
ORDER, NEIGHBOUR, VIEW, HELD_OUT, DRAW, SHUFFLE, REPEAT = range(101, 108)


def check_rows(rows: np.ndarray, num_rows: int, where: object) -> None:
    """Raise ValueError if a row is outside 0..num_rows - 1; `where` begins the message."""
    if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
        raise ValueError(
            f"{where}: rows {rows.min()}..{rows.max()} are out of range; allowed: 0..{num_rows - 1}"
        )


def epoch_order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows [n] int64, shuffled: sorted by a hash of (seed, epoch, row)."""
    return rows[np.argsort(hash_keys(seed, ORDER, epoch, rows), kind="stable")]


def rank_plan(
    order: np.ndarray, global_batch: int, rank: int, world_size: int, first_step: int = 0
) -> np.ndarray:
    """[steps, b] rows of this rank, from `first_step` of the epoch on.

    Rank r takes the r-th contiguous part of each global batch. The last partial batch is dropped.
    """
    per_rank = global_batch // world_size
    steps = len(order) // global_batch
    grid = order[: steps * global_batch].reshape(steps, world_size, per_rank)
    return grid[first_step:, rank]


def check_divisible(global_batch: int, world_size: int) -> None:
    """Raise ValueError if the global batch is not divisible by the number of ranks."""
    if global_batch % world_size:
        low = global_batch // world_size * world_size
        nearest = [str(batch) for batch in (low, low + world_size) if batch]
        raise ValueError(
            f"global_batch: {global_batch} is not divisible by {world_size} processes; "
            f"nearest that are: {', '.join(nearest)}"
        )


def neighbour_columns(
    index: np.ndarray, seed: int, epoch: int, num_neighbours: int, self_as_candidate: bool
) -> np.ndarray:
    """Column of the neighbour table that each row is paired with in this epoch; -1: the row itself.

    Uniform over 0..K-1. With `self_as_candidate` uniform over -1..K-1, as in SCAN's released code.
    """
    num_choices = num_neighbours + self_as_candidate
    choice = np.floor(uniform(seed, NEIGHBOUR, epoch, index) * num_choices).astype(np.int64)
    return choice - self_as_candidate


def cached_views(index: np.ndarray, seed: int, epoch: int, slot: int, num_views: int) -> np.ndarray:
    """Cached view of each row in this epoch, for slot 0 (anchor) or slot 1 (neighbour)."""
    return np.floor(uniform(seed, VIEW, epoch, index, slot) * num_views).astype(np.int64)


def split_held_out(num_images: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows), both sorted.

    Whether a row is held out depends on (seed, row) alone.
    """
    is_held_out = uniform(seed, HELD_OUT, np.arange(num_images)) < share
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def uniform_over_clusters(
    rows: np.ndarray, clusters: np.ndarray, seed: int, epoch: int
) -> np.ndarray:
    """n rows drawn from `rows` [n] so that each cluster of `clusters` [n] is equally frequent.

    DeepCluster's sampler (Caron et al. 2018, Sec. 3.3): n // C + 1 rows of each of the C clusters
    that occur, with replacement only for clusters with fewer rows, then shuffled and cut to n. Rows
    with cluster -1 are never drawn. Raises ValueError if no row has a cluster.
    """
    # Rows of each cluster, shuffled
    groups = _group_by_cluster(rows, clusters, hash_keys(seed, DRAW, epoch, rows))
    sizes = groups.sizes[:, None]
    num_clusters = len(sizes)
    per_cluster = len(rows) // num_clusters + 1
    # A large group gives its first rows, a small one is drawn from with replacement
    place = np.arange(per_cluster)[None]
    cluster = np.arange(num_clusters)[:, None]
    random_place = np.floor(uniform(seed, REPEAT, epoch, cluster, place) * sizes).astype(np.int64)
    place = np.where(sizes < per_cluster, random_place, place)
    drawn = groups.rows[(groups.starts[:, None] + place).reshape(-1)]
    # Shuffle the clusters' rows together
    shuffled = np.argsort(hash_keys(seed, SHUFFLE, epoch, np.arange(len(drawn))), kind="stable")
    return drawn[shuffled][: len(rows)]


def released_order(rows: np.ndarray, clusters: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """n rows as DeepCluster's released code visits them.

    The released code uses the sampled rows as positions in the list of rows sorted by cluster. This
    undoes the balance: clusters are as frequent as in the data, and about half of the rows are
    never visited.
    """
    by_cluster = _group_by_cluster(rows, clusters, np.arange(len(rows))).rows
    positions = uniform_over_clusters(
        np.arange(len(by_cluster)), clusters[clusters >= 0], seed, epoch
    )
    return np.resize(by_cluster[positions], len(rows))


def clustered_order(rows: np.ndarray, clusters: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Every row that has a cluster once, shuffled; the first ones are repeated to give n rows."""
    return np.resize(epoch_order(rows[_has_cluster(clusters)], seed, epoch), len(rows))


class _ClusterGroups(NamedTuple):
    """Rows with a cluster, sorted by it: rows [m], first position and size [C] of each cluster."""

    rows: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


def _group_by_cluster(
    rows: np.ndarray, clusters: np.ndarray, sort_key: np.ndarray
) -> _ClusterGroups:
    """Group the rows that have a cluster; `sort_key` [n] orders the rows of one cluster."""
    known = _has_cluster(clusters)
    order = np.lexsort((sort_key[known], clusters[known]))
    _, starts, sizes = np.unique(clusters[known][order], return_index=True, return_counts=True)
    return _ClusterGroups(rows[known][order], starts, sizes)


def _has_cluster(clusters: np.ndarray) -> np.ndarray:
    """Mask [n] of the rows with a cluster. Raises ValueError if there is none."""
    known = clusters >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(clusters)} rows has a cluster; "
            "lower method.num_clusters, or set method.clustering: kmeans"
        )
    return known
