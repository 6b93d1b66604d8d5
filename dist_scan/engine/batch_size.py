"""How many images fit through a network at once: from the largest layer and the memory that is free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHARE = 0.5  # of the free memory; the rest is for weights, views in the making, and others on the machine


@torch.inference_mode()
def bytes_per_image(network: nn.Module, sample: Tensor) -> int:
    """Bytes one image of sample [B, 3, S, S] needs on its way: twice the largest layer's input and output (a residual waits beside them)."""
    most, hooks = 0, []

    def look(module: nn.Module, given: tuple, made: object) -> None:
        nonlocal most
        tensors = [t for t in (*given, made) if isinstance(t, Tensor)]
        most = max(most, sum(t.numel() * t.element_size() for t in tensors))

    try:
        for module in network.modules():
            if not any(module.children()):
                hooks.append(module.register_forward_hook(look))
        network(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return max(2 * most // len(sample), 1)


def fitting_batch(wanted: int, per_image: int, free: int) -> int:
    """`wanted` if it fits into SHARE of the free bytes (or these are not known: 0), else the largest power of two that does, at least 1."""
    most = int(free * SHARE) // per_image
    if free == 0 or wanted <= most:
        return wanted
    return 1 << max(most.bit_length() - 1, 0)
