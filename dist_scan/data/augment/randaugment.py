"""SCAN's RandAugment-4: four of 14 operations per sample, drawn with replacement, strengths uniform in Table S2's intervals.

Images [B, 3, H, W] float hold whole numbers 0..255 between operations, as PIL's do; each operation is PIL's, on a group of samples
with a value [n] of each sample's own (FIDELITY.md 1.3: NEAREST, black fill, posterize by int(v)).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.data.augment.colour import column
from dist_scan.data.augment.warp import nearest

Operation = Callable[[Tensor, np.ndarray], Tensor]


def _whole(x: Tensor) -> Tensor:
    """Round down to whole numbers in 0..255: what PIL's blend does."""
    return x.clamp(0, 255).floor_()


def _blend(x: Tensor, other: Tensor, value: np.ndarray) -> Tensor:
    return _whole(
        other + column(value, x) * (x - other)
    )  # in float32, as PIL: it too lands just under a whole number at times


def _luma(x: Tensor) -> Tensor:
    """PIL's "L" in integers: (19595 R + 38470 G + 7471 B + 2^15) >> 16."""
    r, g, b = x.unbind(1)  # every sum is below 2^24: exact in float32
    return torch.floor((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536)[:, None]


def autocontrast(x: Tensor, value: np.ndarray) -> Tensor:
    """Stretch each channel to 0..255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    span = (high - low).clamp_min(1).double()
    scale = (
        torch.full_like(span, 255.0) / span
    )  # 255.0 / span would be 255 * reciprocal: other bits, and then other pixels than PIL's
    return torch.where(high > low, _whole(x.double() * scale - low.double() * scale).to(x.dtype), x)


def equalize(x: Tensor, value: np.ndarray) -> Tensor:
    """Flatten each channel's histogram, with PIL's integer steps."""
    n, c, h, w = x.shape
    flat = x.reshape(n * c, h * w).long()
    counts = torch.zeros(n * c, 256, dtype=torch.int64, device=x.device).scatter_add_(
        1, flat, torch.ones_like(flat)
    )
    last = counts.flip(1).ne(0).int().argmax(1)  # places from the top to the brightest value in use
    step = (h * w - counts.gather(1, 255 - last[:, None])) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp_min(1)).clamp_max(255)
    usable = (step > 0) & ((counts > 0).sum(1, keepdim=True) > 1)
    return torch.where(usable, table.gather(1, flat), flat).view(n, c, h, w).to(x.dtype)


def rotate(x: Tensor, value: np.ndarray) -> Tensor:
    """Degrees, counter-clockwise, about the centre."""
    cos, sin = np.cos(np.deg2rad(value)), np.sin(np.deg2rad(value))
    cx, cy = x.shape[3] / 2, x.shape[2] / 2
    return nearest(x, cos, -sin, sin, cos, cx - cos * cx + sin * cy, cy - sin * cx - cos * cy)


def solarize(x: Tensor, value: np.ndarray) -> Tensor:
    """Invert what is at or above the threshold."""
    return torch.where(x < column(value, x), x, 255 - x)


def colour(x: Tensor, value: np.ndarray) -> Tensor:
    """Towards grey."""
    return _blend(x, _luma(x), value)


def contrast(x: Tensor, value: np.ndarray) -> Tensor:
    """Towards the mean luminance."""
    return _blend(
        x, (_luma(x).double().mean((2, 3), keepdim=True) + 0.5).floor().to(x.dtype), value
    )


def brightness(x: Tensor, value: np.ndarray) -> Tensor:
    """Towards black."""
    return _blend(x, torch.zeros_like(x), value)


def sharpness(x: Tensor, value: np.ndarray) -> Tensor:
    """Towards a 3 x 3 smoothing that leaves the outermost pixels alone."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device, dtype=x.dtype).view(
        1, 1, 3, 3
    )
    n, c, h, w = x.shape
    smooth = x.clone()
    inner = F.conv2d(x.reshape(n * c, 1, h, w), kernel).view(n, c, h - 2, w - 2)
    smooth[:, :, 1:-1, 1:-1] = torch.floor(inner / 13 + 0.5)
    return _blend(x, smooth, value)


def posterize(x: Tensor, value: np.ndarray) -> Tensor:
    """Keep int(value) bits: 4 to 7, as 8 has probability 0."""
    step = 2.0 ** (8 - np.floor(value))
    return torch.floor(x / column(step, x)) * column(step, x)


def _affine(
    x: Tensor,
    n: int,
    across: np.ndarray | float = 0.0,
    down: np.ndarray | float = 0.0,
    left: np.ndarray | float = 0.0,
    top: np.ndarray | float = 0.0,
) -> Tensor:
    one = np.ones(n)
    return nearest(x, one, one * across, one * down, one, one * left, one * top)


def shear_x(x: Tensor, value: np.ndarray) -> Tensor:
    """Rows slide by value per row."""
    return _affine(x, len(value), across=value)


def shear_y(x: Tensor, value: np.ndarray) -> Tensor:
    """Columns slide by value per column."""
    return _affine(x, len(value), down=value)


def translate_x(x: Tensor, value: np.ndarray) -> Tensor:
    """By a share of the width, in whole pixels."""
    return _affine(x, len(value), left=np.floor(value * x.shape[3] + 0.5))


def translate_y(x: Tensor, value: np.ndarray) -> Tensor:
    """By a share of the height, in whole pixels."""
    return _affine(x, len(value), top=np.floor(value * x.shape[2] + 0.5))


def identity(x: Tensor, value: np.ndarray) -> Tensor:
    """Nothing."""
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


def randaugment(x: Tensor, draws: np.ndarray, count: int = 4) -> Tensor:
    """x [B, 3, H, W] whole numbers 0..255; draws [B, 2 * count] in [0, 1): which operation, and how strong."""
    x = x.clone()
    for k in range(count):
        picked = np.floor(draws[:, 2 * k] * len(OPERATIONS)).astype(np.int64)
        for number, (apply, low, high) in enumerate(OPERATIONS):
            rows = np.flatnonzero(picked == number)
            if len(rows) and apply is not identity:
                at = torch.from_numpy(rows).to(x.device)
                x[at] = apply(x[at], low + (high - low) * draws[rows, 2 * k + 1])
    return x
