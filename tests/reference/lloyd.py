"""k-means the slow, obvious way."""

import numpy as np


def lloyd(x, centroids, iterations):
    """(centroids, assignment, sum of squared distances) after at most `iterations`; no cluster may run empty."""
    assignment = None
    for _ in range(iterations):
        new = np.array([((row - centroids) ** 2).sum(1).argmin() for row in x])
        if assignment is not None and (new == assignment).all():
            break
        assignment = new
        objective = sum(
            ((x[assignment == c] - x[assignment == c].mean(0)) ** 2).sum()
            for c in range(len(centroids))
        )
        centroids = np.stack([x[assignment == c].mean(0) for c in range(len(centroids))])
    return centroids, assignment, objective
