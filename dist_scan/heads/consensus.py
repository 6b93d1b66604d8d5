"""Agreement between heads, without labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_scan.search.agreement import adjusted_rand_index, contingency_table


def stability(assignments: Sequence[np.ndarray], num_clusters: int) -> list[float]:
    """Mean adjusted Rand index of each head's assignment [N] with those of the other heads.

    NaN for a single head.
    """
    count = len(assignments)
    if count == 1:
        return [float("nan")]
    agreement = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i):
            table = contingency_table(assignments[i], assignments[j], num_clusters, num_clusters)
            agreement[i, j] = agreement[j, i] = adjusted_rand_index(table)
    return [float(np.nanmean(row)) for row in agreement]


def consensus(logits: Sequence[Tensor], mappings: Sequence[Tensor]) -> Tensor:
    """Mean probability [B, C] of heads with logits [B, C], in the clusters of a reference head.

    mappings [C] int64: the reference's cluster of each cluster, as `matching.match_clusters` gives.
    """
    total = torch.zeros_like(logits[0])
    for head_logits, mapping in zip(logits, mappings):
        total[:, mapping] += head_logits.softmax(1)
    return total / len(logits)
