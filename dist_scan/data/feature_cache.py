"""A feature table where random rows are read fastest: in the device's memory, in the host's (pinned for a GPU), or its mapped shards.

The same rows, bit for bit, from each: a run may change the place between two starts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.feature_table import FeatureTable

Placement = Literal["device", "host", "mapped"]
SHARE = 0.5  # of the free memory: the rest is for heads, optimizer and held-out rows


def choose_placement(
    num_bytes: int,
    on_gpu: bool,
    free_device: int,
    free_host: int,
    copies: int,
    wanted: Placement | Literal["auto"] = "auto",
) -> tuple[Placement, str]:
    """(place, why) for a bank of num_bytes; copies: processes of this machine that would each hold one in host memory.

    Raises ValueError when the place that was asked for is too small, or is a GPU that is not there.
    """
    room = {
        "device": SHARE * free_device if on_gpu else 0.0,
        "host": SHARE * free_host / max(copies, 1),
        "mapped": float("inf"),
    }
    gib = lambda x: f"{x / 2**30:.2f} GiB"  # noqa: E731
    if wanted != "auto":
        if num_bytes > room[wanted]:
            there = (
                "there is no GPU"
                if wanted == "device" and not on_gpu
                else f"{gib(room[wanted])} of {wanted} memory are to spare for each process"
            )
            raise ValueError(
                f"runtime.bank: '{wanted}', but the bank has {gib(num_bytes)} and {there}; allowed: "
                f"{', '.join(['auto', *(p for p, r in room.items() if num_bytes <= r)])}"
            )
        return wanted, "asked for by runtime.bank"
    place = next(p for p in ("device", "host", "mapped") if num_bytes <= room[p])
    tried = [
        f"{gib(room[p])} of {p} memory to spare"
        for p in ("device", "host")
        if p == place or room[p]
    ]
    return place, ", ".join(tried) or "nothing to spare"


class FeatureCache:
    """Rows of a table, read at random. Host and device memory: num_rows * num_views * dim * 2 bytes."""

    def __init__(self, table: FeatureTable, place: Placement, device: torch.device) -> None:
        self.table, self.place, self.device = table, place, device
        self.held = None if place == "mapped" else self._read()

    def _read(self) -> Tensor:
        """[N * V, D] float16, a shard at a time."""
        table, pinned = self.table, self.place == "host" and self.device.type == "cuda"
        held = torch.empty(
            table.num_rows,
            table.num_views,
            table.dim,
            dtype=torch.float16,
            pin_memory=pinned,
            device=self.device if self.place == "device" else "cpu",
        )
        for shard in range(table.num_shards):
            held[slice(*table.shard_range(shard))] = torch.from_numpy(table.shard(shard).copy())
        return held.view(-1, table.dim)

    def read(self, index: np.ndarray, view: int | np.ndarray = 0) -> Tensor:
        """[n, D] float16, where the bank lies: one view of each row (a number for all, or one each)."""
        if self.held is None:
            return torch.from_numpy(self.table.rows(index, view))
        at = torch.from_numpy(np.asarray(index, np.int64) * self.table.num_views + view)
        return self.held.index_select(0, at.to(self.held.device))
