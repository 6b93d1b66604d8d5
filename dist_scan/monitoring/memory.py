"""Free and peak memory of the host and of the GPU, in bytes."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

from dist_scan.world.collectives import all_max

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Memory available on a GPU or on the host; 0 if unknown.

    On the host it is limited by this process's control group, as a batch system sets it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")))
    if found is None:
        return 0
    available = int(found[1]) * 1024
    limit = _read(CGROUP / "memory.max").strip()  # "max" where there is no limit
    used = _read(CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, int(limit) - int(used))
    return max(available, 0)


def _read(path: Path) -> str:
    """A file's text, or '' if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def reset_peak_memory() -> None:
    """Measure peaks from now on.

    Where a process may not reset its host peak (not Linux, or /proc is read-only), the peak of
    the whole process counts.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, int]:
    """{peak_host_bytes, peak_gpu_bytes}: the maximum over ranks since `reset_peak_memory`.

    Collective. Does not count the worker processes that build a .beton file.
    """
    # Without a GPU max_memory_allocated() is 0.
    peaks = [_peak_host_memory(), torch.cuda.max_memory_allocated()]
    local = torch.tensor(peaks, dtype=torch.float64)
    host, gpu = all_max(local).tolist()
    return {"peak_host_bytes": int(host), "peak_gpu_bytes": int(gpu)}


def _peak_host_memory() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")))
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024
