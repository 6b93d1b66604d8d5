"""What is cut out of an image, per view: a pure function of (seed, epoch, index, view). decode.py does the cutting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_scan.data.hashing import uniform_draws

CROP = 201  # this use's stream of the hash
TRIES = 10


@dataclass(frozen=True)
class CropSpec:
    """One view's geometry. Output is [size, size, 3] uint8.

    random_resized: area uniform in `scale`, log-uniform aspect in `ratio`, ten tries, then centre (torchvision's RandomResizedCrop).
    random: a uniform crop of `size`, no padding, after the shorter side is brought to `resize` (if given); of several, one by chance.
    center: the centre crop of `size` after the shorter side is brought to `resize` (the first of several).
    flip: probability of a horizontal flip.
    """

    kind: Literal["random_resized", "random", "center"]
    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int | tuple[int, ...] | None = None
    flip: float = 0.0


def crop_boxes(
    spec: CropSpec,
    height: np.ndarray,
    width: np.ndarray,
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [n, 4] int64: top, left, height, width; flips [n] bool) for images of height [n] x width [n]."""
    draws = uniform_draws(seed, epoch, index, view, 2 * TRIES + 3, CROP)
    height, width = height.astype(np.int64), width.astype(np.int64)
    flips = draws[:, -1] < spec.flip
    if spec.kind == "random_resized":
        return _random_resized(spec, height, width, draws), flips
    # the side, in stored pixels, that becomes `size` once the shorter side is `resize`
    short = np.minimum(height, width)
    side = (
        np.minimum(spec.size, short)
        if spec.resize is None
        else np.clip(np.rint(short * (spec.size / _resize(spec, draws))).astype(np.int64), 1, short)
    )
    if spec.kind == "center":
        top, left = np.rint((height - side) / 2), np.rint((width - side) / 2)
    else:
        top, left = (
            np.floor(draws[:, -3] * (height - side + 1)),
            np.floor(draws[:, -2] * (width - side + 1)),
        )
    return np.stack([top, left, side, side], 1).astype(np.int64), flips


def _resize(spec: CropSpec, draws: np.ndarray) -> int | np.ndarray:
    if isinstance(spec.resize, int):
        return spec.resize
    return (
        spec.resize[0]
        if spec.kind == "center"
        else np.array(spec.resize)[np.floor(draws[:, 0] * len(spec.resize)).astype(np.int64)]
    )


def _random_resized(
    spec: CropSpec, height: np.ndarray, width: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    low, high = spec.scale
    area = (height * width)[:, None] * (low + (high - low) * draws[:, :TRIES])
    log_low, log_high = np.log(spec.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * draws[:, TRIES : 2 * TRIES])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first, row = fits.argmax(1), np.arange(len(draws))
    whole = width / height
    centre_w = np.where(whole > spec.ratio[1], np.rint(height * spec.ratio[1]), width)
    centre_h = np.where(whole < spec.ratio[0], np.rint(width / spec.ratio[0]), height)
    found = fits.any(1)
    h, w = np.where(found, h[row, first], centre_h), np.where(found, w[row, first], centre_w)
    top = np.where(found, np.floor(draws[:, -3] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(draws[:, -2] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], 1).astype(np.int64)
