"""Which rank holds which clusters of which heads, and how the partition is chosen."""

from __future__ import annotations

import pytest
import torch

from dist_scan.heads.partition import HeadPartition, choose_partition, partition_clusters
from dist_scan.world.sharding import RowSharding

SIZES = (500,) * 3 + (1000,) * 3 + (2000,) * 3


@pytest.mark.parametrize("partition", ["heads", "clusters"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_cluster_is_on_exactly_one_rank(partition: HeadPartition, world_size: int) -> None:
    ranges = partition_clusters(SIZES, partition, world_size)
    for h, c in enumerate(SIZES):
        assert sorted(i for rank in ranges for i in range(c)[rank[h]]) == list(range(c))
        if partition == "heads":
            assert sum(rank[h] == slice(0, c) for rank in ranges) == 1
        else:
            local_sizes = [rank[h].stop - rank[h].start for rank in ranges]
            assert max(local_sizes) - min(local_sizes) <= 1
    loads = [sum(at.stop - at.start for at in rank) for rank in ranges]
    assert min(loads) > 0
    assert max(loads) <= sum(SIZES) / world_size + max(SIZES)


def test_large_heads_are_placed_first() -> None:
    ranges = partition_clusters(SIZES, "heads", 3)
    assert [sum(at.stop for at in rank) for rank in ranges] == [3500] * 3


@pytest.mark.parametrize(
    "world_size, sizes, dim, batch, expected",
    [
        (1, (1000,) * 10, 2048, 4096, "batch"),
        # SCAN's ImageNet recipe on two and on five GPUs
        (2, (1000,) * 10, 2048, 4096, "heads"),
        (5, (1000,) * 10, 2048, 4096, "heads"),
        # 4, 3 and 3 heads: 1.2 of an even division
        (3, (1000,) * 10, 2048, 4096, "heads"),
        # Two ranks with 2 heads would hold up the six with one.
        (8, (1000,) * 10, 2048, 4096, "clusters"),
        # More ranks than heads
        (11, (1000,) * 10, 2048, 4096, "clusters"),
        (64, (1000,) * 10, 2048, 4096, "clusters"),
        # A small gradient costs less than reading more rows.
        (2, (10,) * 3, 64, 200, "batch"),
        (8, (1000,), 2048, 256, "clusters"),
        # 1.33 of an even division, and fewer clusters than ranks
        (8, (6,) * 12, 2048, 16, "batch"),
        # A method whose heads cannot be split
        (8, (), 2048, 4096, "batch"),
    ],
)
def test_partition_follows_from_the_sizes(
    world_size: int, sizes: tuple[int, ...], dim: int, batch: int, expected: HeadPartition
) -> None:
    partition, reason = choose_partition(world_size, sizes, dim, batch)
    assert partition == expected
    assert reason


def test_a_requested_partition_must_give_every_rank_work() -> None:
    with pytest.raises(
        ValueError,
        match=r"runtime.head_partition: 'heads' .*3 heads, 4 ranks.*auto, batch, clusters$",
    ):
        choose_partition(4, (9,) * 3, 8, 8, "heads")
    with pytest.raises(ValueError, match="2 clusters.*allowed: auto, batch, heads$"):
        choose_partition(3, (9, 2, 9), 8, 8, "clusters")
    assert choose_partition(3, (9,) * 3, 8, 8, "heads")[0] == "heads"
    assert choose_partition(9, (9,) * 3, 8, 8, "clusters")[0] == "clusters"


def test_row_sharding_takes_rows_of_the_whole_tensor_only() -> None:
    rows = RowSharding(((slice(0, 2), slice(4, 5)),))
    assert rows.num_rows == 3
    with pytest.raises(ValueError, match="has 2 rows, but 3 are distributed"):
        rows.local_rows(torch.zeros(2, 4))
