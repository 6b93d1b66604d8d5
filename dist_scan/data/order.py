"""Which rows make step s of epoch e on rank r: pure functions, so an epoch is the same for any number of ranks."""

from __future__ import annotations

import numpy as np

from dist_scan.data.hashing import hash_keys, uniform

ORDER, PARTNER, VIEW, HELD_OUT, DRAW, SLOT = (
    101,
    102,
    103,
    104,
    105,
    106,
)  # streams of the hash, one per use


def epoch_order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows [n] int64 shuffled: sorted by a hash of (seed, epoch, row)."""
    return rows[np.argsort(hash_keys(seed, ORDER, epoch, rows), kind="stable")]


def rank_plan(
    order: np.ndarray, global_batch: int, rank: int, world_size: int, first_step: int = 0
) -> np.ndarray:
    """[steps, b] rows of this rank from `first_step` of the epoch on; the last partial batch is dropped on all ranks.

    Rank r takes the r-th contiguous part of each global batch.
    """
    b = global_batch // world_size
    steps = len(order) // global_batch
    grid = order[: steps * global_batch].reshape(steps, world_size, b)
    return grid[first_step:, rank]


def batch_per_rank(global_batch: int, world_size: int) -> int:
    """The rows per rank. Raises ValueError with the nearest batches that divide."""
    if global_batch % world_size:
        low = global_batch // world_size * world_size
        raise ValueError(
            f"global_batch: {global_batch} does not divide over {world_size} processes; "
            f"nearest that do: {', '.join(str(v) for v in (low, low + world_size) if v)}"
        )
    return global_batch // world_size


def neighbour_columns(
    index: np.ndarray, seed: int, epoch: int, num_neighbours: int, self_as_candidate: bool
) -> np.ndarray:
    """Which neighbour each row is paired with in this epoch: uniform over columns 0..K-1; -1 means the row itself.

    `self_as_candidate` is the released code's behaviour (P(self) = 1/(K+1), FIDELITY.md 0.5).
    """
    choices = num_neighbours + self_as_candidate
    return (
        np.floor(uniform(seed, PARTNER, epoch, index) * choices).astype(np.int64)
        - self_as_candidate
    )


def cached_views(index: np.ndarray, seed: int, epoch: int, slot: int, num_views: int) -> np.ndarray:
    """Which cached view of each row stands in slot 0 (anchor) or 1 (partner) this epoch."""
    return np.floor(uniform(seed, VIEW, epoch, index, slot) * num_views).astype(np.int64)


def split_held_out(num_images: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, held-out rows), both sorted; a row's side depends on (seed, row) alone."""
    held = uniform(seed, HELD_OUT, np.arange(num_images)) < share
    return np.flatnonzero(~held), np.flatnonzero(held)


def uniform_over_labels(rows: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many rows [n] as `rows` [n], drawn so that every label of `labels` [n] that occurs is met equally often, in random order.

    DeepCluster's sampler as the paper means it (Sec. 3.2): n // L + 1 rows of each of L labels, with replacement only where a label has
    fewer; then cut to n. Rows of label -1 are never drawn. Raises ValueError when no row has a label.
    """
    kept, order, starts, sizes = _by_label(rows, labels, hash_keys(seed, DRAW, epoch, rows))
    each = len(rows) // len(sizes) + 1
    place = np.arange(each)[None]
    again = np.floor(
        uniform(seed, DRAW, epoch, -1 - np.arange(len(sizes))[:, None], place) * sizes[:, None]
    ).astype(np.int64)
    drawn = kept[order][
        (starts[:, None] + np.where(sizes[:, None] < each, again, place)).reshape(-1)
    ]
    return drawn[np.argsort(hash_keys(seed, SLOT, epoch, np.arange(len(drawn))), kind="stable")][
        : len(rows)
    ]


def released_order(rows: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """What DeepCluster's released code visits: the balanced draw above is taken for places in the list of rows sorted by label, which undoes
    the balance (FIDELITY.md 0.3). Labels are met as often as they occur; about half of the rows are not met."""
    kept, order, _, _ = _by_label(rows, labels, np.arange(len(rows)))
    places = uniform_over_labels(np.arange(len(kept)), labels[labels >= 0], seed, epoch)
    return np.resize(kept[order][places], len(rows))


def labelled_order(rows: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Every row with a label once, shuffled; where rows have none, the first ones come again at the end, so that there are n."""
    return np.resize(epoch_order(_by_label(rows, labels, rows)[0], seed, epoch), len(rows))


def _by_label(
    rows: np.ndarray, labels: np.ndarray, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rows that have a label, their order by (label, within), where each label starts in it, how many it has)."""
    known = labels >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(rows)} rows has a pseudo-label; cluster again with other settings"
        )
    order = np.lexsort((within[known], labels[known]))
    starts, sizes = np.unique(labels[known][order], return_index=True, return_counts=True)[1:]
    return rows[known], order, starts, sizes
