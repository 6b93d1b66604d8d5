"""What a method remembers outside its weights: a Queue (the same on all ranks) and a Bank (a row per image, sharded)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_scan.world.collectives import all_sum, gather_rows
from dist_scan.world.world import current


class Queue(nn.Module):
    """MoCo's dictionary: the newest `size` keys [K, D], replicated; starts as random unit rows (a function of seed)."""

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, global_batch: int, seed: int) -> None:
        super().__init__()
        check_queue(size, global_batch)
        rows = F.normalize(
            torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)), dim=1
        )
        self.register_buffer("rows", rows)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest rows by all ranks' keys [b, D], in rank order. Collective."""
        keys = gather_rows(keys.detach()).to(self.rows.dtype)
        start = int(self.pointer)
        self.rows[start : start + len(keys)] = keys
        self.pointer.fill_((start + len(keys)) % len(self.rows))


def check_queue(size: int, keys_per_step: int) -> None:
    """Raises ValueError unless the queue holds whole steps' keys."""
    if size % keys_per_step or size < keys_per_step:
        below = max(size // keys_per_step, 1) * keys_per_step
        raise ValueError(
            f"queue_size: {size} is no multiple of the {keys_per_step} keys of a step (global_batch, twice that when symmetric); "
            f"allowed: {below} or {below + keys_per_step}"
        )


class MemoryBank:
    """One row per image. Images lie in a fixed number of contiguous shards; shard s lives on rank s mod W.

    Never a buffer: DDP would overwrite it with rank 0's. The checkpoint holds a file per rank; `load` deals the shards anew.
    """

    def __init__(
        self,
        num_rows: int,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        fill: float = 0,
        num_shards: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_rows < 1 or num_shards < 1:
            raise ValueError(
                f"a bank needs at least one row and one shard, got {num_rows} and {num_shards}"
            )
        self.num_rows, self.num_shards = num_rows, min(num_shards, num_rows)
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self.starts = torch.tensor(
            [s * num_rows // self.num_shards for s in range(self.num_shards + 1)]
        )
        self.shards = {
            s: torch.full(
                (int(self.starts[s + 1] - self.starts[s]), *self.shape),
                fill,
                dtype=dtype,
                device=self.device,
            )
            for s in range(current().rank, self.num_shards, current().world_size)
        }

    def _shard_of(self, index: Tensor) -> Tensor:
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= self.num_rows):
            raise ValueError(
                f"bank index {int(index.min())}..{int(index.max())}: allowed 0..{self.num_rows - 1}"
            )
        return torch.searchsorted(self.starts, index, right=True) - 1

    def write(self, index: Tensor, rows: Tensor, column: int | None = None) -> None:
        """Set rows [b, *shape] at index [b], or with `column` only that entry of each; every rank brings its own, also none. Collective.
        The last of equal indices wins."""
        index = gather_rows(index.cpu().long())
        rows = gather_rows(rows.detach().to(self.device, self.dtype))
        shard_of = self._shard_of(index)
        for s, mine in self.shards.items():
            at = (shard_of == s).nonzero()[:, 0]
            for_each = dict(
                zip((index[at] - self.starts[s]).tolist(), at.tolist())
            )  # a scatter of equal indices has no order
            if for_each:
                place = mine if column is None else mine[:, column]
                place[torch.tensor(list(for_each), device=self.device)] = rows[
                    torch.tensor(list(for_each.values()), device=self.device)
                ]

    def read(self, index: Tensor) -> Tensor:
        """Rows [b, *shape] at index [b], wherever they live. Collective; ranks may ask for different numbers."""
        own = index.cpu().long()
        counts = gather_rows(torch.tensor([len(own)])).tolist()
        wanted = gather_rows(own)
        shard_of = self._shard_of(wanted)
        found = torch.zeros((len(wanted), *self.shape), dtype=self.dtype, device=self.device)
        for s, mine in self.shards.items():
            at = (shard_of == s).nonzero()[:, 0]
            found[at.to(self.device)] = mine[(wanted[at] - self.starts[s]).to(self.device)]
        start = sum(counts[: current().rank])
        return all_sum(found)[start : start + len(own)]

    def fill(self, rows: Tensor, column: int | None = None) -> None:
        """Set every row from `rows` [num_rows, ...], which all ranks hold; with `column` only that entry of each row."""
        for s, mine in self.shards.items():
            part = rows[int(self.starts[s]) : int(self.starts[s + 1])].to(self.device, self.dtype)
            (mine if column is None else mine[:, column]).copy_(part)

    def whole(self) -> Tensor:
        """All rows [num_rows, *shape] on every rank, on the CPU. Collective: for narrow rows (ids), not for features."""
        empty = torch.zeros((0, *self.shape), dtype=self.dtype)
        rows = gather_rows(torch.cat([empty, *(t.cpu() for t in self.shards.values())]))
        dealt = [
            s
            for r in range(current().world_size)
            for s in range(r, self.num_shards, current().world_size)
        ]
        parts = dict(
            zip(dealt, rows.split([int(self.starts[s + 1] - self.starts[s]) for s in dealt]))
        )
        return torch.cat([parts[s] for s in range(self.num_shards)])

    def state(self) -> dict[str, Any]:
        """This rank's shards, for a checkpoint."""
        return {
            "num_rows": self.num_rows,
            "num_shards": self.num_shards,
            "shards": {s: t.cpu().clone() for s, t in self.shards.items()},
        }

    def load(self, parts: Sequence[dict[str, Any]]) -> None:
        """Take this rank's shards from all ranks' states of a checkpoint, whatever their number. Raises ValueError on a gap."""
        for part in parts:
            if (part["num_rows"], part["num_shards"]) != (self.num_rows, self.num_shards):
                raise ValueError(
                    f"the checkpoint's bank has {part['num_rows']} rows in {part['num_shards']} shards, this run "
                    f"{self.num_rows} in {self.num_shards}; start the stage again, or keep its data and settings"
                )
        saved = {s: t for part in parts for s, t in part["shards"].items()}
        missing = sorted(set(self.shards) - set(saved))
        if missing:
            raise ValueError(
                f"the checkpoint's bank lacks shards {missing[:8]}; restore its bank files or remove the checkpoint"
            )
        for s, mine in self.shards.items():
            mine.copy_(saved[s])
