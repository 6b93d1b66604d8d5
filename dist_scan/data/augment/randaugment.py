"""SCAN's RandAugment: four of 14 operations per image, drawn with replacement (paper, Table S2).

Images x are float [B, 3, H, W] with integers 0..255 before and after each operation, as in PIL, and
each operation equals PIL's to the bit. An operation takes a group of images with a value [n] each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.data.augment.colour import per_image
from dist_scan.data.augment.warp import rotation, warp_nearest

Operation = Callable[[Tensor, np.ndarray], Tensor]


def _round_down(x: Tensor) -> Tensor:
    """Integers in 0..255, rounded down as PIL's blend does."""
    return x.clamp(0, 255).floor_()


def _blend(x: Tensor, other: Tensor, value: np.ndarray) -> Tensor:
    """PIL's blend, in float32 as there: its rounding errors change pixels."""
    return _round_down(other + per_image(value, x) * (x - other))


def _luminance(x: Tensor) -> Tensor:
    """PIL's mode "L" in integers: (19595 R + 38470 G + 7471 B + 2^15) >> 16."""
    # Every sum is below 2^24 and therefore exact in float32.
    r, g, b = x.unbind(1)
    return torch.floor((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536)[:, None]


def autocontrast(x: Tensor, value: np.ndarray) -> Tensor:
    """Stretch each channel to 0..255."""
    low = x.amin((2, 3), keepdim=True)
    high = x.amax((2, 3), keepdim=True)
    span = (high - low).clamp_min(1).double()
    # A division of tensors: 255.0 / span is 255 times the reciprocal, with other bits than PIL's.
    scale = torch.full_like(span, 255.0) / span
    stretched = _round_down(x.double() * scale - low.double() * scale).to(x.dtype)
    return torch.where(high > low, stretched, x)


def equalize(x: Tensor, value: np.ndarray) -> Tensor:
    """Equalize each channel's histogram, in the integer steps of PIL."""
    # Histogram of each channel
    n, c, h, w = x.shape
    flat = x.reshape(n * c, h * w).long()
    counts = torch.zeros(n * c, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    # PIL's step: pixels per output value, without those of the brightest value in use
    below_top = counts.flip(1).ne(0).int().argmax(1)
    step = (h * w - counts.gather(1, 255 - below_top[:, None])) // 255
    # Table of output values; channels with one value, or fewer pixels than values, stay unchanged
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp_min(1)).clamp_max(255)
    is_usable = (step > 0) & ((counts > 0).sum(1, keepdim=True) > 1)
    return torch.where(is_usable, table.gather(1, flat), flat).view(n, c, h, w).to(x.dtype)


def rotate(x: Tensor, value: np.ndarray) -> Tensor:
    """Rotate by degrees, counter-clockwise, about the centre."""
    maps = rotation(value)
    # Translation that keeps the centre in its place
    cos, sin = maps[0, 0], maps[1, 0]
    cx, cy = x.shape[3] / 2, x.shape[2] / 2
    maps[0, 2] = cx - cos * cx + sin * cy
    maps[1, 2] = cy - sin * cx - cos * cy
    return warp_nearest(x, maps)


def solarize(x: Tensor, value: np.ndarray) -> Tensor:
    """Invert values at or above the threshold."""
    return torch.where(x < per_image(value, x), x, 255 - x)


def colour(x: Tensor, value: np.ndarray) -> Tensor:
    """Blend with the luminance."""
    return _blend(x, _luminance(x), value)


def contrast(x: Tensor, value: np.ndarray) -> Tensor:
    """Blend with the mean luminance."""
    mean = (_luminance(x).double().mean((2, 3), keepdim=True) + 0.5).floor().to(x.dtype)
    return _blend(x, mean, value)


def brightness(x: Tensor, value: np.ndarray) -> Tensor:
    """Blend with black."""
    return _blend(x, torch.zeros_like(x), value)


def sharpness(x: Tensor, value: np.ndarray) -> Tensor:
    """Blend with a 3 x 3 smoothing, which leaves the outermost pixels unchanged."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device, dtype=x.dtype)
    n, c, h, w = x.shape
    inner = F.conv2d(x.reshape(n * c, 1, h, w), kernel[None, None]).view(n, c, h - 2, w - 2)
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = torch.floor(inner / 13 + 0.5)
    return _blend(x, smooth, value)


def posterize(x: Tensor, value: np.ndarray) -> Tensor:
    """Keep int(value) bits: 4 to 7, since 8 has probability 0."""
    step = per_image(2.0 ** (8 - np.floor(value)), x)
    return torch.floor(x / step) * step


def _warp(x: Tensor, value: np.ndarray, row: int, column: int) -> Tensor:
    """The identity map with one entry set to `value`."""
    maps = rotation(np.zeros(len(value)))
    maps[row, column] = value
    return warp_nearest(x, maps)


def shear_x(x: Tensor, value: np.ndarray) -> Tensor:
    """Move each row by `value` pixels more than the one above."""
    return _warp(x, value, 0, 1)


def shear_y(x: Tensor, value: np.ndarray) -> Tensor:
    """Move each column by `value` pixels more than the one to its left."""
    return _warp(x, value, 1, 0)


def translate_x(x: Tensor, value: np.ndarray) -> Tensor:
    """Translate by a fraction of the width, in whole pixels."""
    return _warp(x, np.floor(value * x.shape[3] + 0.5), 0, 2)


def translate_y(x: Tensor, value: np.ndarray) -> Tensor:
    """Translate by a fraction of the height, in whole pixels."""
    return _warp(x, np.floor(value * x.shape[2] + 0.5), 1, 2)


def identity(x: Tensor, value: np.ndarray) -> Tensor:
    """Return the images unchanged."""
    return x


OPERATIONS: tuple[tuple[Operation, float, float], ...] = (
    (identity, 0, 1),
    (autocontrast, 0, 1),
    (equalize, 0, 1),
    (rotate, -30, 30),
    (solarize, 0, 256),
    (colour, 0.05, 0.95),
    (contrast, 0.05, 0.95),
    (brightness, 0.05, 0.95),
    (sharpness, 0.05, 0.95),
    (shear_x, -0.1, 0.1),
    (translate_x, -0.1, 0.1),
    (translate_y, -0.1, 0.1),
    (posterize, 4, 8),
    (shear_y, -0.1, 0.1),
)
"""(operation, smallest value, largest value)."""


def randaugment(x: Tensor, draws: np.ndarray, count: int = 4) -> Tensor:
    """Apply `count` random operations to each image of x [B, 3, H, W], integers 0..255.

    draws: [B, 2 * count] in [0, 1), for each operation its number and its value.
    """
    x = x.clone()
    for k in range(count):
        # Group the images by their operation
        drawn = np.floor(draws[:, 2 * k] * len(OPERATIONS)).astype(np.int64)
        for number, (apply, low, high) in enumerate(OPERATIONS):
            rows = np.flatnonzero(drawn == number)
            if len(rows) and apply is not identity:
                selected = torch.from_numpy(rows).to(x.device)
                value = low + (high - low) * draws[rows, 2 * k + 1]
                x[selected] = apply(x[selected], value)
    return x
