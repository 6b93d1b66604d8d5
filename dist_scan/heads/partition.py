"""What ranks partition when heads train on cached features: the batch (data parallel), the heads, or the clusters of every head.

Heads on a bank partition nothing. Dealt over the ranks, each rank works on the whole batch and a part of the weights: no gradient is
sent, and weights, their gradient, the optimizer's memory and what is kept of the choice are held once over all ranks (PERFORMANCE.md 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

HeadPartition = Literal["batch", "heads", "clusters"]
MAX_LOAD_RATIO = 1.25  # the busiest rank's clusters over an even share; a rank with one head more than the others holds them all up
MIB = 2**20


def partition_clusters(
    sizes: Sequence[int], partition: HeadPartition, world_size: int
) -> tuple[tuple[slice, ...], ...]:
    """[W][H]: the clusters of head h that rank r holds (empty slices included).

    batch: all on every rank. heads: whole heads, the largest first, each to the rank with the fewest clusters so far. clusters: of every
    head an even part, rank by rank.
    """
    if partition == "batch":
        return (tuple(slice(0, c) for c in sizes),) * world_size
    if partition == "clusters":
        return tuple(
            tuple(slice(c * r // world_size, c * (r + 1) // world_size) for c in sizes)
            for r in range(world_size)
        )
    load, owner = [0] * world_size, {}
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
    """(what ranks partition, why) for heads of `sizes` clusters on features [batch, dim] of the global batch.

    `sizes` is empty for a method whose heads cannot be split. Raises ValueError when what was asked for would leave a rank without work.
    """
    if not sizes:
        return "batch", "the heads of this method cannot be split"
    if requested != "auto":
        _refuse_idle_ranks(world_size, sizes, requested)
        return requested, "asked for by runtime.heads"
    if world_size == 1:
        return "batch", "one rank"
    total = sum(sizes)
    gradient, rows = (
        8 * total * dim,
        4 * batch * dim * (world_size - 1) // world_size,
    )  # ring: each byte out and in; two views in fp16
    if gradient <= rows:
        return (
            "batch",
            f"a gradient of {gradient / MIB:.1f} MiB to send is less than {rows / MIB:.1f} MiB of rows that each rank would read more",
        )
    saved = f"no gradient of {gradient / MIB:.1f} MiB to send"
    load = max(
        sum(at.stop for at in parts) for parts in partition_clusters(sizes, "heads", world_size)
    )
    if world_size <= len(sizes) and load * world_size <= MAX_LOAD_RATIO * total:
        return "heads", f"{saved}; the busiest of {world_size} ranks has {load} of {total} clusters"
    messages = 28 * len(sizes) * batch  # head_clusters: seven numbers a head and row
    if min(sizes) >= world_size and messages < gradient:
        return (
            "clusters",
            f"{saved} but {messages / MIB:.1f} MiB of sums; whole heads would give the busiest of {world_size} ranks {load} of {total} clusters",
        )
    return (
        "batch",
        f"{len(sizes)} heads do not divide well over {world_size} ranks, nor do their clusters",
    )


def _refuse_idle_ranks(world_size: int, sizes: Sequence[int], requested: HeadPartition) -> None:
    most = {"batch": world_size, "heads": len(sizes), "clusters": min(sizes)}
    if world_size > most[requested]:
        few = f"{most[requested]} {requested}{' of a head' if requested == 'clusters' else ''}"
        raise ValueError(
            f"runtime.heads: '{requested}', but {world_size} ranks would share {few}; "
            f"allowed: {', '.join(['auto', *(k for k, v in most.items() if world_size <= v)])}"
        )
