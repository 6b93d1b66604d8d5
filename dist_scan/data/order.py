"""Rows of each step of an epoch, as pure functions of (seed, epoch).

An epoch is the same for any number of ranks: a rank takes its part of each global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_scan.data.hashing import hash_keys, uniform

# Streams of the hash, one per use.
ORDER, NEIGHBOUR, VIEW, HELD_OUT, DRAW, SLOT, REPEAT = range(101, 108)


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


def batch_per_rank(global_batch: int, world_size: int) -> int:
    """Rows per rank and step. Raises ValueError if the global batch is not divisible."""
    if global_batch % world_size:
        low = global_batch // world_size * world_size
        nearest = [str(batch) for batch in (low, low + world_size) if batch]
        raise ValueError(
            f"global_batch: {global_batch} is not divisible by {world_size} processes; "
            f"nearest that are: {', '.join(nearest)}"
        )
    return global_batch // world_size


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


def uniform_over_labels(rows: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """n rows drawn from `rows` [n] so that each label of `labels` [n] is equally frequent.

    DeepCluster's sampler (Caron et al. 2018, Sec. 3.3): n // L + 1 rows of each of the L labels
    that occur, with replacement only for labels with fewer rows, then shuffled and cut to n. Rows
    with label -1 are never drawn. Raises ValueError if no row has a label.
    """
    # Rows of each label, shuffled
    groups = _group_by_label(rows, labels, hash_keys(seed, DRAW, epoch, rows))
    sizes = groups.sizes[:, None]
    num_labels = len(sizes)
    per_label = len(rows) // num_labels + 1
    # A large group gives its first rows, a small one is drawn from with replacement
    place = np.arange(per_label)[None]
    label = np.arange(num_labels)[:, None]
    random_place = np.floor(uniform(seed, REPEAT, epoch, label, place) * sizes).astype(np.int64)
    place = np.where(sizes < per_label, random_place, place)
    drawn = groups.rows[(groups.starts[:, None] + place).reshape(-1)]
    # Shuffle the labels' rows together
    shuffled = np.argsort(hash_keys(seed, SLOT, epoch, np.arange(len(drawn))), kind="stable")
    return drawn[shuffled][: len(rows)]


def released_order(rows: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """n rows as DeepCluster's released code visits them.

    The released code uses the sampled rows as positions in the list of rows sorted by label. This
    undoes the balance: labels are as frequent as in the data, and about half of the rows are never
    visited.
    """
    by_label = _group_by_label(rows, labels, np.arange(len(rows))).rows
    positions = uniform_over_labels(np.arange(len(by_label)), labels[labels >= 0], seed, epoch)
    return np.resize(by_label[positions], len(rows))


def labelled_order(rows: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Every row that has a label once, shuffled; the first ones are repeated to give n rows."""
    return np.resize(epoch_order(rows[_has_label(labels)], seed, epoch), len(rows))


class _LabelGroups(NamedTuple):
    """Rows with a label, sorted by it: rows [m], and the first position and size [L] per label."""

    rows: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


def _group_by_label(rows: np.ndarray, labels: np.ndarray, sort_key: np.ndarray) -> _LabelGroups:
    """Group the rows that have a label; `sort_key` [n] orders the rows of one label."""
    known = _has_label(labels)
    order = np.lexsort((sort_key[known], labels[known]))
    _, starts, sizes = np.unique(labels[known][order], return_index=True, return_counts=True)
    return _LabelGroups(rows[known][order], starts, sizes)


def _has_label(labels: np.ndarray) -> np.ndarray:
    """Mask [n] of the rows with a label. Raises ValueError if there is none."""
    known = labels >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(labels)} rows has a pseudo-label; "
            "change the settings of the clustering"
        )
    return known
