"""Heads among themselves, without labels: how alike they cluster, which cluster of one is which of
another, and their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_scan.search.agreement import adjusted_rand_index, contingency_table


def stability(assignments: Sequence[np.ndarray], num_clusters: int) -> list[float]:
    """Per head: the mean adjusted Rand index of its assignment [N] with the other heads'; NaN for
    a head alone.
    """
    count = len(assignments)
    between = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i):
            table = contingency_table(assignments[i], assignments[j], num_clusters, num_clusters)
            between[i, j] = between[j, i] = adjusted_rand_index(table)
    return [float(np.nanmean(row)) if count > 1 else float("nan") for row in between]


def consensus(logits: Sequence[Tensor], mappings: Sequence[Tensor]) -> Tensor:
    """The heads' mean probability [B, C] in the reference's clusters; mappings [C] int64 as
    `match_clusters` gives them.
    """
    total = torch.zeros_like(logits[0])
    for each, mapping in zip(logits, mappings):
        total[:, mapping] += each.softmax(1)
    return total / len(logits)
