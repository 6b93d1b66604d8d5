"""Feature tables for the benchmarks of search and of heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dist_scan.data.feature_table import FeatureTable

NUM_SHARDS = 16


def write_table(
    path: Path, num_rows: int, dim: int, rows_of: Callable[[int, int], np.ndarray]
) -> FeatureTable:
    """Write a feature table of one view; rows_of(start, stop) are the rows of a shard."""
    from dist_scan.data.feature_table import FeatureTable

    table = FeatureTable.create(path, (num_rows, 1, dim), NUM_SHARDS)
    for shard in range(table.num_shards):
        table.write_shard(shard, rows_of(*table.shard_range(shard))[:, None])
    return table


def write_rows(path: Path, rows: np.ndarray) -> FeatureTable:
    """Write rows [N, D] as a feature table."""
    return write_table(path, *rows.shape, lambda start, stop: rows[start:stop])


def write_unit_rows(path: Path, num_rows: int, dim: int, num_centres: int, noise: float) -> None:
    """Write a feature table of unit rows around random centres."""
    from dist_scan.search.exact_rows import unit_rows

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_centres, dim)).astype(np.float32)

    def rows_of(start: int, stop: int) -> np.ndarray:
        near = centres[rng.integers(num_centres, size=stop - start)]
        return unit_rows(near + noise * rng.standard_normal((stop - start, dim), np.float32))

    write_table(path, num_rows, dim, rows_of)


def read_rows(path: Path) -> np.ndarray:
    """All rows [N, D] of a feature table as float32."""
    from dist_scan.data.feature_table import FeatureTable

    table = FeatureTable.open(path)
    return table.rows(np.arange(table.num_rows)).astype(np.float32)
