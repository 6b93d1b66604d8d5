"""Named tensors in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from dist_scan.storage.atomic import write_atomic


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, atomically."""
    on_cpu = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_atomic(path, lambda file: file.write(save(on_cpu)))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` wrote. Raises ValueError if the file does not exist."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the stage before must publish it")
    return load(path.read_bytes())
