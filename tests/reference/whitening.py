"""PCA whitening the slow, obvious way."""

from __future__ import annotations

import numpy as np


def whitened(rows: np.ndarray, dim: int) -> np.ndarray:
    """Rows [N, D] whitened to [N, dim]: mean 0, covariance the identity.

    The entry of largest magnitude of each axis is positive.
    """
    centred = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(sum(np.outer(row, row) for row in centred) / len(rows))
    axes = vectors.T[::-1][:dim]
    axes = np.stack([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes])
    return centred @ axes.T / np.sqrt(values[::-1][:dim])
