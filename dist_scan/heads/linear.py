"""Linear cluster heads on shared features, all in one weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from dist_scan.heads.partition import HeadPartition, partition_clusters
from dist_scan.heads.products import head_slices
from dist_scan.world.collectives import all_sum
from dist_scan.world.sharding import RowSharding
from dist_scan.world.world import current


def _distinct_and_at_least_two(value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else value
    if not numbers or min(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{value}; allowed: a number of at least 2, or a list of different ones "
            "([500, 1000, 2000])"
        )
    return value


NumClusters = Annotated[int | tuple[int, ...], AfterValidator(_distinct_and_at_least_two)]
"""Config field of a method with heads: one number of clusters, or several."""


def head_sizes(num_clusters: int | Sequence[int], num_heads: int) -> tuple[int, ...]:
    """Clusters of each head: num_heads heads for each number of clusters, in the order given."""
    numbers = (num_clusters,) if isinstance(num_clusters, int) else num_clusters
    return tuple(c for c in numbers for _ in range(num_heads))


class ClusterHeads(nn.Module):
    """Independent linear heads on the same features.

    weight [S, D] and bias [S] hold the heads one after the other, S = sum(sizes); head h has
    sizes[h] clusters (`head_sizes`) and PyTorch's default initialisation of a Linear layer. Logits
    are always float32 or better: bfloat16 logits are off by 8e-2.

    Partitioned by heads or clusters, weight and bias hold this rank's clusters only: local_sizes[h]
    of head h. Initial weights do not depend on the partition.
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
        self.partition = partition
        self.cluster_ranges = partition_clusters(self.sizes, partition, current().world_size)
        local_ranges = self.cluster_ranges[current().rank]
        self.local_sizes = tuple(part.stop - part.start for part in local_ranges)
        self.slices = head_slices(self.sizes)
        """Rows of each head among all S."""
        self.local_slices = head_slices(self.local_sizes)
        """Rows of this rank's clusters of each head in weight and bias."""
        weights = []
        biases = []
        for c, local in zip(self.sizes, local_ranges):
            # Every rank draws every head, so the random numbers are the same for any partition.
            head = nn.Linear(in_dim, c)
            weights.append(head.weight.detach()[local].clone())
            biases.append(head.bias.detach()[local].clone())
        self.weight = nn.Parameter(torch.cat(weights))
        self.bias = nn.Parameter(torch.cat(biases))

    @property
    def row_sharding(self) -> RowSharding | None:
        """Which of the S rows each rank holds; None if every rank holds all."""
        if self.partition == "batch":
            return None
        return RowSharding(
            tuple(
                tuple(
                    slice(head.start + part.start, head.start + part.stop)
                    for head, part in zip(self.slices, ranges)
                )
                for ranges in self.cluster_ranges
            )
        )

    def gather_head(self, head: int) -> tuple[Tensor, Tensor]:
        """(weight [C, D], bias [C]) of one head. If partitioned: collective, without gradient."""
        local = self.local_slices[head]
        if self.partition == "batch":
            return self.weight[local], self.bias[local]
        # Every cluster is on one rank and 0 on the others: the sum over ranks is the complete head.
        weight = self.weight.new_zeros(self.sizes[head], self.weight.shape[1])
        bias = self.bias.new_zeros(self.sizes[head])
        clusters = self.cluster_ranges[current().rank][head]
        weight[clusters] = self.weight[local].detach()
        bias[clusters] = self.bias[local].detach()
        return all_sum(weight), all_sum(bias)

    def head_logits(self, head: int, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, C] of one head.

        Collective if partitioned; B may differ between ranks.
        """
        weight, bias = self.gather_head(head)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(weight.dtype), weight, bias)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [B, D] -> logits [B, local_sizes[h]] of every head, in one product."""
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(features.to(self.weight.dtype), self.weight, self.bias)
            return logits.split(self.local_sizes, 1)
