"""The most memory that each stage held, on the host and on the GPU."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from dist_scan.engine.precision import forget_peak_memory, peak_memory
from dist_scan.heads.products import release_buffers
from dist_scan.world.collectives import all_max


def begin_stage() -> None:
    """Count peaks from now on, without memory that heads of the stage before have kept. Where the kernel does not let a process reset its own (no Linux, a locked /proc), they stay those of its life."""
    release_buffers()
    forget_peak_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peaks() -> dict[str, int]:
    """{peak_host_bytes, peak_gpu_bytes} of the rank that held most (collective). Worker processes of a .beton's building are not in it."""
    host, gpu = all_max(
        torch.tensor([float(_host_peak()), float(peak_memory())], dtype=torch.float64)
    ).tolist()
    return {"peak_host_bytes": int(host), "peak_gpu_bytes": int(gpu)}


def _host_peak() -> int:
    try:
        line = next(
            x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")
        )
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
