"""Power iteration clustering on the neighbour graph, in the variant of DeepCluster.

Lin and Cohen, ICML 2010; Caron et al., ECCV 2018, appendix. See docs/fidelity.md.

1. Edges i -> j to the K nearest other rows weigh exp(-d_ij^2 / sigma^2). The graph is A + A^T.
2. A vector v, uniform at first, is multiplied with the graph, mixed with a teleport term and
   normalised to a sum of 1, `iterations` times.
3. Every row points to the neighbour with the largest w_ij (v_j - v_i) > 0, if there is one. Rows
   without are roots; a cluster is all rows whose pointers lead to the same root.
4. A cluster of one row joins the first of the row's neighbours whose cluster is larger.

Bitwise equal for any number of ranks: each rank holds the edges of N / world_size rows and all of
v, sums run along a row's edges in the order of ids, and v is normalised as a whole. Memory per
rank: 60 bytes for an edge of A + A^T (2 K N / world_size, more on a rank with hubs), and 40 N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import sparse

from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.monitoring.progress import Progress
from dist_scan.search.options import check_option
from dist_scan.search.shard_readers import rank_range
from dist_scan.search.stopping import never_stop, raise_if_stopped
from dist_scan.world.collectives import all_max, gather_rows
from dist_scan.world.world import current

BLOCK_ROWS = 65_536  # rows of the neighbour table read at a time


@dataclass(frozen=True)
class PicResult:
    """Clusters, numbered in the order of their roots."""

    assignment: np.ndarray
    """[N] int32."""
    num_clusters: int
    num_joined: int
    """Clusters of one row that joined a larger one."""


def pic(
    neighbours: NeighbourTable,
    *,
    sigma: float = 0.2,
    alpha: float = 1e-3,
    iterations: int = 200,
    teleport: Literal["paper", "released"] = "paper",
    stop_requested: Callable[[], bool] = never_stop,
) -> PicResult:
    """Cluster the rows of a neighbour table whose metric is l2 or cosine. Collective.

    The number of clusters is a result. teleport: v <- alpha (A + A^T) v + (1 - alpha) v as in the
    paper, or alpha (A + A^T) v + (1 - alpha) / N as in the released code. For cosine, distances are
    those of unit rows, d^2 = 2 - 2 cos.

    Raises ValueError for another metric or settings out of range, and StopRequested between
    iterations.
    """
    _check(neighbours, sigma, alpha, teleport)
    n = neighbours.num_rows
    start, stop = rank_range(n)
    graph = _symmetric_graph(neighbours, start, stop, sigma)
    largest_weight = float(all_max(torch.tensor(graph.data.max(initial=0.0))))
    if largest_weight == 0:
        raise ValueError(
            f"every edge of {neighbours.path} has weight 0 at sigma {sigma}: the rows are too far "
            "apart; raise sigma, or use unit rows"
        )

    # Power iteration.
    v = np.full(n, 1 / n)
    with Progress(
        "power iteration", iterations, "iterations", enabled=current().rank == 0
    ) as progress:
        for _ in range(iterations):
            raise_if_stopped(stop_requested)
            teleported = v[start:stop] if teleport == "paper" else 1 / n
            v = _gather(alpha * (graph @ v) + (1 - alpha) * teleported)
            v /= v.sum()
            progress.advance()

    # Clusters: follow the pointers to the roots.
    pointers = _gather(_strongest_neighbours(graph, v, start, stop))
    clusters = np.unique(_follow_to_roots(pointers), return_inverse=True)[1]
    return _join_single_rows(neighbours, clusters)


def _check(table: NeighbourTable, sigma: float, alpha: float, teleport: str) -> None:
    metric = table.metadata.get("metric")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"{table.path} was computed with metric {metric}; allowed: l2, cosine")
    check_option("sigma", sigma, sigma > 0, "above 0")
    check_option("alpha", alpha, 0 < alpha <= 1, "above 0 and at most 1")
    check_option("teleport", teleport, teleport in ("paper", "released"), "paper, released")


def _symmetric_graph(
    table: NeighbourTable, start: int, stop: int, sigma: float
) -> sparse.csr_matrix:
    """Rows start..stop-1 of A + A^T, [n, N] with ascending columns. Reads the whole table."""
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for first in range(0, table.num_rows, BLOCK_ROWS):
        index = np.arange(first, min(first + BLOCK_ROWS, table.num_rows))
        ids, scores = table.rows(index)
        squared_distances = -scores if table.metadata["metric"] == "l2" else 2 - 2 * scores
        weight = np.exp(-squared_distances / sigma**2)
        sources = np.broadcast_to(index[:, None], ids.shape)
        # Edges i -> j of A, and j -> i of A^T.
        for row, column in ((sources, ids), (ids, sources)):
            is_local = (row >= start) & (row < stop)
            rows.append(row[is_local] - start)
            columns.append(column[is_local])
            weights.append(weight[is_local])
    # Edges in both directions are added up.
    places = np.concatenate(rows), np.concatenate(columns)
    shape = (stop - start, table.num_rows)
    graph = sparse.coo_matrix((np.concatenate(weights), places), shape=shape).tocsr()
    graph.sort_indices()
    return graph


def _gather(part: np.ndarray) -> np.ndarray:
    """The parts of all ranks, in rank order. Collective."""
    return gather_rows(torch.from_numpy(np.ascontiguousarray(part))).numpy()


def _strongest_neighbours(
    graph: sparse.csr_matrix, v: np.ndarray, start: int, stop: int
) -> np.ndarray:
    """The neighbour with the largest w_ij (v_j - v_i) > 0 of each row of the graph, or the row.

    Of equally strong neighbours the one with the lowest id is taken.
    """
    row_ids = np.arange(start, stop)
    source = np.repeat(row_ids, np.diff(graph.indptr))
    strength = graph.data * (v[graph.indices] - v[source])
    # Sorted by row, then strength; every row has at least one edge.
    order = np.lexsort((graph.indices, -strength, source))
    strongest = order[graph.indptr[:-1]]
    return np.where(strength[strongest] > 0, graph.indices[strongest], row_ids).astype(np.int64)


def _follow_to_roots(pointers: np.ndarray) -> np.ndarray:
    """The root of each row. v increases along every pointer, so there are no cycles."""
    while True:
        further = pointers[pointers]
        if (further == pointers).all():
            return pointers
        pointers = further


def _join_single_rows(table: NeighbourTable, clusters: np.ndarray) -> PicResult:
    """Join clusters of one row to that of the first neighbour in a larger one.

    Sizes are those before any cluster is joined.
    """
    # The clusters of the neighbours of single rows.
    sizes = np.bincount(clusters)
    single = np.flatnonzero(sizes[clusters] == 1)
    neighbour_clusters = clusters[table.rows(single)[0]]
    is_larger = sizes[neighbour_clusters] > 1
    joins = is_larger.any(1)
    # The first neighbour in a larger cluster, if there is one.
    joined = clusters.copy()
    joined[single[joins]] = neighbour_clusters[joins, is_larger[joins].argmax(1)]
    # Numbers without gaps.
    assignment = np.unique(joined, return_inverse=True)[1].astype(np.int32)
    return PicResult(assignment, int(assignment.max()) + 1, int(joins.sum()))
