"""One line that says how a search or a clustering went."""

from __future__ import annotations

import numpy as np

from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.kmeans import KMeansResult


def describe_neighbours(table: NeighbourTable) -> str:
    """Mean scores, and how often rows are neighbours of others (hubs, and rows that are nobody's neighbour). Reads the table once."""
    n, k = table.num_rows, table.num_neighbours
    first = last = total = 0.0
    popular = np.zeros(n, np.int64)
    for s in range(table.num_shards):
        ids, scores = table.rows(np.arange(*table.shard_range(s)))
        first, last, total = (
            first + scores[:, 0].sum(),
            last + scores[:, -1].sum(),
            total + scores.sum(),
        )
        popular += np.bincount(ids.reshape(-1), minlength=n)
    return (
        f"{k} neighbours of {n} rows by {table.metadata['metric']}; mean score {total / (n * k):.4f} (first {first / n:.4f}, last {last / n:.4f}); "
        f"the most popular row is a neighbour of {popular.max()} others, {(popular == 0).sum()} rows of none"
    )


def describe_kmeans(found: KMeansResult) -> str:
    """The objective, how many iterations, and the clusters' sizes."""
    low, middle, high = np.percentile(found.sizes, [0, 50, 100]).astype(int)
    n = len(found.assignment)
    return (
        f"{len(found.sizes)} clusters of {n} rows; objective {found.objective:.8g} ({found.objective / n:.6g} a row) "
        f"after {found.iterations} iterations; sizes {low} to {high}, median {middle}; "
        f"{int((found.sizes == 0).sum())} empty, {found.num_splits} split on the way"
    )
