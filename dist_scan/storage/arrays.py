"""Atomic writes of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dist_scan.storage.atomic import write_atomic


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy; see `write_atomic`."""
    write_atomic(path, lambda file: np.save(file, array))


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> None:
    """Write named arrays as .npz; see `write_atomic`."""
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    write_atomic(path, lambda file: save(file, **arrays))
