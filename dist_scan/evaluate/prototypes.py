"""Which images stand for a cluster, and which it is least sure of."""

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
    """Per used cluster the rows of its `top` most confident images, the prototype first, the rest by confidence.

    The prototype is the one of them nearest (L2) to the mean of their features (the released SCAN code, FIDELITY.md
    1.10). cluster [N], -1 for none; probability [N] of that cluster; features(rows [m] int64) -> [m, D], the
    un-normalised backbone features; it is asked once per cluster, for at most `top` rows.
    Unlike the released code, which pads clusters of fewer than `top` images with foreign ones, a small cluster uses
    only its own; an empty one has no entry. `only` leaves out all clusters but these.
    """
    found, wanted = {}, None if only is None else {int(c) for c in only}
    for c, members in _members(cluster, -np.asarray(probability, np.float64), num_clusters):
        if wanted is not None and c not in wanted:
            continue
        best = members[:top]
        x = np.asarray(features(best), np.float64)
        first = int(((x - x.mean(axis=0)) ** 2).sum(axis=1).argmin())
        found[c] = [int(best[first]), *(int(i) for k, i in enumerate(best) if k != first)]
    return found


def low_confidence(
    cluster: np.ndarray, probability: np.ndarray, count: int
) -> dict[int, list[int]]:
    """Per used cluster the rows of its `count` least confident images, least confident first; ties by row."""
    num_clusters = int(np.max(cluster, initial=-1)) + 1
    return {
        c: members[:count].tolist()
        for c, members in _members(cluster, np.asarray(probability), num_clusters)
    }


def _members(
    cluster: np.ndarray, key: np.ndarray, num_clusters: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(cluster, its rows by ascending key, ties by row): one sort for all clusters."""
    cluster = np.asarray(cluster)
    order = np.lexsort((key, cluster))
    bounds = np.searchsorted(cluster[order], np.arange(num_clusters + 1))
    for c in range(num_clusters):
        if bounds[c] < bounds[c + 1]:
            yield c, order[bounds[c] : bounds[c + 1]]
