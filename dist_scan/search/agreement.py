"""How much two clusterings of the same rows agree, from the pairs that occur: 10,000 clusters twice would be a table of 800 MB."""

from __future__ import annotations

import numpy as np


def mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """NMI = I / sqrt(H H) of two assignments [N] (DeepCluster's Eq. 3, the geometric variant). Rows with -1 in either are left out;
    1.0 when both put everything together, 0.0 when one does. Raises ValueError for other shapes or no row that has both.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"assignments of shape {list(first.shape)} and {list(second.shape)}; allowed: two of [N]"
        )
    both = (first >= 0) & (second >= 0)
    if not both.any():
        raise ValueError("no row has a cluster in both assignments")
    _, a, count_a = np.unique(first[both], return_inverse=True, return_counts=True)
    _, b, count_b = np.unique(second[both], return_inverse=True, return_counts=True)
    cells, joint = np.unique(a.astype(np.int64) * len(count_b) + b, return_counts=True)
    n = len(a)
    lift = (
        np.log(joint)
        + np.log(n)
        - np.log(count_a[cells // len(count_b)])
        - np.log(count_b[cells % len(count_b)])
    )
    information, entropies = float((joint / n * lift).sum()), _entropy(count_a) * _entropy(count_b)
    if len(count_a) == len(count_b) == len(cells):
        return 1.0
    return max(information, 0.0) / entropies**0.5 if entropies > 0 else 0.0


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())
