"""Number formats and determinism. GPU or CPU, place 4 of 4."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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


def device_mark(device: torch.device) -> Callable[[], Any] | None:
    """What records a timed event in the device's stream; None on a CPU, where the host's clock tells all."""
    if device.type != "cuda":
        return None

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark


def peak_memory() -> int:
    """Most bytes of GPU memory held since forget_peak_memory; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def forget_peak_memory() -> None:
    """Count the peak from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of this GPU, or of this machine's memory within what its control group allows (0 when not known)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return 0
    free = next(
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    try:
        return min(
            free,
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()),
        )
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free
