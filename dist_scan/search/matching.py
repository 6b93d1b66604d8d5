"""Hungarian matching of targets with outputs (MMDC), and of the clusters of two assignments."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from dist_scan.search.agreement import contingency_table


def match_blocks(
    outputs: np.ndarray, targets: np.ndarray, block: int, rows: range | None = None
) -> np.ndarray:
    """A permutation [n] that brings targets[order] as near to outputs [n, d] as possible.

    Rows are permuted inside contiguous blocks of `block` rows only; the last may be smaller. The
    cost is the Euclidean distance, as in the paper and the released code (docs/fidelity.md); its
    square can have another optimum. With `rows`, only blocks with one of these rows are solved and
    the others stay as they are. Equal targets keep the order of their rows, so that the result does
    not depend on which of them the solver picks.
    """
    order = np.arange(len(outputs))
    for start in range(0, len(outputs), block):
        if rows is not None and (start + block <= rows.start or start >= rows.stop):
            continue
        inside = slice(start, min(start + block, len(outputs)))
        matched = linear_sum_assignment(cdist(outputs[inside], targets[inside]))[1]
        order[inside] = start + _order_equal_targets(targets[inside], matched)
    return order


def _order_equal_targets(targets: np.ndarray, matched: np.ndarray) -> np.ndarray:
    """The same targets for the same rows; of equal targets the first row gets the first."""
    group = np.unique(targets, axis=0, return_inverse=True)[1].reshape(-1)
    by_group = np.argsort(group, kind="stable")
    rows_by_group = np.argsort(group[matched], kind="stable")
    ordered = np.empty_like(matched)
    ordered[rows_by_group] = by_group
    return ordered


def match_clusters(reference: np.ndarray, other: np.ndarray, num_clusters: int) -> np.ndarray:
    """Reference cluster [num_clusters] int64 of each cluster of `other`, one-to-one.

    Hungarian matching of the two assignments [n]: as many rows as possible agree.
    """
    table = contingency_table(other, reference, num_clusters, num_clusters)
    return linear_sum_assignment(table, maximize=True)[1].astype(np.int64)
