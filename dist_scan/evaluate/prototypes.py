"""The prototype and the most and least confident images of each cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np


def find_prototypes(
    cluster: np.ndarray,
    probability: np.ndarray,
    features: Callable[[np.ndarray], np.ndarray],
    num_clusters: int,
    top: int = 10,
    only: Collection[int] | None = None,
) -> dict[int, list[int]]:
    """Rows of the ``top`` most confident images of each non-empty cluster, prototype first.

    As in SCAN's released code, the prototype is the image nearest (L2) to the mean of their
    features; the others follow by confidence. A cluster with fewer images uses only its own; the
    released code fills it up with images of other clusters.

    cluster [N], -1 for none; probability [N] of that cluster; ``features(rows [m])`` returns the
    backbone's features [m, D], not normalised, and is called once per cluster. ``only`` selects
    clusters.
    """
    selected = range(num_clusters) if only is None else {int(c) for c in only}
    found = {}
    for c, members in _sorted_members(cluster, -probability, num_clusters):
        if c not in selected:
            continue
        best = members[:top]
        # The prototype is the image nearest to the mean of the most confident ones.
        x = np.asarray(features(best), np.float64)
        prototype = int(((x - x.mean(axis=0)) ** 2).sum(axis=1).argmin())
        found[c] = [int(best[prototype]), *np.delete(best, prototype).tolist()]
    return found


def low_confidence(
    cluster: np.ndarray, probability: np.ndarray, count: int
) -> dict[int, list[int]]:
    """Rows of the ``count`` least confident images of each non-empty cluster, least first."""
    num_clusters = int(np.max(cluster, initial=-1)) + 1
    members = _sorted_members(cluster, probability, num_clusters)
    return {c: rows[:count].tolist() for c, rows in members}


def _sorted_members(
    cluster: np.ndarray, key: np.ndarray, num_clusters: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Each non-empty cluster and its rows by ascending key, ties by row. Sorts only once."""
    order = np.lexsort((key, cluster))
    bounds = np.searchsorted(cluster[order], np.arange(num_clusters + 1))
    for c in range(num_clusters):
        if bounds[c] < bounds[c + 1]:
            yield c, order[bounds[c] : bounds[c + 1]]
