"""Linear cluster heads: how many clusters each has, and all of them in one weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from dist_scan.heads.partition import HeadPartition, partition_clusters
from dist_scan.world.collectives import broadcast
from dist_scan.world.sharding import RowSharding
from dist_scan.world.world import current


def _at_least_two(value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else value
    if not numbers or min(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{value}; allowed: a number of at least 2, or a list of different ones ([500, 1000, 2000])"
        )
    return value


NumClusters = Annotated[int | tuple[int, ...], AfterValidator(_at_least_two)]
"""Of heads: one number of clusters, or several."""


def head_sizes(num_clusters: int | Sequence[int], num_heads: int) -> tuple[int, ...]:
    """The clusters of each head: num_heads heads for each number of clusters, in the order given."""
    numbers = (num_clusters,) if isinstance(num_clusters, int) else num_clusters
    return tuple(c for c in numbers for _ in range(num_heads))


class ClusterHeads(nn.Module):
    """Independent linear heads on the same features, one below the other: weight [S, D] and bias [S], S = sum(sizes).

    Head h has sizes[h] clusters (`head_sizes`). Each has torch's default Linear
    init of its own. Logits are always fp32 or better (bf16 logits are off by 8e-2). Dealt over ranks (partition: heads, clusters),
    weight and bias hold this rank's clusters only: own_sizes[h] of head h; what begins the same on one rank begins the same dealt.
    """

    def __init__(
        self,
        in_dim: int,
        num_clusters: int | Sequence[int],
        num_heads: int,
        partition: HeadPartition = "batch",
    ) -> None:
        super().__init__()
        self.sizes = head_sizes(num_clusters, num_heads)
        self.partition, self.cluster_ranges = (
            partition,
            partition_clusters(self.sizes, partition, current().world_size),
        )
        mine, weights, biases = self.cluster_ranges[current().rank], [], []
        self.local_sizes = tuple(at.stop - at.start for at in mine)
        for c, at in zip(self.sizes, mine):
            head = nn.Linear(in_dim, c)  # drawn by every rank, also what is another's
            weights.append(head.weight.detach()[at].clone())
            biases.append(head.bias.detach()[at].clone())
        self.weight, self.bias = nn.Parameter(torch.cat(weights)), nn.Parameter(torch.cat(biases))

    @property
    def row_sharding(self) -> RowSharding | None:
        """Which of the S rows each rank holds; None when every rank holds all."""
        if self.partition == "batch":
            return None
        starts = [self.rows(h).start for h in range(len(self.sizes))]
        return RowSharding(
            tuple(
                tuple(slice(start + at.start, start + at.stop) for start, at in zip(starts, parts))
                for parts in self.cluster_ranges
            )
        )

    def rows(self, head: int) -> slice:
        """Where a head's clusters lie among all S."""
        start = sum(self.sizes[:head])
        return slice(start, start + self.sizes[head])

    def local_rows(self, head: int) -> slice:
        """Where this rank's clusters of a head lie in weight and bias."""
        start = sum(self.local_sizes[:head])
        return slice(start, start + self.local_sizes[head])

    def gather_head(self, head: int) -> tuple[Tensor, Tensor]:
        """(weight [C, D], bias [C]) of one head. Collective, and without a gradient, when heads are dealt over ranks."""
        at = self.local_rows(head)
        if self.partition == "batch":
            return self.weight[at], self.bias[at]
        weight, bias = (
            self.weight.new_empty(self.sizes[head], self.weight.shape[1]),
            self.bias.new_empty(self.sizes[head]),
        )
        for rank, parts in enumerate(self.cluster_ranges):
            there = parts[head]
            if rank == current().rank:
                weight[there], bias[there] = self.weight[at].detach(), self.bias[at].detach()
            if there.stop > there.start:
                broadcast(weight[there], rank)
                broadcast(bias[there], rank)
        return weight, bias

    def head_logits(self, head: int, features: Tensor) -> Tensor:
        """Features [B, D] -> this head's logits [B, C]. Collective when heads are dealt over ranks; B may differ between ranks."""
        weight, bias = self.gather_head(head)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(weight.dtype), weight, bias)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [B, D] -> this rank's logits [B, own_sizes[h]] of every head, all in one product."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(self.weight.dtype), self.weight, self.bias).split(
                self.local_sizes, 1
            )
