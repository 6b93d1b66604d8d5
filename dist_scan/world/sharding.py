"""Rows of a tensor dealt over the ranks: which rank holds which, and the whole put together again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_scan.world.collectives import broadcast
from dist_scan.world.world import current


@dataclass(frozen=True)
class RowSharding:
    """ranges[r]: the rows of the whole that rank r holds, one range below the other in its own tensor. Together they are all rows, each once."""

    ranges: tuple[tuple[slice, ...], ...]

    @property
    def num_rows(self) -> int:
        """Of the whole."""
        return sum(at.stop - at.start for ranges in self.ranges for at in ranges)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's rows of the whole [num_rows, ...]. Raises ValueError when the whole has another number."""
        if len(whole) != self.num_rows:
            raise ValueError(
                f"{len(whole)} rows where {self.num_rows} are dealt over {len(self.ranges)} ranks; give the whole tensor"
            )
        return torch.cat([whole[at] for at in self.ranges[current().rank]])

    def gather(self, mine: Tensor) -> Tensor | None:
        """The whole in rank 0's host memory, None elsewhere. Collective. A device holds one rank's rows more while it lasts."""
        rank = current().rank
        whole = torch.empty(self.num_rows, *mine.shape[1:], dtype=mine.dtype) if rank == 0 else None
        for owner, ranges in enumerate(self.ranges):
            sizes = [at.stop - at.start for at in ranges]
            rows = (
                mine.detach().contiguous()
                if owner == rank
                else mine.new_empty(sum(sizes), *mine.shape[1:])
            )
            if len(rows):
                broadcast(rows, owner)
            if whole is not None:
                for at, part in zip(ranges, rows.split(sizes)):
                    whole[at] = part
        return whole
