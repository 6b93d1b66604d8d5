"""Feature tables for tests of search."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_scan.data.feature_table import FeatureTable


def random_rows(
    n: int = 401, dim: int = 24, groups: tuple[int, ...] = (30, 45), seed: int = 0
) -> np.ndarray:
    """Random rows [n, dim] float16, with groups of exact duplicates scattered over all rows."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, dim)).astype(np.float16) / 4
    for i, count in enumerate(groups):
        rows[rng.choice(n, count, replace=False)] = rows[7 + 100 * i]
    return rows.astype(np.float16)


def write_table(rows: np.ndarray, path: Path, shards: int = 5) -> FeatureTable:
    """Rows [n, dim] as a feature table of one view."""
    table = FeatureTable.create(path, (len(rows), 1, rows.shape[1]), shards)
    for shard in range(table.num_shards):
        start, stop = table.shard_range(shard)
        table.write_shard(shard, rows[start:stop, None])
    return table
