"""Power iteration clustering on the neighbour graph (Lin and Cohen 2010, as DeepCluster uses it: its appendix; FIDELITY.md 3).

Edges i -> j to the K nearest others weigh exp(-d^2 / sigma^2); the graph is A + A^T. v is multiplied with it `iterations` times, mixed with a
teleport and normalised to a sum of 1. Every row then points to the neighbour that pulls most, max_j w_ij (v_j - v_i) > 0; rows that point
nowhere are roots, and a cluster is what leads to a root. A cluster of one row joins the first of its neighbours whose cluster has more.

Each rank holds the edges of N/W rows and all of v; sums run along a row's edges in order of id and v is normalised as a whole, so every bit
is the same for any number of ranks. Memory per rank: 60 bytes an edge of A + A^T (2 K N / W, more where a rank has the hubs) and 40 N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import sparse

from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.monitoring.progress import Progress, StopRequested
from dist_scan.world.collectives import all_max, any_rank, gather_rows
from dist_scan.world.world import current

BLOCK = 65536  # rows of the table that are looked at at once


@dataclass(frozen=True)
class PicResult:
    """assignment [N] int32, clusters numbered in order of their roots; how many there are, and how many rows of clusters of one were joined."""

    assignment: np.ndarray
    num_clusters: int
    num_joined: int


def pic(
    neighbours: NeighbourTable,
    *,
    sigma: float = 0.2,
    alpha: float = 1e-3,
    iterations: int = 200,
    teleport: Literal["paper", "released"] = "paper",
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> PicResult:
    """Clusters of a table mined with l2 or cosine (of unit rows d^2 = 2 - 2 cos). Collective; the number of clusters is found, not given.

    teleport: v <- alpha (A + A^T) v + (1 - alpha) v, as the paper writes it, or ... + (1 - alpha) / N, as the released code does.
    Raises ValueError for another metric or settings out of range, Stopped between iterations.
    """
    _check(neighbours, sigma, alpha, teleport)
    n, world = neighbours.num_rows, current()
    span = world.rank * n // world.world_size, (world.rank + 1) * n // world.world_size
    graph = symmetric_graph(neighbours, span, sigma)
    if float(all_max(torch.tensor(graph.data.max(initial=0.0)))) == 0:
        raise ValueError(
            f"every edge of {neighbours.path} weighs 0 at sigma {sigma}: the rows lie too far apart; raise sigma, or use unit rows"
        )
    v = np.full(n, 1 / n)
    with Progress("power iteration", iterations, "iterations", enabled=progress) as line:
        for _ in range(iterations):
            if any_rank(stop()):
                raise StopRequested()
            pulled = graph @ v
            stays = v[slice(*span)] if teleport == "paper" else 1 / n
            v = _everyone(alpha * pulled + (1 - alpha) * stays)
            v /= v.sum()
            line.advance()
    roots = _roots(_everyone(_pointers(graph, v, span)))
    return _joined(neighbours, np.unique(roots, return_inverse=True)[1], span)


def _check(table: NeighbourTable, sigma: float, alpha: float, teleport: str) -> None:
    if table.metadata.get("metric") not in ("l2", "cosine"):
        raise ValueError(
            f"{table.path} was mined with {table.metadata.get('metric')}; distances need a table mined with l2 or cosine"
        )
    if not sigma > 0 or not 0 < alpha <= 1:
        raise ValueError(
            f"sigma {sigma} and alpha {alpha}; allowed: sigma above 0, alpha above 0 and at most 1"
        )
    if teleport not in ("paper", "released"):
        raise ValueError(f"teleport {teleport!r}; allowed: paper, released")


def symmetric_graph(
    table: NeighbourTable, span: tuple[int, int], sigma: float
) -> sparse.csr_matrix:
    """Rows span[0]..span[1]-1 of A + A^T as [n, N], columns in ascending order. Every rank reads the whole table once, a block at a time."""
    rows, columns, weights = [], [], []
    for start in range(0, table.num_rows, BLOCK):
        index = np.arange(start, min(start + BLOCK, table.num_rows))
        ids, scores = table.rows(index)
        squared = -scores if table.metadata["metric"] == "l2" else 2 - 2 * scores
        sources = np.broadcast_to(index[:, None], ids.shape)
        weight = np.exp(-squared / sigma**2)
        for here, there in ((sources, ids), (ids, sources)):
            mine = (here >= span[0]) & (here < span[1])
            rows.append(here[mine] - span[0])
            columns.append(there[mine])
            weights.append(weight[mine])
    shape = (span[1] - span[0], table.num_rows)
    graph = sparse.coo_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=shape
    ).tocsr()
    graph.sort_indices()
    return graph


def _everyone(part: np.ndarray) -> np.ndarray:
    return gather_rows(torch.from_numpy(np.ascontiguousarray(part))).numpy()


def _pointers(graph: sparse.csr_matrix, v: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """For each own row the neighbour that pulls most (the lowest id of equals), or the row itself."""
    own = np.arange(*span)
    source = np.repeat(own, np.diff(graph.indptr))
    pull = graph.data * (v[graph.indices] - v[source])
    order = np.lexsort(
        (graph.indices, -pull, source)
    )  # each row's strongest first; every row has an edge
    first = order[graph.indptr[:-1]]
    return np.where(pull[first] > 0, graph.indices[first], own).astype(np.int64)


def _roots(pointer: np.ndarray) -> np.ndarray:
    """Where each row ends up. v grows along every pointer, so there are no cycles."""
    while True:
        further = pointer[pointer]
        if (further == pointer).all():
            return pointer
        pointer = further


def _joined(table: NeighbourTable, cluster: np.ndarray, span: tuple[int, int]) -> PicResult:
    """Clusters of one row put to those of their first neighbour in a larger one (sizes as they were before any joined)."""
    sizes = np.bincount(cluster)
    alone = np.flatnonzero(sizes[cluster] == 1)
    theirs = cluster[table.rows(alone)[0]]
    larger = sizes[theirs] > 1
    joins = larger.any(1)
    joined = cluster.copy()
    joined[alone[joins]] = theirs[joins, larger[joins].argmax(1)]
    final = np.unique(joined, return_inverse=True)[1].astype(np.int32)
    return PicResult(final, int(final.max()) + 1, int(joins.sum()))
