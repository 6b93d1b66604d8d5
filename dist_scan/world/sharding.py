"""Rows of a tensor distributed over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_scan.world.collectives import broadcast
from dist_scan.world.world import current


@dataclass(frozen=True)
class RowSharding:
    """Which rows of a whole tensor each rank holds.

    ``ranges[r]`` are the row ranges of rank r, in the order in which its local tensor holds them.
    Every row of the whole is in exactly one range.
    """

    ranges: tuple[tuple[slice, ...], ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole tensor."""
        return sum(rows.stop - rows.start for ranges in self.ranges for rows in ranges)

    def local_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of the whole [num_rows, ...]. Raises ValueError for another length."""
        if len(whole) != self.num_rows:
            raise ValueError(
                f"the tensor has {len(whole)} rows, but {self.num_rows} are distributed over "
                f"{len(self.ranges)} ranks; pass the whole tensor"
            )
        return torch.cat([whole[rows] for rows in self.ranges[current().rank]])

    def gather(self, local: Tensor) -> Tensor | None:
        """The whole tensor in the host memory of rank 0, None on other ranks. Collective.

        Each rank temporarily holds the rows of one other rank in addition to its own.
        """
        rank = current().rank
        shape = local.shape[1:]
        whole = torch.empty(self.num_rows, *shape, dtype=local.dtype) if rank == 0 else None
        for source, ranges in enumerate(self.ranges):
            sizes = [rows.stop - rows.start for rows in ranges]
            if source == rank:
                shard = local.detach().contiguous()
            else:
                shard = local.new_empty(sum(sizes), *shape)
            if len(shard):
                broadcast(shard, source)
            if whole is not None:
                for rows, part in zip(ranges, shard.split(sizes)):
                    whole[rows] = part
        return whole
