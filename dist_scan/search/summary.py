"""One-line summaries of a neighbour search and of a k-means."""

from __future__ import annotations

import numpy as np

from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.kmeans import KMeansResult


def describe_neighbours(table: NeighbourTable) -> str:
    """Mean scores, and how unevenly rows are neighbours of others. Reads the table once."""
    n, k = table.num_rows, table.num_neighbours
    first = last = total = 0.0
    num_neighbour_of = np.zeros(n, np.int64)
    for shard in range(table.num_shards):
        ids, scores = table.rows(np.arange(*table.shard_range(shard)))
        first += scores[:, 0].sum()
        last += scores[:, -1].sum()
        total += scores.sum()
        num_neighbour_of += np.bincount(ids.reshape(-1), minlength=n)
    return (
        f"{k} neighbours of {n} rows by {table.metadata['metric']}; "
        f"mean score {total / (n * k):.4f} (first {first / n:.4f}, last {last / n:.4f}); "
        f"the most frequent neighbour is one of {num_neighbour_of.max()} rows, "
        f"{(num_neighbour_of == 0).sum()} rows are a neighbour of none"
    )


def describe_kmeans(result: KMeansResult) -> str:
    """Objective, iterations and cluster sizes."""
    smallest, median, largest = np.percentile(result.sizes, [0, 50, 100]).astype(int)
    n = len(result.assignment)
    return (
        f"{len(result.sizes)} clusters of {n} rows; "
        f"objective {result.objective:.8g} ({result.objective / n:.6g} per row) "
        f"after {result.iterations} iterations; "
        f"sizes {smallest} to {largest}, median {median}; "
        f"{int((result.sizes == 0).sum())} empty, {result.num_splits} refilled by splitting"
    )
