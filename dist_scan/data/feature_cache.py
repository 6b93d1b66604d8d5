"""Random reads from a feature table: from device memory, host memory, or the memory-mapped shards.

The rows are the same to the bit from each, so a run may change the placement between two starts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.feature_table import FeatureTable

Placement = Literal["device", "host", "mapped"]
USABLE_FRACTION = 0.5  # of the free memory; the rest is for heads, optimizer and held-out rows


def choose_placement(
    num_bytes: int,
    on_gpu: bool,
    free_device: int,
    free_host: int,
    local_world_size: int,
    wanted: Placement | Literal["auto"] = "auto",
) -> tuple[Placement, str]:
    """(placement, reason) for a feature cache of `num_bytes`: the fastest memory with enough room.

    local_world_size: processes on this machine, each of which would keep a cache in host memory.
    Raises ValueError if the wanted placement has too little memory, or needs a GPU and has none.
    """
    usable: dict[Placement, float] = {
        "device": USABLE_FRACTION * free_device if on_gpu else 0.0,
        "host": USABLE_FRACTION * free_host / max(local_world_size, 1),
        "mapped": float("inf"),
    }
    fitting = [placement for placement, size in usable.items() if num_bytes <= size]
    if wanted == "auto":
        sizes = [f"{_gib(usable[p])} of {p} memory usable" for p in ("device", "host") if usable[p]]
        return fitting[0], ", ".join(sizes) or "no memory usable"
    if wanted not in fitting:
        if wanted == "device" and not on_gpu:
            problem = "there is no GPU"
        else:
            problem = f"only {_gib(usable[wanted])} of {wanted} memory are usable per process"
        raise ValueError(
            f"runtime.feature_cache: '{wanted}', but the table has {_gib(num_bytes)} and "
            f"{problem}; "
            f"allowed: {', '.join(['auto', *fitting])}"
        )
    return wanted, "set by runtime.feature_cache"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


class FeatureCache:
    """Rows of a feature table, read at random.

    Takes num_rows * num_views * dim * 2 bytes of device or (pinned, if there is a GPU) host memory.
    """

    def __init__(self, table: FeatureTable, placement: Placement, device: torch.device) -> None:
        self.table = table
        self.placement = placement
        self.device = device
        self.features = None if placement == "mapped" else self._load()

    def _load(self) -> Tensor:
        """[N * V, D] float16, read one shard at a time."""
        table = self.table
        features = torch.empty(
            table.num_rows,
            table.num_views,
            table.dim,
            dtype=torch.float16,
            pin_memory=self.placement == "host" and self.device.type == "cuda",
            device=self.device if self.placement == "device" else "cpu",
        )
        for shard in range(table.num_shards):
            rows = slice(*table.shard_range(shard))
            features[rows] = torch.from_numpy(table.shard(shard).copy())
        return features.view(-1, table.dim)

    def read(self, index: np.ndarray, view: int | np.ndarray = 0) -> Tensor:
        """[n, D] float16 in the cache's memory: one view of each row of `index` [n].

        view: one number for all rows, or one for each row [n].
        """
        if self.features is None:
            return torch.from_numpy(self.table.rows(index, view))
        flat = torch.from_numpy(np.asarray(index, np.int64) * self.table.num_views + view)
        return self.features.index_select(0, flat.to(self.features.device))
