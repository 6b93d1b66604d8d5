"""Linear assignment: targets to outputs inside blocks (MMDC), new cluster numbers to old ones."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from dist_scan.search.agreement import contingency_table


def match_blocks(
    outputs: np.ndarray, targets: np.ndarray, block: int, rows: range | None = None
) -> np.ndarray:
    """order [n] such that targets[order] are as near to outputs [n, d] as a permutation inside each block of `block` rows can bring them.

    The cost is the Euclidean distance, not its square: on the sphere the two have different best permutations (FIDELITY.md 2.2). Blocks
    are contiguous, the last may be smaller. `rows`: only blocks that hold one of these are solved, the others stay as they are. Equal
    targets keep the order of their rows, so the answer does not hang on which of them the solver took.
    """
    order = np.arange(len(outputs))
    for start in range(0, len(outputs), block):
        if rows is not None and (start + block <= rows.start or start >= rows.stop):
            continue
        own = slice(start, min(start + block, len(outputs)))
        taken = linear_sum_assignment(cdist(outputs[own], targets[own]))[1]
        order[own] = start + _equal_in_order(targets[own], taken)
    return order


def _equal_in_order(targets: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The same targets for the same rows; among equal targets the first row gets the first."""
    group = np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1)
    by_group, wanted = np.argsort(group, kind="stable"), np.argsort(group[taken], kind="stable")
    out = np.empty_like(taken)
    out[wanted] = by_group
    return out


def match_clusters(reference: np.ndarray, other: np.ndarray, num_clusters: int) -> np.ndarray:
    """Reference cluster [num_clusters] int64 of each cluster of `other`, one-to-one.

    Hungarian matching of the two assignments [n]: as many rows as possible agree.
    """
    table = contingency_table(other, reference, num_clusters, num_clusters)
    return linear_sum_assignment(table, maximize=True)[1].astype(np.int64)


def relabel(labels: np.ndarray, previous: np.ndarray, num_clusters: int) -> np.ndarray:
    """labels [n], renumbered so that as many as possible equal `previous` [n]."""
    return match_clusters(previous, labels, num_clusters)[labels]
