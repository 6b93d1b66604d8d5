"""How ranks divide the training of heads on cached features: by batch, by heads, or by clusters.

Heads on cached features share no parameters. Partitioned by heads or by clusters, each rank reads
the whole batch and holds a part of the weights: gradients are not sent, and weights, gradients,
optimizer state and selected heads are stored once over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

HeadPartition = Literal["batch", "heads", "clusters"]
"""What ranks divide: the batch (data parallel), whole heads, or the clusters of every head."""

MAX_LOAD_RATIO = 1.25
"""Most clusters on one rank relative to an even division; all ranks wait for the busiest one."""

MIB = 2**20


def partition_clusters(
    sizes: Sequence[int], partition: HeadPartition, world_size: int
) -> tuple[tuple[slice, ...], ...]:
    """Clusters of head h that rank r holds, as slices [r][h]; empty slices included.

    batch: every rank holds all. heads: whole heads, the largest first, each to the rank with the
    fewest clusters so far. clusters: an even part of every head, in rank order.
    """
    if partition == "batch":
        return (tuple(slice(0, c) for c in sizes),) * world_size
    if partition == "clusters":
        return tuple(
            tuple(slice(c * r // world_size, c * (r + 1) // world_size) for c in sizes)
            for r in range(world_size)
        )
    # Greedy bin packing of whole heads.
    load = [0] * world_size
    owner = [0] * len(sizes)
    for h in sorted(range(len(sizes)), key=lambda h: (-sizes[h], h)):
        owner[h] = load.index(min(load))
        load[owner[h]] += sizes[h]
    return tuple(
        tuple(slice(0, c if owner[h] == r else 0) for h, c in enumerate(sizes))
        for r in range(world_size)
    )


def choose_partition(
    world_size: int,
    sizes: Sequence[int],
    dim: int,
    batch: int,
    requested: HeadPartition | Literal["auto"] = "auto",
) -> tuple[HeadPartition, str]:
    """(partition, reason) with the least communication.

    For heads of `sizes` clusters on features [batch, dim] of the global batch. `sizes` is empty
    for a method whose heads cannot be split. Raises ValueError if the requested partition leaves a
    rank without work.
    """
    if not sizes:
        return "batch", "the heads of this method cannot be split"
    if requested != "auto":
        _check_no_idle_rank(world_size, sizes, requested)
        return requested, "set by runtime.head_partition"
    if world_size == 1:
        return "batch", "one rank"
    total = sum(sizes)
    # A ring all-reduce sends and receives every byte of the float32 gradient once.
    gradient_bytes = 8 * total * dim
    # Rows of other ranks that each rank reads if it sees the whole batch: two views in float16.
    row_bytes = 4 * batch * dim * (world_size - 1) // world_size
    if gradient_bytes <= row_bytes:
        return "batch", (
            f"sending a gradient of {gradient_bytes / MIB:.1f} MiB costs less than reading "
            f"{row_bytes / MIB:.1f} MiB more rows on each rank"
        )
    saved = f"no gradient of {gradient_bytes / MIB:.1f} MiB is sent"
    ranges = partition_clusters(sizes, "heads", world_size)
    busiest = max(sum(clusters.stop for clusters in rank) for rank in ranges)
    if world_size <= len(sizes) and busiest * world_size <= MAX_LOAD_RATIO * total:
        return "heads", f"{saved}; the busiest rank has {busiest} of {total} clusters"
    # Seven float32 numbers per head and pair, see split_clusters.
    message_bytes = 28 * len(sizes) * batch
    if min(sizes) >= world_size and message_bytes < gradient_bytes:
        return "clusters", (
            f"{saved}, only {message_bytes / MIB:.1f} MiB of sums; with whole heads the busiest "
            f"rank would have {busiest} of {total} clusters"
        )
    return "batch", f"neither {len(sizes)} heads nor their clusters divide well over the ranks"


def _check_no_idle_rank(world_size: int, sizes: Sequence[int], requested: HeadPartition) -> None:
    most_ranks = {"batch": world_size, "heads": len(sizes), "clusters": min(sizes)}
    if world_size <= most_ranks[requested]:
        return
    if requested == "heads":
        parts = f"{len(sizes)} heads"
    else:
        parts = f"{min(sizes)} clusters in the smallest head"
    allowed = ["auto", *(kind for kind, most in most_ranks.items() if world_size <= most)]
    raise ValueError(
        f"runtime.head_partition: '{requested}' leaves a rank idle ({parts}, {world_size} ranks); "
        f"allowed: {', '.join(allowed)}"
    )
