"""Number of images that fit through a network at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

USABLE_FRACTION = 0.5
"""Part of the free memory that images may take; the rest is for weights, views that are being
decoded, and other processes."""


@torch.inference_mode()
def bytes_per_image(network: nn.Module, sample: Tensor) -> int:
    """Estimated bytes that one image of sample [B, 3, S, S] needs inside a network.

    Twice the input and output of the largest layer: inside a residual block, the input of the block
    stays in memory too.
    """
    largest = 0

    def measure(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

    leaves = [module for module in network.modules() if not any(module.children())]
    hooks = [module.register_forward_hook(measure) for module in leaves]
    try:
        network(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return max(2 * largest // len(sample), 1)


def fitting_batch(wanted: int, image_bytes: int, free_bytes: int) -> int:
    """`wanted` if that many images fit into free memory, else the largest power of two that fits.

    At least 1. free_bytes: 0 if not known; `wanted` is then taken to fit.
    """
    most = int(free_bytes * USABLE_FRACTION) // image_bytes
    if free_bytes == 0 or wanted <= most:
        return wanted
    return 1 << max(most.bit_length() - 1, 0)
