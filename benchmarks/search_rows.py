"""Rows for the benchmarks of search."""

from __future__ import annotations

from pathlib import Path

import numpy as np

NUM_SHARDS = 16


def write_unit_rows(path: Path, rows: int, dim: int, num_centres: int, noise: float) -> None:
    """Write a feature table of unit rows around random centres."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.exact_rows import unit_rows

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_centres, dim)).astype(np.float32)
    table = FeatureTable.create(path, rows, 1, dim, NUM_SHARDS)
    for shard in range(table.num_shards):
        start, stop = table.shard_range(shard)
        near = centres[rng.integers(num_centres, size=stop - start)]
        offsets = noise * rng.standard_normal((stop - start, dim), np.float32)
        table.write_shard(shard, unit_rows(near + offsets)[:, None])


def read_rows(path: Path) -> np.ndarray:
    """All rows [N, D] of a feature table as float32."""
    from dist_scan.data.feature_table import FeatureTable

    table = FeatureTable.open(path)
    return table.rows(np.arange(table.num_rows)).astype(np.float32)
