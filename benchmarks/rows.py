"""One line of JSON per row, with what must be known to read it later: machine, device, versions, date, commit, configuration."""

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


def emit(row: dict[str, Any]) -> None:
    """Print a row with the common fields, as one line."""
    print(json.dumps(with_common_fields(row, module_name(), sys.argv[1:])), flush=True)


def with_common_fields(
    row: dict[str, Any], benchmark: str, configuration: list[str]
) -> dict[str, Any]:
    """The row with every common field that it does not have already."""
    return {
        "benchmark": benchmark,
        **row,
        **{k: v for k, v in common_fields(tuple(configuration)).items() if k not in row},
    }


def module_name() -> str:
    """`step` for `python -m benchmarks.step`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec.name if spec else Path(sys.argv[0]).stem).removeprefix("benchmarks.")


@cache
def common_fields(configuration: tuple[str, ...]) -> dict[str, Any]:
    """What is the same for all rows of one command. `load`: processes that wanted a core in the last minute, over the cores."""
    return {
        "machine": machine(),
        "device": device(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": commit(),
        "configuration": " ".join(map(without_folders, configuration)),
        "nodes": int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }


def without_folders(word: str) -> str:
    """A word of a command line, an absolute path in it cut to its last name: rows are published, and where a machine keeps its files is nobody's concern."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def machine() -> str:
    """Cores this process may use, and the processor's name."""
    name = platform.processor() or platform.machine()
    try:
        name = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


@cache
def device() -> str:
    """The GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Python and the libraries whose speed this is."""
    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "numba",
        "ffcv",
        "faiss-gpu",
        "faiss-cpu",
        "scikit-learn",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with + when files were changed; '' outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def spread(ratios: Sequence[float], name: str) -> dict[str, float | list[float]]:
    """Median and quartiles of ratios taken turn by turn: {name, name_quartiles}. `time_ratio`: our time over the peer's, 1 is even and
    less is better; `speedup`: the peer's over ours."""
    import numpy as np

    low, middle, high = (
        round(float(q), 3) for q in np.quantile(np.asarray(ratios, float), (0.25, 0.5, 0.75))
    )
    return {name: middle, f"{name}_quartiles": [low, high]}


if __name__ == "__main__":  # what a job of launch/benchmark.py writes down about its first node
    print(json.dumps(common_fields(())))
