"""Affine warps on batches, a map of each sample's own, black outside."""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def affine(x: Tensor, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, shift_x: np.ndarray | float = 0.0,
           shift_y: np.ndarray | float = 0.0, nearest: bool = False, about_centre: bool = True) -> Tensor:
    """Output pixel (x, y) is read at (a x + b y + shift_x, c x + d y + shift_y), coordinates at pixel centres as PIL has them,
    measured from the image's centre or its corner. x [B, 3, H, W]; the numbers [B]; shifts in pixels."""
    n, _, h, w = x.shape
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float64) + 0.5
    cx, cy = (w / 2, h / 2) if about_centre else (0.0, 0.0)
    col = lambda v: np.broadcast_to(np.asarray(v, np.float64), n)[:, None, None]  # noqa: E731
    u = col(a) * (xs - cx) + col(b) * (ys - cy) + col(shift_x) + cx
    v = col(c) * (xs - cx) + col(d) * (ys - cy) + col(shift_y) + cy
    if nearest:
        return _gather(x, u, v)
    grid = torch.as_tensor(np.stack([2 * u / w - 1, 2 * v / h - 1], -1), dtype=x.dtype, device=x.device)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _gather(x: Tensor, u: np.ndarray, v: np.ndarray) -> Tensor:
    """The pixel each point lies in. grid_sample's own nearest rounds ties in float32, and differs from PIL's."""
    n, c, h, w = x.shape
    col, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    outside = (col < 0) | (col >= w) | (row < 0) | (row >= h)
    at = torch.from_numpy((row.clip(0, h - 1) * w + col.clip(0, w - 1)).reshape(n, 1, h * w)).to(x.device)
    out = x.reshape(n, c, h * w).gather(2, at.expand(n, c, h * w)).view(n, c, h, w)
    return out.masked_fill_(torch.from_numpy(outside[:, None]).to(x.device), 0.0)


def digits_affine(x: Tensor, draws: np.ndarray) -> Tensor:
    """Scale .8 to 1.2, rotation 15 degrees, shear .3, aspect .15, translation .15 of the side, bilinear. draws [B, 6] in [0, 1)."""
    spread = 2 * draws - 1
    scale, angle, shear = 1 + 0.2 * spread[:, 0], np.deg2rad(15 * spread[:, 1]), 0.3 * spread[:, 2]
    stretch = np.exp(0.15 * spread[:, 3] / 2)
    cos, sin = np.cos(angle), np.sin(angle)
    # rotation @ shear @ stretch / scale, written out
    a, b = cos * stretch / scale, (cos * shear - sin) / (stretch * scale)
    c, d = sin * stretch / scale, (sin * shear + cos) / (stretch * scale)
    return affine(x, a, b, c, d, 0.15 * spread[:, 4] * x.shape[3], 0.15 * spread[:, 5] * x.shape[2])
