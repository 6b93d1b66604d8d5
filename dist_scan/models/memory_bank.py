"""State of methods about images: a queue of recent keys, and a memory bank with a row per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_scan.data.order import check_rows
from dist_scan.world.collectives import all_sum, gather_rows
from dist_scan.world.world import current


class Queue(nn.Module):
    """MoCo's dictionary (He et al., CVPR 2020): the newest `size` keys [K, D], equal on all ranks.

    Starts with random rows of unit length, a function of the seed.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__()
        random = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("rows", F.normalize(random, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest rows by the keys [b, D] of all ranks, in rank order. Collective."""
        keys = gather_rows(keys.detach()).to(self.rows.dtype)
        start = int(self.pointer)
        self.rows[start : start + len(keys)] = keys
        self.pointer.fill_((start + len(keys)) % len(self.rows))


def check_queue(size: int, keys_per_step: int) -> None:
    """Raise ValueError unless the queue holds the keys of whole steps."""
    if size % keys_per_step or size < keys_per_step:
        below = max(size // keys_per_step, 1) * keys_per_step
        raise ValueError(
            f"queue_size: {size} is no multiple of the {keys_per_step} keys of a step "
            "(global_batch, twice that if symmetric); "
            f"allowed: {below} or {below + keys_per_step}"
        )


class MemoryBank:
    """One row per image, in contiguous shards by image index; shard s is on rank s mod W.

    Not a buffer, because DDP would overwrite it with rank 0's. Every rank saves its shards, and
    `load` distributes them for any number of ranks.
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
        self.num_rows = num_rows
        self.num_shards = min(num_shards, num_rows)
        self.shape = tuple(shape)
        self.dtype = dtype
        self.device = torch.device(device)
        self.starts = torch.tensor(
            [shard * num_rows // self.num_shards for shard in range(self.num_shards + 1)]
        )
        self.sizes = self.starts.diff().tolist()
        self.shards = {
            shard: torch.full(
                (self.sizes[shard], *self.shape), fill, dtype=dtype, device=self.device
            )
            for shard in range(current().rank, self.num_shards, current().world_size)
        }

    def _shard_of(self, index: Tensor) -> Tensor:
        check_rows(index.numpy(), self.num_rows, "memory bank")
        return torch.searchsorted(self.starts, index, right=True) - 1

    def write(self, index: Tensor, rows: Tensor, column: int | None = None) -> None:
        """Set rows [b, *shape] at index [b], or only one column of them. Collective.

        Every rank passes its own rows, which may be none. Of equal indices the last one wins.
        """
        # Every rank sees all rows and stores those of its shards.
        index = gather_rows(index.cpu().long())
        rows = gather_rows(rows.detach().to(self.device, self.dtype))
        shard_of = self._shard_of(index)
        for shard, stored in self.shards.items():
            positions = (shard_of == shard).nonzero()[:, 0]
            local_rows = (index[positions] - self.starts[shard]).tolist()
            # A dict keeps the last of equal indices; a scatter would keep any of them.
            sources = dict(zip(local_rows, positions.tolist()))
            if sources:
                target = stored if column is None else stored[:, column]
                target_rows = torch.tensor(list(sources), device=self.device)
                source_rows = torch.tensor(list(sources.values()), device=self.device)
                target[target_rows] = rows[source_rows]

    def read(self, index: Tensor) -> Tensor:
        """Rows [b, *shape] at index [b], from any rank. Collective; b may differ between ranks."""
        index = index.cpu().long()
        # Every rank fills in the rows that it has; the sum over ranks completes them.
        counts = gather_rows(torch.tensor([len(index)])).tolist()
        all_index = gather_rows(index)
        shard_of = self._shard_of(all_index)
        found = torch.zeros((len(all_index), *self.shape), dtype=self.dtype, device=self.device)
        for shard, stored in self.shards.items():
            positions = (shard_of == shard).nonzero()[:, 0]
            local_rows = all_index[positions] - self.starts[shard]
            found[positions.to(self.device)] = stored[local_rows.to(self.device)]
        # Only the rows at this rank's own index.
        start = sum(counts[: current().rank])
        return all_sum(found)[start : start + len(index)]

    def fill(self, rows: Tensor, column: int | None = None) -> None:
        """Set every row, or one column of every row, from `rows` [num_rows, ...] on all ranks."""
        parts = rows.split(self.sizes)
        for shard, stored in self.shards.items():
            target = stored if column is None else stored[:, column]
            target.copy_(parts[shard].to(self.device, self.dtype))

    def whole(self) -> Tensor:
        """All rows [num_rows, *shape] on every rank, on the CPU. Collective.

        For narrow rows such as ids, not for features.
        """
        # Every row is on one rank and 0 on the others: the sum over ranks is the complete bank.
        rows = torch.zeros((self.num_rows, *self.shape), dtype=self.dtype)
        for shard, stored in self.shards.items():
            rows.split(self.sizes)[shard].copy_(stored)
        return all_sum(rows)

    def state(self) -> dict[str, Any]:
        """This rank's shards, for a checkpoint."""
        return {
            "num_rows": self.num_rows,
            "num_shards": self.num_shards,
            "shards": {shard: stored.cpu().clone() for shard, stored in self.shards.items()},
        }

    def load(self, parts: Sequence[dict[str, Any]]) -> None:
        """Take this rank's shards from the states of all ranks of a checkpoint.

        The number of ranks may have changed. Raises ValueError if a shard is missing.
        """
        for part in parts:
            if (part["num_rows"], part["num_shards"]) != (self.num_rows, self.num_shards):
                raise ValueError(
                    f"the checkpoint's memory bank has {part['num_rows']} rows in "
                    f"{part['num_shards']} shards, this run {self.num_rows} in {self.num_shards}; "
                    "start the stage again, or keep its data and settings"
                )
        saved = {shard: rows for part in parts for shard, rows in part["shards"].items()}
        missing = sorted(set(self.shards) - set(saved))
        if missing:
            raise ValueError(
                f"the checkpoint's memory bank lacks shards {missing[:8]}; "
                "restore its files bank-*.pt, or remove the checkpoint's folder"
            )
        for shard, stored in self.shards.items():
            stored.copy_(saved[shard])
