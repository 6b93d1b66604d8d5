"""Heads among themselves, without labels: how alike they cluster, which cluster of one is which of another, and their mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def shared_counts(a_N: np.ndarray, b_N: np.ndarray, num_a: int, num_b: int) -> np.ndarray:
    """Rows in cluster i of a and j of b: [num_a, num_b] int64."""
    return np.bincount(a_N.astype(np.int64) * num_b + b_N, minlength=num_a * num_b).reshape(
        num_a, num_b
    )


def adjusted_rand_index(a_N: np.ndarray, b_N: np.ndarray, num_clusters: int) -> float:
    """Adjusted Rand index of two assignments (Hubert and Arabie 1985); 1.0 when neither tells anything apart."""
    counts = shared_counts(a_N, b_N, num_clusters, num_clusters)
    pairs = lambda x: int((x * (x - 1)).sum())  # noqa: E731
    both, one, other, total = (
        pairs(counts),
        pairs(counts.sum(1)),
        pairs(counts.sum(0)),
        len(a_N) * (len(a_N) - 1),
    )
    if one == other == both:
        return 1.0
    chance = one * other / total
    return (both - chance) / ((one + other) / 2 - chance)


def stability(assignments: Sequence[np.ndarray], num_clusters: int) -> list[float]:
    """Per head: the mean adjusted Rand index of its assignment [N] with the other heads'; NaN for a head alone."""
    count = len(assignments)
    between = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i):
            between[i, j] = between[j, i] = adjusted_rand_index(
                assignments[i], assignments[j], num_clusters
            )
    return [float(np.nanmean(row)) if count > 1 else float("nan") for row in between]


def consensus(logits: Sequence[Tensor], mappings: Sequence[Tensor]) -> Tensor:
    """The heads' mean probability [B, C] in the reference's clusters; mappings [C] int64 as `match_clusters` gives them."""
    total = torch.zeros_like(logits[0])
    for each, mapping in zip(logits, mappings):
        total[:, mapping] += each.softmax(1)
    return total / len(logits)
