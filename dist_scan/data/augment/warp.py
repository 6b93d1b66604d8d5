"""Affine maps of batches of images, one map per image, black outside.

Maps are arrays [2, 3, B] on the CPU: the output pixel at (x, y) is read at
(m[0, 0] x + m[0, 1] y + m[0, 2], m[1, 0] x + m[1, 1] y + m[1, 2]). Grids are made on the device.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ONE = 65536  # in 16.16 fixed point


def rotation(degrees: np.ndarray) -> np.ndarray:
    """Maps [2, 3, B] that rotate counter-clockwise about the origin."""
    cos = np.cos(np.deg2rad(degrees))
    sin = np.sin(np.deg2rad(degrees))
    zero = np.zeros(len(degrees))
    return np.array([[cos, -sin, zero], [sin, cos, zero]])


def warp_nearest(x: Tensor, maps: np.ndarray) -> Tensor:
    """PIL's Image.transform(AFFINE, NEAREST) of x [B, C, H, W]; coordinates of pixel centres.

    In 16.16 fixed point like PIL: grid_sample rounds ties differently and reads another pixel in 1
    of 10,000.
    """
    n, channels, h, w = x.shape
    # Maps of pixel centres, in fixed point: [2, 3, B, 1, 1]
    start = maps[:, 2] + 0.5 * (maps[:, 0] + maps[:, 1])
    fixed = np.stack([maps[:, 0], maps[:, 1], start], 1) * ONE
    table = torch.from_numpy(np.floor(fixed + 0.5).astype(np.int64)).to(x.device)[..., None, None]
    xs = torch.arange(w, device=x.device)
    ys = torch.arange(h, device=x.device)[:, None]
    # Input pixel of each output pixel
    column, row = ((along * xs + across * ys + origin) >> 16 for along, across, origin in table)
    outside = (column < 0) | (column >= w) | (row < 0) | (row >= h)
    # Read it, or black
    pixel = row.clamp_(0, h - 1) * w + column.clamp_(0, w - 1)
    pixel = pixel.view(n, 1, h * w).expand(n, channels, h * w)
    warped = x.reshape(n, channels, h * w).gather(2, pixel).view(n, channels, h, w)
    return warped.masked_fill_(outside[:, None], 0.0)


def warp_bilinear(x: Tensor, maps: np.ndarray) -> Tensor:
    """Bilinear interpolation of x [B, C, H, W]; coordinates in pixels from the image's centre."""
    h, w = x.shape[2:]
    (a, b, right), (c, d, down) = maps
    # In the units of grid_sample: -1 to 1 from edge to edge
    scaled = np.array([(a, b * h / w, 2 * right / w), (c * w / h, d, 2 * down / h)])
    table = torch.as_tensor(scaled, dtype=x.dtype).to(x.device)[..., None, None]
    # Output coordinates of pixel centres, and where they are read
    xs = (2 * torch.arange(w, device=x.device, dtype=x.dtype) + 1) / w - 1
    ys = ((2 * torch.arange(h, device=x.device, dtype=x.dtype) + 1) / h - 1)[:, None]
    grid = torch.stack([along * xs + across * ys + origin for along, across, origin in table], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def digits_affine(x: Tensor, draws: np.ndarray) -> Tensor:
    """Random affine map for digits, uniform from draws [B, 6] in [0, 1).

    Scale 0.8 to 1.2, rotation up to 15 degrees, shear 0.3, aspect ratio 0.15, translation 0.15 of
    the side.
    """
    spread = 2 * draws - 1
    scale = 1 + 0.2 * spread[:, 0]
    angle = np.deg2rad(15 * spread[:, 1])
    shear = 0.3 * spread[:, 2]
    stretch = np.exp(0.15 * spread[:, 3] / 2)
    cos, sin = np.cos(angle), np.sin(angle)
    # rotation @ shear @ diag(stretch, 1 / stretch) / scale
    a, b = cos * stretch / scale, (cos * shear - sin) / (stretch * scale)
    c, d = sin * stretch / scale, (sin * shear + cos) / (stretch * scale)
    right = 0.15 * spread[:, 4] * x.shape[3]
    down = 0.15 * spread[:, 5] * x.shape[2]
    return warp_bilinear(x, np.array([[a, b, right], [c, d, down]]))
