"""Which rank holds which clusters of which heads, and what ranks share when nobody says."""

from __future__ import annotations

import pytest
import torch

from dist_scan.heads.partition import choose_partition, partition_clusters
from dist_scan.world.sharding import RowSharding

SIZES = (500,) * 3 + (1000,) * 3 + (2000,) * 3


@pytest.mark.parametrize("share", ["heads", "clusters"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_cluster_has_one_owner(share, world_size: int) -> None:
    parts = partition_clusters(SIZES, share, world_size)
    for h, c in enumerate(SIZES):
        assert sorted(i for rank in parts for i in range(c)[rank[h]]) == list(range(c))
        if share == "heads":
            assert sum(rank[h] == slice(0, c) for rank in parts) == 1
        else:
            held = [rank[h].stop - rank[h].start for rank in parts]
            assert max(held) - min(held) <= 1
    loads = [sum(at.stop - at.start for at in rank) for rank in parts]
    assert min(loads) > 0 and max(loads) <= sum(SIZES) / world_size + max(SIZES)


def test_large_heads_are_dealt_first() -> None:
    assert [sum(at.stop for at in rank) for rank in partition_clusters(SIZES, "heads", 3)] == [
        3500
    ] * 3


@pytest.mark.parametrize(
    "world_size, sizes, dim, batch, expected",
    [
        (1, (1000,) * 10, 2048, 4096, "batch"),
        (
            2,
            (1000,) * 10,
            2048,
            4096,
            "heads",
        ),  # the published recipe on one, two and five GPUs a node
        (5, (1000,) * 10, 2048, 4096, "heads"),
        (3, (1000,) * 10, 2048, 4096, "heads"),  # 4, 3 and 3 heads: 1.2 of an even share
        (
            8,
            (1000,) * 10,
            2048,
            4096,
            "clusters",
        ),  # 2 heads on two ranks would hold up the six with one
        (11, (1000,) * 10, 2048, 4096, "clusters"),  # a rank without a head
        (64, (1000,) * 10, 2048, 4096, "clusters"),
        (2, (10,) * 3, 64, 200, "batch"),  # small: rows cost more than the gradient
        (8, (1000,), 2048, 256, "clusters"),
        (
            8,
            (6,) * 12,
            2048,
            16,
            "batch",
        ),  # neither divides: 1.33 of an even share, fewer clusters than ranks
    ],
)
def test_what_ranks_share_follows_from_the_sizes(
    world_size: int, sizes, dim, batch, expected
) -> None:
    share, why = choose_partition(world_size, sizes, dim, batch)
    assert share == expected and why


def test_what_leaves_a_rank_idle_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError,
        match="runtime.heads: 'heads', but 4 ranks would share 3 heads; allowed: auto, batch, clusters",
    ):
        choose_partition(4, (9,) * 3, 8, 8, "heads")
    with pytest.raises(ValueError, match="allowed: auto, batch, heads"):
        choose_partition(3, (9, 2, 9), 8, 8, "clusters")
    assert (
        choose_partition(3, (9,) * 3, 8, 8, "heads")[0] == "heads"
        and choose_partition(9, (9,) * 3, 8, 8, "clusters")[0] == "clusters"
    )


def test_a_part_is_no_whole() -> None:
    rows = RowSharding(((slice(0, 2), slice(4, 5)),))
    assert rows.num_rows == 3
    with pytest.raises(ValueError, match="has 2 rows, but 3 are distributed"):
        rows.local_rows(torch.zeros(2, 4))
