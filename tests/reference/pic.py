"""Power iteration clustering the slow, obvious way: a dense graph and loops."""

from __future__ import annotations

import math

import numpy as np


def pic(
    ids: np.ndarray,
    squared_distances: np.ndarray,
    sigma: float,
    alpha: float,
    iterations: int,
    teleport: str,
) -> tuple[np.ndarray, int]:
    """(assignment [N], number of joined rows) from neighbours and squared distances [N, K]."""
    n = len(ids)
    graph = dense_graph(ids, squared_distances, sigma)
    v = np.full(n, 1 / n)
    for _ in range(iterations):
        v = alpha * (graph @ v) + (1 - alpha) * (v if teleport == "paper" else 1 / n)
        v = v / v.sum()

    # Clusters: rows that lead to the same root.
    root = [follow(i, graph, v) for i in range(n)]
    members = {r: [i for i in range(n) if root[i] == r] for r in set(root)}

    # Rows on their own join the first neighbour in a larger cluster.
    final, joined = list(root), 0
    for i in range(n):
        if len(members[root[i]]) == 1:
            larger = [j for j in ids[i] if len(members[root[j]]) > 1]
            if larger:
                final[i], joined = root[larger[0]], joined + 1
    number = {r: c for c, r in enumerate(sorted(set(final)))}
    return np.array([number[r] for r in final]), joined


def dense_graph(ids: np.ndarray, squared_distances: np.ndarray, sigma: float) -> np.ndarray:
    """A + A^T [N, N] with weights exp(-d^2 / sigma^2)."""
    weights = np.zeros((len(ids), len(ids)))
    for i in range(len(ids)):
        for j, squared_distance in zip(ids[i], squared_distances[i]):
            weights[i, j] = math.exp(-squared_distance / sigma**2)
    return weights + weights.T


def follow(i: int, graph: np.ndarray, v: np.ndarray) -> int:
    """The root that row i leads to: always on to the neighbour with the strongest pull."""
    while True:
        strongest, following = 0.0, i
        for j in range(len(v)):
            pull = graph[i, j] * (v[j] - v[i])
            if pull > strongest:
                strongest, following = pull, j
        if following == i:
            return i
        i = following
