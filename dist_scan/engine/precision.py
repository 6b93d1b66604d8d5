"""Number formats and determinism. GPU or CPU, place 4 of 4."""

from __future__ import annotations

import contextlib
import os
from typing import Literal

import torch

from dist_scan.data.hashing import hash_keys

Precision = Literal["fp32", "bf16", "fp64"]
"""fp64 is for showing that runs are equal: Adam at a usable learning rate grows fp32's rounding tenfold every few steps, so two
numbers of processes, though equal in exact arithmetic, part after about four steps in fp32 and stay together in fp64."""


def set_determinism() -> None:
    """The same sums in the same order on the same machine. Called once per process, before any CUDA work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_flush_denormal(
        True
    )  # dead units make denormals, which a CPU works on 50 times slower
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = (
        True  # convolutions: what PyTorch does by default, and what the papers ran with
    )


def autocast(precision: Precision, device: torch.device):
    """bf16 for the network's products; losses stay fp32 (each method upcasts)."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bf16"
        else contextlib.nullcontext()
    )


def in_precision(precision: Precision, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The views in the width that the method's weights have."""
    return tuple(v.double() for v in views) if precision == "fp64" else views


def seed_step(*keys: int) -> None:
    """Seed torch's generators (dropout, fresh layers) from (seed, stage, epoch, step, rank): nothing random is saved."""
    torch.manual_seed(int(hash_keys(*keys) >> 1))


def memory_format(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """channels_last on GPUs, where convolutions are faster with it."""
    return (
        module.to(device, memory_format=torch.channels_last)
        if device.type == "cuda"
        else module.to(device)
    )
