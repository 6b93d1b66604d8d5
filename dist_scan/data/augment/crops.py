"""Crop boxes and flips of each view, as a pure function of (seed, epoch, row, view).

beton/crop_kernel.py decodes the images and cuts the boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_scan.data.hashing import uniform_draws

CROP = 201  # stream of random numbers, see data/hashing.py
TRIES = 10  # of a random resized crop, as in torchvision


@dataclass(frozen=True)
class CropSpec:
    """Geometry of one view; the output is [size, size, 3] uint8."""

    kind: Literal["random_resized", "random", "center"]
    """random_resized: torchvision's RandomResizedCrop: area uniform in `scale`, aspect ratio
    log-uniform in `ratio`, the first of ten tries that fits, else the centre.

    random: crop of `size` at a uniform position, no padding.
    center: crop of `size` at the centre.
    """
    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int | tuple[int, ...] | None = None
    """random and center: resize the shorter side to this before the crop; None: no resize.

    Of several values random draws one per image, and center takes the first.
    """
    flip: float = 0.0
    """Probability of a horizontal flip."""


def crop_boxes(
    spec: CropSpec,
    height: np.ndarray,
    width: np.ndarray,
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [n, 4] int64: top, left, height, width; flips [n] bool) in stored pixels.

    height, width: [n] sizes of the stored images in the dataset rows `index` [n].
    """
    draws = uniform_draws(seed, epoch, index, view, 2 * TRIES + 3, CROP)
    height, width = height.astype(np.int64), width.astype(np.int64)
    flips = draws[:, -1] < spec.flip
    if spec.kind == "random_resized":
        return _random_resized(spec, height, width, draws), flips
    # A square of the resized image, in stored pixels
    side = _side(spec, np.minimum(height, width), draws)
    if spec.kind == "center":
        top = np.rint((height - side) / 2)
        left = np.rint((width - side) / 2)
    else:
        top = np.floor(draws[:, -3] * (height - side + 1))
        left = np.floor(draws[:, -2] * (width - side + 1))
    return np.stack([top, left, side, side], 1).astype(np.int64), flips


def _side(spec: CropSpec, shorter: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[n] side in stored pixels that becomes `size` when the shorter side is resized."""
    if spec.resize is None:
        return np.minimum(spec.size, shorter)
    sizes = np.atleast_1d(spec.resize)
    if spec.kind == "center":
        resize = sizes[:1]
    else:
        resize = sizes[np.floor(draws[:, 0] * len(sizes)).astype(np.int64)]
    return np.clip(np.rint(shorter * (spec.size / resize)).astype(np.int64), 1, shorter)


def _random_resized(
    spec: CropSpec, height: np.ndarray, width: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Boxes [n, 4] of torchvision's RandomResizedCrop."""
    # Size of every try, [n, TRIES]
    low, high = spec.scale
    area = (height * width)[:, None] * (low + (high - low) * draws[:, :TRIES])
    log_low, log_high = np.log(spec.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * draws[:, TRIES : 2 * TRIES])
    w = np.rint(np.sqrt(area * ratio))
    h = np.rint(np.sqrt(area / ratio))

    # The first try that fits into the image
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.argmax(1)
    found = fits.any(1)

    # Without one: the largest centre crop with an allowed aspect ratio
    aspect = width / height
    centre_w = np.where(aspect > spec.ratio[1], np.rint(height * spec.ratio[1]), width)
    centre_h = np.where(aspect < spec.ratio[0], np.rint(width / spec.ratio[0]), height)
    row = np.arange(len(draws))
    h = np.where(found, h[row, first], centre_h)
    w = np.where(found, w[row, first], centre_w)
    top = np.where(found, np.floor(draws[:, -3] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(draws[:, -2] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)
