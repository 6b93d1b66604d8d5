"""Agreement of two clusterings of the same rows: counts, entropy, information, Rand index."""

from __future__ import annotations

import numpy as np


def contingency_table(
    first: np.ndarray, second: np.ndarray, num_first: int, num_second: int
) -> np.ndarray:
    """Counts [num_first, num_second] int64 of the rows in cluster i of `first` and j of `second`.

    Both hold one cluster id per row, [n] integers, all of them in range.
    """
    cells = first.astype(np.int64) * num_second + second
    return np.bincount(cells, minlength=num_first * num_second).reshape(num_first, num_second)


def entropy(sizes: np.ndarray) -> float:
    """Entropy in nats of the cluster sizes [num_clusters]; empty clusters are left out."""
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def mutual_information(
    counts: np.ndarray, first_sizes: np.ndarray, second_sizes: np.ndarray, total: int
) -> float:
    """Mutual information in nats from the non-empty cells of a contingency table.

    ``counts`` [m] are the rows of each cell, ``first_sizes`` and ``second_sizes`` [m] the sizes of
    the two clusters that meet in it, ``total`` all rows. No second dense table is needed.
    """
    ratio = np.log(counts) + np.log(total) - np.log(first_sizes) - np.log(second_sizes)
    return max(float((counts / total * ratio).sum()), 0.0)


def assignment_nmi(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised mutual information I(A; B) / sqrt(H(A) H(B)) of two assignments [N].

    DeepCluster, Eq. 3 (the geometric variant). Rows that are -1 in either are left out. Only pairs
    of clusters that occur are counted: a dense table of 10,000 by 10,000 clusters takes 800 MB.

    Returns 1.0 if both are the same partition, else 0.0 if one of them is a single cluster. Raises
    ValueError if the shapes differ or no row has a cluster in both.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"assignments of shape {list(first.shape)} and {list(second.shape)}; "
            "allowed: two of the same length [N]"
        )
    known = (first >= 0) & (second >= 0)
    if not known.any():
        raise ValueError("no row has a cluster in both assignments")
    _, rows, row_sizes = np.unique(first[known], return_inverse=True, return_counts=True)
    _, columns, column_sizes = np.unique(second[known], return_inverse=True, return_counts=True)
    num_columns = len(column_sizes)
    cells, counts = np.unique(rows.astype(np.int64) * num_columns + columns, return_counts=True)
    if len(row_sizes) == num_columns == len(cells):
        return 1.0
    information = mutual_information(
        counts, row_sizes[cells // num_columns], column_sizes[cells % num_columns], len(rows)
    )
    entropies = entropy(row_sizes) * entropy(column_sizes)
    return information / entropies**0.5 if entropies > 0 else 0.0


def adjusted_rand_index(table: np.ndarray) -> float | None:
    """Adjusted Rand index of a contingency table (Hubert and Arabie 1985), exact in integers.

    1.0 if both partitions are all in one or all alone; None for a table without rows.
    """
    total = int(table.sum())
    if not total:
        return None
    both = _ordered_pairs(table.reshape(-1))
    first = _ordered_pairs(table.sum(axis=1))
    second = _ordered_pairs(table.sum(axis=0))
    pairs = total * (total - 1)
    if first == second == both:
        return 1.0
    return 2 * (both * pairs - first * second) / ((first + second) * pairs - 2 * first * second)


def _ordered_pairs(sizes: np.ndarray) -> int:
    """Ordered pairs of rows in the same group; a Python integer, so products are exact."""
    return int((sizes * (sizes - 1)).sum())
