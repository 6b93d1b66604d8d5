"""Number formats and determinism."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from dist_scan.data.hashing import hash_keys

Precision = Literal["fp32", "bf16", "fp64"]
"""fp64 is for tests. Adam at a usable learning rate amplifies rounding tenfold every
few steps: runs on different numbers of ranks, equal in exact arithmetic, differ after about four
steps in fp32 and stay equal in fp64."""
M = TypeVar("M", bound=nn.Module)


def set_determinism() -> None:
    """Make equal runs on one machine equal bit for bit. Call once per process, before CUDA work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Dead units produce denormal numbers, with which a CPU computes 50 times slower.
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = False
    # Convolutions: PyTorch's default, with which the papers were computed.
    torch.backends.cudnn.allow_tf32 = True


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Context in which matrix products and convolutions run in bf16, if that is the precision.

    Methods compute their losses in fp32.
    """
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def in_precision(precision: Precision, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The views in the data type of the method's weights."""
    return tuple(view.double() for view in views) if precision == "fp64" else views


def seed_step(*keys: int) -> None:
    """Seed torch's generators (dropout, new layers) with a hash of keys like (seed, epoch, step).

    So no state of a generator has to be saved in checkpoints.
    """
    torch.manual_seed(int(hash_keys(*keys) >> 1))


def move_to_device(module: M, device: torch.device) -> M:
    """Move a module to its device; to a GPU in channels_last, in which convolutions are faster."""
    if device.type == "cuda":
        return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.to(device)
