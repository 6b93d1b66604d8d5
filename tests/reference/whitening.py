"""PCA whitening the slow, obvious way."""

import numpy as np


def whitened(x, dim):
    """x [N, D] to [N, dim] float64: mean 0, covariance 1, the largest entry of each axis positive."""
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(sum(np.outer(row, row) for row in centred) / len(x))
    axes = vectors.T[::-1][:dim]
    axes = np.stack([a * np.sign(a[np.abs(a).argmax()]) for a in axes])
    return centred @ axes.T / np.sqrt(values[::-1][:dim])
