"""k-means the slow, obvious way."""

from __future__ import annotations

import numpy as np


def lloyd(
    rows: np.ndarray, centroids: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(centroids, assignment, sum of squared distances) after at most `iterations`.

    No cluster may become empty.
    """
    assignment = np.full(len(rows), -1)
    objective = float("inf")
    for _ in range(iterations):
        nearest = np.array([((row - centroids) ** 2).sum(1).argmin() for row in rows])
        if (nearest == assignment).all():
            break
        assignment = nearest
        members = [rows[assignment == c] for c in range(len(centroids))]
        objective = sum(((cluster - cluster.mean(0)) ** 2).sum() for cluster in members)
        centroids = np.stack([cluster.mean(0) for cluster in members])
    return centroids, assignment, objective
