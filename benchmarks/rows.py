"""Output of the benchmarks: one JSON line per row, with the fields needed to interpret it later.

Run as a module it prints these fields for the machine; launch/benchmark.py stores them per job.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON_FIELDS = (
    "benchmark",
    "machine",
    "device",
    "versions",
    "date",
    "commit",
    "configuration",
    "nodes",
    "load",
)
LIBRARIES = (
    "torch",
    "torchvision",
    "numpy",
    "numba",
    "ffcv",
    "faiss-gpu",
    "faiss-cpu",
    "scikit-learn",
)


def emit(row: dict[str, Any]) -> None:
    """Print a row with the common fields, as one line."""
    print(json.dumps(with_common_fields(row, _module_name(), sys.argv[1:])), flush=True)


def with_common_fields(
    row: dict[str, Any], benchmark: str, configuration: Sequence[str]
) -> dict[str, Any]:
    """The row, and every common field that it does not have already."""
    common = common_fields(tuple(configuration))
    return {"benchmark": benchmark} | row | {k: v for k, v in common.items() if k not in row}


def _module_name() -> str:
    """`step` for `python -m benchmarks.step`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec.name if spec else Path(sys.argv[0]).stem).removeprefix("benchmarks.")


@cache
def common_fields(configuration: tuple[str, ...]) -> dict[str, Any]:
    """Fields that all rows of one command share.

    load: processes that wanted a core in the last minute, divided by the number of cores.
    """
    return {
        "machine": _machine(),
        "device": device(),
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": _commit(),
        "configuration": " ".join(map(_without_folder, configuration)),
        "nodes": int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }


def _without_folder(word: str) -> str:
    """A word of a command line with an absolute path shortened to its last part.

    Rows are published; the folders of a machine are private.
    """
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def _machine() -> str:
    """Number of cores that this process may use, and the processor's name."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else name}"


@cache
def device() -> str:
    """The GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose speed matters."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The checkout's commit, with + if files were changed; '' outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        is_changed = _git("status", "--porcelain", "-uno") != ""
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+" if is_changed else head


def _git(*arguments: str) -> str:
    """Output of a git command in the checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def spread(ratios: Sequence[float], name: str) -> dict[str, float | list[float]]:
    """Fields of a row for ratios of interleaved measurements: median and quartiles.

    `time_ratio`: our time over the peer's, less is better; `speedup`: the peer's over ours.
    """
    import numpy as np  # not at the top: some benchmarks first set its number of threads

    quartiles = np.quantile(np.asarray(ratios, float), (0.25, 0.5, 0.75))
    low, median, high = (round(float(value), 3) for value in quartiles)
    return {name: median, f"{name}_quartiles": [low, high]}


def over_seeds(values: Sequence[float], name: str) -> dict[str, float]:
    """Fields of a row for a figure of several seeds: mean and, of two or more, deviation."""
    import numpy as np

    fields = {name: round(float(np.mean(values)), 4)}
    if len(values) > 1:
        fields[f"{name}_spread"] = round(float(np.std(values, ddof=1)), 4)
    return fields


if __name__ == "__main__":
    print(json.dumps(common_fields(())))
