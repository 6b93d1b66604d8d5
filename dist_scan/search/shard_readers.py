"""Which rank reads which shard of a feature table.

On a shared file system every rank can read every shard. Where features lie on the local disks of
the nodes, a rank can read only some of them. Each shard has one reader, which broadcasts its rows
to the other ranks when they need them.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dist_scan.data.feature_table import FeatureTable
from dist_scan.world.collectives import gather_objects
from dist_scan.world.world import current


@dataclass(frozen=True)
class ShardReaders:
    """The shards that each rank can read, and the rank that reads each shard for all."""

    readable_shards: tuple[frozenset[int], ...]
    """By rank."""
    reader: tuple[int, ...]
    """By shard."""

    def local_shards(self) -> list[int]:
        """Shards that this rank reads for all ranks, in ascending order."""
        return [shard for shard, rank in enumerate(self.reader) if rank == current().rank]

    def all_read_everything(self) -> bool:
        """Whether every rank can read every shard."""
        return all(len(shards) == len(self.reader) for shards in self.readable_shards)


def find_shard_readers(table: FeatureTable) -> ShardReaders:
    """The readers of a table's shards, as even as the disks allow. Collective.

    Raises ValueError when no rank can read some shard.
    """
    present = frozenset(range(table.num_shards)) - frozenset(table.missing_shards())
    readable_shards = tuple(gather_objects(present))
    world_size = len(readable_shards)
    reader = []
    for shard in range(table.num_shards):
        ranks = [rank for rank, shards in enumerate(readable_shards) if shard in shards]
        if not ranks:
            raise ValueError(
                f"shard {shard} of {table.path} is on no rank's disk; "
                "run the stage that makes these features again"
            )
        # Consecutive shards go to one rank where possible, so that broadcasts are long.
        preferred = shard * world_size // table.num_shards
        reader.append(preferred if preferred in ranks else ranks[0])
    return ShardReaders(readable_shards, tuple(reader))


def check_view(table: FeatureTable, view: int) -> int:
    """The view as an int. Raises ValueError unless the table has it."""
    if not 0 <= view < table.num_views:
        raise ValueError(f"view {view} of {table.path}; allowed: 0 to {table.num_views - 1}")
    return operator.index(view)


def content_digest(table: FeatureTable, readers: ShardReaders, view: int) -> str:
    """16 hex digits of a SHA-256 over all values of a view. Collective.

    It depends on how the table is divided into shards, but not on the number of ranks.
    """
    local = {}
    for shard in readers.local_shards():
        values = np.ascontiguousarray(table.shard(shard)[:, view])
        local[shard] = hashlib.sha256(values.data).digest()
    digests = {shard: digest for part in gather_objects(local) for shard, digest in part.items()}
    joined = b"".join(digests[shard] for shard in sorted(digests))
    return hashlib.sha256(joined).hexdigest()[:16]


def shard_pieces(table: FeatureTable, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The shards with rows start..stop-1, as (shard, first of these rows, one past the last)."""
    for shard in range(table.num_shards):
        shard_start, shard_stop = table.shard_range(shard)
        if shard_start < stop and start < shard_stop:
            yield shard, max(start, shard_start), min(stop, shard_stop)


def rank_range(num_rows: int) -> tuple[int, int]:
    """First and one past the last row of this rank's equal, contiguous part of `num_rows` rows."""
    world = current()
    start = world.rank * num_rows // world.world_size
    return start, (world.rank + 1) * num_rows // world.world_size
