"""Rows as search wants them: on float16's grid and short enough that a float64 inner product is exact in any order.

With values on multiples of 2^-24 and squared norms of at most 16, products are multiples of 2^-48 and partial sums stay below 2^5:
53 bits hold them. For l2 norms are at most 2: 2 q.r - |q|^2 - |r|^2 then stays below 2^5 too (at 4 it would reach 2^6). Scores then do not depend
on the number of ranks, on how rows are cut, or on the BLAS (PERFORMANCE.md 1).
"""

from __future__ import annotations

import hashlib
import math
import operator
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.world.collectives import broadcast_async, gather_objects
from dist_scan.world.world import current

MAX_NORM = 4.0
MAX_NORM_L2 = 2.0
PIECE = 8192  # rows in float64 at a time


@dataclass(frozen=True)
class ExactRows:
    """One view of a table, ready for exact products: unit rows, or rows times a power of two that brings the longest to a norm of 2 to 4 (l2: 1 to 2).

    In the second case what falls below float16's grid is lost, and scores are those of the scaled rows: times scale^-2 they are the table's.
    """

    table: FeatureTable
    view: int
    unit: bool
    scale: float
    held: tuple[frozenset[int], ...]
    """By rank: the shards that lie where this rank can read them (all, on a shared file system)."""

    @property
    def num_rows(self) -> int:
        """N of the whole table."""
        return self.table.num_rows

    def read(self, index: np.ndarray) -> np.ndarray:
        """[n, D] float16. The rows must lie in shards that this rank holds."""
        return self._ready(self.table.rows(index, self.view))

    def span(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1, as read() but without an index."""
        return np.concatenate(
            [
                self._ready(self.table.shard(s)[a:b, self.view])
                for s, a, b in _pieces(self.table, start, stop)
            ]
        )

    def own(self) -> np.ndarray:
        """The rows this rank works on: an equal share when every rank can read every shard, else those of the shards it serves."""
        n, world = self.num_rows, current()
        if all(len(h) == self.table.num_shards for h in self.held):
            return np.arange(
                world.rank * n // world.world_size, (world.rank + 1) * n // world.world_size
            )
        mine = [
            np.arange(*self.table.shard_range(s))
            for s, rank in enumerate(servers(self.held, self.table.num_shards))
            if rank == world.rank
        ]
        return np.concatenate([*mine, np.zeros(0, np.int64)])

    def _ready(self, rows: np.ndarray) -> np.ndarray:
        if self.unit:
            return unit_rows(rows)
        return (
            rows
            if self.scale == 1
            else (rows.astype(np.float32) * np.float32(self.scale)).astype(np.float16)
        )


def content(table: FeatureTable, held: tuple[frozenset[int], ...], view: int) -> str:
    """16 hex digits over every number of a view, the same for any number of ranks. Collective: each rank reads the shards it serves."""
    mine = {
        s: hashlib.sha256(np.ascontiguousarray(table.shard(s)[:, view])).digest()
        for s, rank in enumerate(servers(held, table.num_shards))
        if rank == current().rank
    }
    every = {s: digest for part in gather_objects(mine) for s, digest in part.items()}
    return hashlib.sha256(b"".join(every[s] for s in sorted(every))).hexdigest()[:16]


def held_by_rank(table: FeatureTable) -> tuple[frozenset[int], ...]:
    """The shards that each rank can read. Collective."""
    return tuple(
        gather_objects(frozenset(range(table.num_shards)) - frozenset(table.missing_shards()))
    )


def check_view(table: FeatureTable, view: int) -> int:
    """The view as an int. Raises ValueError for one that is not there."""
    if not 0 <= view < table.num_views:
        raise ValueError(f"view {view} of {table.path}; allowed: 0 to {table.num_views - 1}")
    return operator.index(view)


def prepare_rows(
    table: FeatureTable, normalise: bool, view: int = 0, longest: float = MAX_NORM
) -> ExactRows:
    """A view of a table for search, its longest row brought to a norm of at most `longest`. Collective: each rank looks at the shards it serves.

    Raises ValueError on all ranks for a view or shard that is not there, naming rows that are no numbers, or of length zero when they must
    be normalised. Warns when rows are so much shorter than the longest that scaling costs them digits.
    """
    view, held = check_view(table, view), held_by_rank(table)
    serving = servers(held, table.num_shards)
    looked = [
        _look(table, int(s), view) for s in np.flatnonzero(np.array(serving) == current().rank)
    ]
    bad, zero, lengths = (
        sorted(sum(gather_objects([x for one in looked for x in one[i]]), [])) for i in range(3)
    )
    if bad:
        raise ValueError(
            f"features of rows {bad[:8]} of {table.path} are NaN or Inf; look at these images, or at what made the features"
        )
    if normalise and zero:
        raise ValueError(
            f"features of rows {zero[:8]} are all zero and have no direction; "
            "use another metric (l2, inner_product), or look at these images"
        )
    scale = 1.0 if normalise else 2.0 ** math.floor(math.log2(longest / max([2.0**-24, *lengths])))
    if (
        lengths
        and not normalise
        and current().rank == 0
        and lengths[0] * scale < 2.0**-14 * math.sqrt(table.dim)
    ):
        warnings.warn(
            f"{table.path}: rows are of lengths {lengths[0]:.3g} to {lengths[-1]:.3g}; the shortest are searched on a coarser grid than they are "
            f"kept on (multiples of {2.0**-24 / scale:.2g}). Leave the longest out, or search by cosine",
            stacklevel=3,
        )
    return ExactRows(table, view, normalise, scale, held)


def _look(table: FeatureTable, shard: int, view: int) -> tuple[list[int], list[int], list[float]]:
    """Of a shard: the first rows that are no numbers, the first that are zero, the shortest other's length and the longest's (if there is one)."""
    norms, first = squares(table.shard(shard)[:, view]), table.shard_range(shard)[0]
    good = np.sqrt(norms[np.isfinite(norms) & (norms > 0)])
    return (
        (np.flatnonzero(~np.isfinite(norms))[:8] + first).tolist(),
        (np.flatnonzero(norms == 0)[:8] + first).tolist(),
        ([float(good.min()), float(good.max())] if len(good) else []),
    )


def servers(held: tuple[frozenset[int], ...], num_shards: int) -> list[int]:
    """The rank that reads each shard for all: neighbours in rank order where they can, else the first that has it."""
    found = []
    for shard in range(num_shards):
        ranks = [r for r, shards in enumerate(held) if shard in shards]
        if not ranks:
            raise ValueError(
                f"shard {shard} of the features is on no rank's disk; run the stage that makes it again"
            )
        wanted = shard * len(held) // num_shards
        found.append(wanted if wanted in ranks else ranks[0])
    return found


def chunks(rows: ExactRows, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """All rows of all ranks in order, as (first row, [m, D] float16 that lasts until the next): collective.

    Each rank reads the shards it serves and broadcasts them. While one chunk is searched the next is on its way and the one after it is read.
    """
    n, rank, serving = rows.num_rows, current().rank, servers(rows.held, rows.table.num_shards)
    spans = [(b, min(b + size, n)) for b in range(0, n, size)]
    buffers = [
        np.empty((min(size, n), rows.table.dim), np.float16) for _ in range(min(3, len(spans)))
    ]

    def parts(i: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
        for server, a, b in _runs(rows.table, serving, *spans[i]):
            yield server, a, b, buffers[i % 3][a - spans[i][0] : b - spans[i][0]]

    def fill(i: int) -> None:
        for server, a, b, out in parts(i):
            if server == rank:
                out[:] = rows.span(a, b)

    def send(i: int) -> list:
        return [
            broadcast_async(torch.from_numpy(out.view(np.uint8)), server)
            for server, _, _, out in parts(i)
        ]

    with ThreadPoolExecutor(1) as reader:
        fill(0)
        flying = send(0)
        reading = reader.submit(fill, 1) if len(spans) > 1 else None
        try:
            for i, (start, stop) in enumerate(spans):
                for flight in flying:
                    flight.wait()
                flying = []
                if reading:
                    reading.result()
                    flying = send(i + 1)
                reading = reader.submit(fill, i + 2) if i + 2 < len(spans) else None
                yield start, buffers[i % 3][: stop - start]
        finally:
            for flight in flying:
                flight.wait()


def _pieces(table: FeatureTable, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first row inside it, one past its last) of rows start..stop-1."""
    for s in range(table.num_shards):
        a, b = table.shard_range(s)
        if a < stop and start < b:
            yield s, max(start, a) - a, min(stop, b) - a


def _runs(table: FeatureTable, serving: list[int], start: int, stop: int) -> list[list[int]]:
    """[server, first row, one past the last] of rows start..stop-1, neighbouring shards of one server together."""
    runs: list[list[int]] = []
    for s, a, b in _pieces(table, start, stop):
        first = table.shard_range(s)[0]
        if runs and runs[-1][0] == serving[s]:
            runs[-1][2] = first + b
        else:
            runs.append([serving[s], first + a, first + b])
    return runs


def squares(rows: np.ndarray) -> np.ndarray:
    """Squared norms [n] float64 of float16 or float32 rows, a piece at a time."""
    return np.concatenate(
        [(rows[b : b + PIECE].astype(np.float64) ** 2).sum(1) for b in range(0, len(rows), PIECE)]
        or [np.zeros(0)]
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """[n, D] to unit length, in float64, rounded to float16."""
    out = np.empty(rows.shape, np.float16)
    for b in range(0, len(rows), PIECE):
        wide = rows[b : b + PIECE].astype(np.float64)
        out[b : b + PIECE] = wide / np.sqrt((wide * wide).sum(1, keepdims=True))
    return out
