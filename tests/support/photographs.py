"""Crops of the photographs that come with scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_sample_image


def photographs(size: int, count: int) -> np.ndarray:
    """[count, size, size, 3] uint8, at random positions."""
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    crops = []
    for k in range(count):
        photo = photos[k % 2]
        top = rng.integers(0, photo.shape[0] - size)
        left = rng.integers(0, photo.shape[1] - size)
        crops.append(photo[top : top + size, left : left + size])
    return np.stack(crops)
