"""Colour operations on batches, with parameters for each image.

Images x are float [B, 3, H, W] in [0, 1], factors [B, 1, 1, 1]; draws are uniform in [0, 1), on the
CPU. The definitions are torchvision's. The result for an image does not depend on the others.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL's mode "L"
BLUR_SIGMA = (0.1, 2.0)  # pixels
Strength = tuple[float, float, float, float]
"""Of brightness, contrast, saturation and hue."""


def per_image(values: np.ndarray, like: Tensor) -> Tensor:
    """Values [B] as [B, 1, 1, 1] with the dtype and on the device of the images."""
    tensor = torch.as_tensor(np.ascontiguousarray(values), dtype=like.dtype, device=like.device)
    return tensor.view(-1, 1, 1, 1)


def luminance(x: Tensor) -> Tensor:
    """Weighted mean of the channels, [B, 1, H, W]."""
    r, g, b = x.unbind(1)
    return (r * LUMA[0] + g * LUMA[1] + b * LUMA[2])[:, None]


def image_mean(x: Tensor) -> Tensor:
    """Mean of each image, [B, 1, 1, 1], by pairwise sums in a fixed order.

    The order of Tensor.mean depends on the batch size: two threads share an image that is alone,
    and on a GPU every batch size has its own order.
    """
    sums = x.flatten(1)
    count = sums.shape[1]
    while sums.shape[1] > 1:
        half, odd = divmod(sums.shape[1], 2)
        folded = sums[:, :half] + sums[:, half : 2 * half]
        if odd:
            folded[:, :1] += sums[:, -1:]
        sums = folded
    return (sums / count).view(-1, 1, 1, 1)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, clipped to [0, 1]."""
    return (x * factor + other * (1 - factor)).clamp_(0, 1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luminance of the image."""
    return blend(x, image_mean(luminance(x)), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luminance."""
    return blend(x, luminance(x), factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue in HSV by `shift`, a fraction of a full circle in [-0.5, 0.5]."""
    # RGB to HSV: value, chroma, and the hue in sixths of a circle
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    green_or_blue = torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    sector = torch.where(value == r, (g - b) / divisor, green_or_blue)
    rotated = torch.remainder(sector / 6 + shift[:, 0], 1.0) * 6

    # HSV to RGB in closed form: f(n) = v - c * max(0, min(k, 4 - k, 1)), k = (n + h) mod 6
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + rotated, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def jitter(x: Tensor, draws: np.ndarray, strength: Strength) -> Tensor:
    """torchvision's ColorJitter with a random order of the four operations for each image.

    draws: [B, 8]; the first four give the factors, the others the order.
    """
    # Brightness, contrast and saturation are factors around 1, hue is a shift around 0
    factors = [1 + amount * (2 * draws[:, i] - 1) for i, amount in enumerate(strength[:3])]
    factors.append(strength[3] * (2 * draws[:, 3] - 1))
    # Apply each adjustment to the images that have it in this place of their order
    order = draws[:, 4:8].argsort(1)
    x = x.clone()
    for place in range(4):
        for number, apply in enumerate((brightness, contrast, saturation, hue)):
            rows = np.flatnonzero(order[:, place] == number)
            if len(rows):
                selected = torch.from_numpy(rows).to(x.device)
                x[selected] = apply(x[selected], per_image(factors[number][rows], x))
    return x


def jitter_fused(x: Tensor, draws: np.ndarray, strength: Strength) -> Tensor:
    """Approximate colour jitter, 10 times faster: a 3x3 matrix and an offset for each image.

    The order is fixed, hue is a rotation in YIQ, and nothing is clipped between the operations: the
    mean difference from `jitter` is 0.03 with hue and 0.003 without. draws: [B, 8].
    """
    factors = (1 + amount * (2 * draws[:, i] - 1) for i, amount in enumerate(strength[:3]))
    brightness_factor, contrast_factor, saturation_factor = factors

    # Hue: a rotation in the plane of I and Q; the sign makes red turn to yellow
    angle = -2 * np.pi * strength[3] * (2 * draws[:, 3] - 1)
    to_yiq = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    hue_rotation = np.zeros((len(draws), 3, 3))
    hue_rotation[:, 0, 0] = 1
    hue_rotation[:, 1, 1] = hue_rotation[:, 2, 2] = np.cos(angle)
    hue_rotation[:, 2, 1] = np.sin(angle)
    hue_rotation[:, 1, 2] = -hue_rotation[:, 2, 1]

    # Saturation, then hue, then contrast and brightness
    luma = np.tile(np.array(LUMA), (3, 1))
    factor = saturation_factor[:, None, None]
    saturate = factor * np.eye(3) + (1 - factor) * luma
    colour = np.linalg.inv(to_yiq) @ hue_rotation @ to_yiq @ saturate
    matrix = torch.as_tensor(
        colour * (brightness_factor * contrast_factor)[:, None, None],
        dtype=x.dtype,
        device=x.device,
    )
    offset = per_image(brightness_factor * (1 - contrast_factor), x) * image_mean(luminance(x))
    return (torch.einsum("bij,bjhw->bihw", matrix, x) + offset).clamp_(0, 1)


def random_greyscale(x: Tensor, draws: np.ndarray, probability: float) -> Tensor:
    """Replace the channels of some images by the luminance. draws: [B]."""
    is_grey = per_image(draws < probability, x)
    return torch.where(is_grey > 0, luminance(x).expand_as(x), x)


def random_blur(x: Tensor, draws: np.ndarray, probability: float) -> Tensor:
    """Gaussian blur of some images, with sigma uniform between 0.1 and 2 pixels.

    draws: [B, 2]; whether to blur, and sigma. The kernel ends at three times the largest sigma.
    Edge pixels are repeated, as PIL does in MoCo v2's transform.
    """
    rows = np.flatnonzero(draws[:, 0] < probability)
    if not len(rows):
        return x
    # Kernels [selected images, taps]
    low, high = BLUR_SIGMA
    radius = int(np.ceil(3 * high))
    taps = np.arange(-radius, radius + 1)
    sigmas = low + (high - low) * draws[rows, 1]
    weights = np.exp(-0.5 * (taps / sigmas[:, None]) ** 2)
    weights /= weights.sum(1, keepdims=True)
    # Separable convolution: rows, then columns
    selected = torch.from_numpy(rows).to(x.device)
    blurred = x[selected]
    for dim, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(blurred, pad, mode="replicate")
        size = blurred.shape[dim]
        blurred = torch.zeros_like(blurred)
        for k in range(len(taps)):
            blurred += per_image(weights[:, k], x) * padded.narrow(dim, k, size)
    x = x.clone()
    x[selected] = blurred
    return x


def cutout(x: Tensor, side: np.ndarray, row: np.ndarray, column: np.ndarray) -> Tensor:
    """Set one square of each image to zero, clipped at the edges.

    side: [B], even, in pixels; 0: none. row, column: [B], its centre.
    On normalised images zero is the mean colour of the data set.
    """
    half = side // 2
    bounds = np.stack([row - half, row + half, column - half, column + half])
    top, bottom, left, right = torch.from_numpy(bounds).to(x.device)[..., None]
    ys = torch.arange(x.shape[2], device=x.device)
    xs = torch.arange(x.shape[3], device=x.device)
    inside_y = (ys >= top) & (ys < bottom)
    inside_x = (xs >= left) & (xs < right)
    return x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
