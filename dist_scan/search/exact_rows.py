"""Rows prepared so that their float64 inner products are exact.

Exact sums do not depend on their order. Scores and k-means sums are therefore bitwise equal for
any number of ranks, any partition of the rows and any BLAS, and equal scores compare as equal.

Why an inner product is exact. Every finite float16 number is a multiple of 2^-24, so a product of
two is a multiple of 2^-48. Rows are scaled to norms of at most 4 = MAX_NORM. By Cauchy-Schwarz a
sum over any subset S of the terms is bounded: |sum_S q_d r_d| <= |q_S| |r_S| <= 16. A partial sum
is thus an integer of at most 2^52 in units of 2^-48, and float64 holds all integers up to 2^53. No
addition rounds, whatever the order; neither does a fused multiply-add.

Squared distances. -|q - r|^2 = 2 q.r - |q|^2 - |r|^2 is as small as -(|q| + |r|)^2. With norms of
at most 2 = MAX_NORM_L2 that is -16 and the argument above holds; with norms of 4 it would be -64,
and 2^6 in units of 2^-48 needs 54 bits.

Rounding the scaled row to float16 can lengthen it, by at most a factor of 1 + 2^-11 plus
sqrt(D) 2^-25. There is room for it: 2^53 units are 32, twice the bound.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.search.shard_readers import (
    ShardReaders,
    check_view,
    find_shard_readers,
    rank_range,
    shard_pieces,
)
from dist_scan.world.collectives import all_max, all_sum, gather_objects
from dist_scan.world.world import current

MAX_NORM = 4.0
MAX_NORM_L2 = 2.0
FLOAT16_SPACING = 2.0**-24  # every finite float16 number is a multiple of it
SMALLEST_NORMAL = 2.0**-14  # below it float16 has fewer significant digits
BLOCK_ROWS = 8192  # rows converted to float64 at a time
MAX_LISTED = 8  # rows named in an error message


@dataclass(frozen=True)
class ExactRows:
    """One view of a feature table, with rows of float16 whose inner products are exact.

    With `normalise` rows have unit length, rounded to float16. Otherwise all rows are multiplied by
    one power of two, `scale`, that brings the largest norm to between half the maximum and the
    maximum. Scores of scaled rows times scale^-2 are those of the table; values that scaling moves
    below float16's smallest normal number lose digits.
    """

    table: FeatureTable
    view: int
    normalise: bool
    scale: float
    readers: ShardReaders

    @property
    def num_rows(self) -> int:
        """Number of rows N of the whole table."""
        return self.table.num_rows

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Write the rows start, start + 1, ... to out [n, D], float16 or float32."""
        for shard, first, stop in shard_pieces(self.table, start, start + len(out)):
            shard_start = self.table.shard_range(shard)[0]
            rows = self.table.shard(shard)[first - shard_start : stop - shard_start, self.view]
            out[first - start : stop - start] = self._prepare(rows)

    def read_spans(self, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n] int64, rows [n, D] float32) of spans (start, stop) that this rank can read."""
        ids = np.concatenate([np.zeros(0, np.int64), *(np.arange(*span) for span in spans)])
        rows = np.empty((len(ids), self.table.dim), np.float32)
        done = 0
        for start, stop in spans:
            self.read_into(rows[done : done + stop - start], start)
            done += stop - start
        return ids, rows

    def local_spans(self) -> list[tuple[int, int]]:
        """Spans of the rows that this rank works on, ascending; every row belongs to one rank.

        An equal part of all rows if every rank can read every shard; otherwise the shards that this
        rank reads.
        """
        if self.readers.all_read_everything():
            return [rank_range(self.num_rows)]
        return [self.table.shard_range(shard) for shard in self.readers.local_shards()]

    def _prepare(self, rows: np.ndarray) -> np.ndarray:
        if self.normalise:
            return unit_rows(rows)
        if self.scale == 1:
            return rows
        return (rows.astype(np.float32) * np.float32(self.scale)).astype(np.float16)


def prepare_rows(
    table: FeatureTable, normalise: bool, view: int = 0, max_norm: float = MAX_NORM
) -> ExactRows:
    """A view of a table as rows with exact inner products. Collective.

    Each rank reads its shards once to find the largest norm. Raises ValueError on all ranks for a
    missing view or shard, for rows that are not finite and, with `normalise`, for rows of zeros.
    Warns when scaling costs the shortest rows digits.
    """
    view = check_view(table, view)
    readers = find_shard_readers(table)
    gathered = gather_objects(_local_norms(table, readers, view))
    # Statistics of all ranks' rows.
    non_finite, zero, norms = (sorted(chain.from_iterable(lists)) for lists in zip(*gathered))
    if non_finite:
        raise ValueError(
            f"features of rows {non_finite[:MAX_LISTED]} of {table.path} are NaN or Inf; "
            "check these images and the network that made the features"
        )
    if normalise and zero:
        raise ValueError(
            f"features of rows {zero[:MAX_LISTED]} are all zero and have no direction; "
            "use another metric (l2, inner_product), or look at these images"
        )
    # The power of two that brings the largest norm just below the maximum.
    scale = 1.0
    if not normalise:
        longest = max([FLOAT16_SPACING, *norms])
        scale = 2.0 ** math.floor(math.log2(max_norm / longest))
        if norms and current().rank == 0:
            _warn_if_digits_are_lost(table, norms[0], norms[-1], scale)
    return ExactRows(table, view, normalise, scale, readers)


def _local_norms(
    table: FeatureTable, readers: ShardReaders, view: int
) -> tuple[list[int], list[int], list[float]]:
    """(non-finite rows, rows of zeros, smallest and largest other norm) of this rank's shards.

    At most MAX_LISTED rows of a shard are listed.
    """
    non_finite: list[int] = []
    zero: list[int] = []
    norms: list[float] = []
    for shard in readers.local_shards():
        squares = squared_norms(table.shard(shard)[:, view])
        first = table.shard_range(shard)[0]
        is_finite = np.isfinite(squares)
        non_finite += (np.flatnonzero(~is_finite)[:MAX_LISTED] + first).tolist()
        zero += (np.flatnonzero(squares == 0)[:MAX_LISTED] + first).tolist()
        # The shortest and the longest row with a direction.
        positive = np.sqrt(squares[is_finite & (squares > 0)])
        if len(positive):
            norms += [float(positive.min()), float(positive.max())]
    return non_finite, zero, norms


def _warn_if_digits_are_lost(
    table: FeatureTable, shortest: float, longest: float, scale: float
) -> None:
    """Warn if the shortest row's typical value lies below float16's smallest normal number."""
    if shortest * scale < SMALLEST_NORMAL * math.sqrt(table.dim):
        warnings.warn(
            f"{table.path}: norms of rows range from {shortest:.3g} to {longest:.3g}; the shortest "
            f"rows are rounded to a coarser grid (multiples of {FLOAT16_SPACING / scale:.2g}) "
            "than they are stored on. Leave the longest rows out, or use cosine",
            stacklevel=4,
        )


def blocks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive blocks of at most BLOCK_ROWS rows."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield rows[start : start + BLOCK_ROWS]


def squared_norms(rows: np.ndarray) -> np.ndarray:
    """Squared norms [n] float64 of float16 or float32 rows, computed a block of rows at a time."""
    parts = [(block.astype(np.float64) ** 2).sum(1) for block in blocks_of(rows)]
    return np.concatenate([*parts, np.zeros(0)])


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] scaled to unit length in float64 and rounded to float16."""
    out = np.empty(rows.shape, np.float16)
    for b in range(0, len(rows), BLOCK_ROWS):
        block = rows[b : b + BLOCK_ROWS].astype(np.float64)
        out[b : b + BLOCK_ROWS] = block / np.sqrt((block * block).sum(1, keepdims=True))
    return out


class LocalRows:
    """The rows that this rank works on, in memory, with statistics of all ranks' rows. Collective.

    values [n, D] float32 (numbers of float16); ids [n], ascending; squared_norms [n] float64.
    Of all ranks: num_rows, max_norm, and sum_of_squares, the sum of the squared norms.
    """

    def __init__(self, rows: ExactRows) -> None:
        self.num_rows = rows.num_rows
        self.ids, self.values = rows.read_spans(rows.local_spans())
        self.squared_norms = squared_norms(self.values)
        self.sum_of_squares = _exact_sum(self.squared_norms)
        largest = torch.tensor(self.squared_norms.max(initial=0.0), dtype=torch.float64)
        self.max_norm = float(all_max(largest)) ** 0.5


def _exact_sum(squares: np.ndarray) -> float:
    """Sum over all ranks of multiples of 2^-48, added up as integers and rounded once.

    A squared norm of 16 is 2^52 units: their sum would overflow int64 at 2,048 rows. The upper and
    the lower 24 bits are summed apart, which is enough for 2^35 rows.
    """
    units = (squares * 2.0**48).astype(np.int64)
    upper = int((units >> 24).sum())
    lower = int((units & (2**24 - 1)).sum())
    upper, lower = all_sum(torch.tensor([upper, lower])).tolist()
    return float(upper * 2**24 + lower) * 2.0**-48
