"""Affine warps on batches, a map of each sample's own, black outside. The maps are tables of [B] numbers; grids are made on the device."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ONE = 65536  # 16.16 fixed point


def nearest(
    x: Tensor,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    d: np.ndarray,
    left: np.ndarray,
    top: np.ndarray,
) -> Tensor:
    """PIL's Image.transform(AFFINE, NEAREST): the output pixel whose centre is (x, y) is the input pixel that holds the point
    (a x + b y + left, c x + d y + top). x [B, C, H, W]; the numbers [B].

    In 16.16 fixed point as PIL does it: grid_sample's nearest rounds ties otherwise and reads another pixel in 1 of 10,000.
    """
    n, channels, h, w = x.shape
    maps = (a, b, left + 0.5 * (a + b)), (c, d, top + 0.5 * (c + d))
    table = torch.from_numpy(np.floor(np.array(maps) * ONE + 0.5).astype(np.int64)).to(x.device)[
        ..., None, None
    ]  # [2, 3, B, 1, 1]
    xs, ys = torch.arange(w, device=x.device), torch.arange(h, device=x.device)[:, None]
    column, row = ((along * xs + across * ys + start) >> 16 for along, across, start in table)
    outside = (column < 0) | (column >= w) | (row < 0) | (row >= h)
    place = (
        (row.clamp_(0, h - 1) * w + column.clamp_(0, w - 1))
        .view(n, 1, h * w)
        .expand(n, channels, h * w)
    )
    return (
        x.reshape(n, channels, h * w)
        .gather(2, place)
        .view(n, channels, h, w)
        .masked_fill_(outside[:, None], 0.0)
    )


def bilinear(
    x: Tensor,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    d: np.ndarray,
    right: np.ndarray,
    down: np.ndarray,
) -> Tensor:
    """Output pixel (x, y), measured from the centre, is read at (a x + b y + right, c x + d y + down). x [B, C, H, W]; the numbers [B]."""
    h, w = x.shape[2:]
    maps = np.array(
        [(a, b * h / w, 2 * right / w), (c * w / h, d, 2 * down / h)]
    )  # in the units of grid_sample: -1..1 from edge to edge
    table = torch.as_tensor(maps, dtype=x.dtype).to(x.device)[..., None, None]
    xs = (2 * torch.arange(w, device=x.device, dtype=x.dtype) + 1) / w - 1
    ys = ((2 * torch.arange(h, device=x.device, dtype=x.dtype) + 1) / h - 1)[:, None]
    grid = torch.stack([along * xs + across * ys + start for along, across, start in table], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def turn(x: Tensor, degrees: np.ndarray) -> Tensor:
    """Turned counter-clockwise about the centre by degrees [B]."""
    cos, sin, zero = (
        np.cos(np.deg2rad(degrees)),
        np.sin(np.deg2rad(degrees)),
        np.zeros(len(degrees)),
    )
    return bilinear(x, cos, -sin, sin, cos, zero, zero)


def digits_affine(x: Tensor, draws: np.ndarray) -> Tensor:
    """Scale .8 to 1.2, rotation 15 degrees, shear .3, aspect .15, translation .15 of the side (QUICKSTART.md). draws [B, 6] in [0, 1)."""
    spread = 2 * draws - 1
    scale, angle, shear = 1 + 0.2 * spread[:, 0], np.deg2rad(15 * spread[:, 1]), 0.3 * spread[:, 2]
    stretch = np.exp(0.15 * spread[:, 3] / 2)
    cos, sin = np.cos(angle), np.sin(angle)
    # rotation @ shear @ stretch / scale, written out
    a, b = cos * stretch / scale, (cos * shear - sin) / (stretch * scale)
    c, d = sin * stretch / scale, (sin * shear + cos) / (stretch * scale)
    return bilinear(
        x, a, b, c, d, 0.15 * spread[:, 4] * x.shape[3], 0.15 * spread[:, 5] * x.shape[2]
    )
