"""Exact k-means on sharded rows: every row, every iteration; centroids bitwise equal for any number of ranks.

Assignment by faiss in float32; a row whose two nearest centroids float32 cannot tell apart is decided in float64. Sums are float64 over rows on
float16's grid, hence exact, so that only rows that moved are added and subtracted, and ranks may add up in any order.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import sparse

from dist_scan.data.hashing import uniform
from dist_scan.data.tables import FeatureTable
from dist_scan.progress import Progress, Stopped
from dist_scan.search.rows import Reader, prepared, squares
from dist_scan.world.collectives import agree, all_sum, gather_rows
from dist_scan.world.world import current

SEEDS = 401  # this use's stream of the hash
SAMPLE = 262_144  # rows that k-means++ looks at


@dataclass(frozen=True)
class KMeansResult:
    """centroids [k, D] float32 (in the rows' own scale; unit rows when normalised), assignment [N] int32, sum of squared distances."""

    centroids: np.ndarray
    assignment: np.ndarray
    objective: float
    iterations: int
    sizes: np.ndarray
    num_empty: int
    """Clusters that had to be re-seeded by splitting, over all iterations."""


def kmeans(table: FeatureTable, num_clusters: int, *, iterations: int = 100, tolerance: float = 0.0, init: Literal["kmeans++", "random"] = "kmeans++",
           restarts: int = 1, spherical: bool = False, normalise: bool = False, seed: int = 0, view: int = 0,
           stop: Callable[[], bool] = lambda: False, progress: bool = False) -> KMeansResult:
    """The best of `restarts` runs by objective. Collective. Raises ValueError when k > N, Stopped between iterations."""
    n, world = table.num_rows, current()
    if not 1 <= num_clusters <= n:
        raise ValueError(f"{num_clusters} clusters of {n} rows; allowed: 1 to {n}")
    read, scale = prepared(table, normalise or spherical, view)
    rows = read(np.arange(world.rank * n // world.world_size, (world.rank + 1) * n // world.world_size))
    best = None
    with Progress("k-means", restarts * iterations, "iterations", enabled=progress) as line:
        for restart in range(restarts):
            lloyd = Lloyd(rows, first_centroids(read, n, num_clusters, init, seed, restart), spherical, seed + restart)
            result = lloyd.run(iterations, tolerance, stop, line)
            if best is None or result.objective < best.objective:
                best = result
    assignment = gather_rows(torch.from_numpy(best.assignment)).numpy()
    return KMeansResult(best.centroids * np.float32(scale ** 0.5), assignment, best.objective * scale, best.iterations, best.sizes, best.num_empty)


def first_centroids(read: Reader, num_rows: int, k: int, init: str, seed: int, restart: int) -> np.ndarray:
    """[k, D] float64 rows to start from: random ones, or k-means++ (Arthur and Vassilvitskii 2007) on a fixed sample."""
    order = np.argsort(uniform(seed, SEEDS, restart, np.arange(num_rows)), kind="stable")
    if init == "random":
        return read(np.sort(order[:k])).astype(np.float64)
    rows = read(np.sort(order[:max(SAMPLE, k)])).astype(np.float64)
    chosen = [int(uniform(seed, SEEDS, restart, -1) * len(rows))]
    norms = (rows ** 2).sum(1)
    nearest = np.full(len(rows), np.inf)
    for i in range(1, k):
        centre = rows[chosen[-1]]
        nearest = np.minimum(nearest, np.maximum(norms + (centre ** 2).sum() - 2 * (rows @ centre), 0))  # exact, see rows.py
        total = np.cumsum(nearest)
        draw = float(uniform(seed, SEEDS, restart, -1 - i))
        chosen.append(int(np.searchsorted(total, draw * total[-1], side="right").clip(0, len(rows) - 1)))
    return rows[chosen]


class Lloyd:
    """One run on this rank's rows [n, D] float16."""

    def __init__(self, rows: np.ndarray, centroids: np.ndarray, spherical: bool, seed: int):
        self.rows, self.spherical, self.random = rows, spherical, np.random.default_rng(seed)
        self.wide, self.norms = rows.astype(np.float32), squares(rows)
        self.square = _exact_sum(self.norms)
        self.k, self.dim = centroids.shape
        self.centroids = self._directed(centroids).astype(np.float32)
        self.assignment = np.full(len(rows), -1, np.int32)
        self.sums, self.counts = np.zeros((self.k, self.dim)), np.zeros(self.k)
        self.num_empty = 0

    def _directed(self, centroids: np.ndarray) -> np.ndarray:
        if not self.spherical:
            return centroids
        return centroids / np.maximum(np.sqrt((centroids ** 2).sum(1, keepdims=True)), 1e-30)

    def run(self, iterations: int, tolerance: float, stop: Callable[[], bool], line: Progress) -> KMeansResult:
        """Until nothing moves, the gain falls below `tolerance`, or `iterations`."""
        before = np.inf
        for iteration in range(1, iterations + 1):
            if agree(stop()):
                raise Stopped()
            moved = self._assign()
            objective = self._objective()
            line.advance(1, f"objective {objective:.6g}")
            if moved == 0 or before - objective < tolerance * before or iteration == iterations:
                line.done += iterations - iteration
                break
            before = objective
            self._update()
        return KMeansResult(self.centroids, self.assignment, objective, iteration, self.counts.astype(np.int64), self.num_empty)

    def _assign(self) -> int:
        """New clusters for this rank's rows; sums and counts follow those that moved. Returns how many moved on all ranks."""
        new = self._nearest()
        moved = np.flatnonzero(new != self.assignment)
        old = self.assignment[moved]
        known = old >= 0
        delta, counts = self._sum(moved, new[moved])
        gone, fewer = self._sum(moved[known], old[known])
        message = np.concatenate([(delta - gone).reshape(-1), counts - fewer, [len(moved)]])
        message = all_sum(torch.from_numpy(message)).numpy()
        self.sums += message[:self.k * self.dim].reshape(self.k, self.dim)
        self.counts += message[self.k * self.dim:-1]
        self.assignment = new
        return int(message[-1])

    def _nearest(self) -> np.ndarray:
        from dist_scan.search.index import nearest

        if len(self.rows) == 0:
            return self.assignment
        rough, places = nearest(self.wide, self.centroids, min(2, self.k), "l2")
        out = places[:, 0].astype(np.int32)
        c64 = self.centroids.astype(np.float64)
        squares = (c64 ** 2).sum(1)
        rounding = self.dim * 2.0**-22 * (self.norms + squares[out])
        close = np.flatnonzero(rough[:, -1] - rough[:, 0] <= rounding) if self.k > 1 else np.arange(0)
        for b in range(0, len(close), 1024):  # a third centroid may be as near: look at all of them
            part = close[b:b + 1024]
            out[part] = (squares[None] - 2 * (self.rows[part].astype(np.float64) @ c64.T)).argmin(1)
        return out

    def _sum(self, at: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per cluster, exact: the sum of these rows and their number."""
        one_hot = sparse.csr_matrix((np.ones(len(at)), (cluster, np.arange(len(at)))), shape=(self.k, len(at)))
        return one_hot @ self.rows[at].astype(np.float64), np.bincount(cluster, minlength=self.k).astype(np.float64)

    def _objective(self) -> float:
        """Sum of squared distances to the clusters' means, from the exact sums: the same number for any number of ranks."""
        held = self.counts > 0
        explained = (self.sums[held] ** 2).sum(1) / self.counts[held]
        return self.square - float(explained.sum())

    def _update(self) -> None:
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        counts = self.counts.copy()
        for empty in np.flatnonzero(counts == 0):
            donor = self._donor(counts)
            nudge = np.where(np.arange(self.dim) % 2 == 0, 1 + 1 / 1024, 1 - 1 / 1024)
            means[empty], means[donor] = means[donor] * nudge, means[donor] * (2 - nudge)
            counts[empty] = counts[donor] / 2
            counts[donor] /= 2
            self.num_empty += 1
        self.centroids = self._directed(means).astype(np.float32)

    def _donor(self, counts: np.ndarray) -> int:
        """A cluster to split, with probability in proportion to size - 1 (faiss's rule), the same on all ranks."""
        weight = np.maximum(counts - 1, 0)
        weight = weight if weight.sum() > 0 else counts
        return int(self.random.choice(len(counts), p=weight / weight.sum()))


def _exact_sum(squared_norms: np.ndarray) -> float:
    """Sum over all ranks of numbers on the grid of 2^-48, in integers: the same for any number of ranks."""
    whole = (squared_norms * 2.0**48).astype(np.int64)
    high, low = all_sum(torch.tensor([int((whole >> 24).sum()), int((whole & (2**24 - 1)).sum())])).tolist()
    return float(high * 2**24 + low) * 2.0**-48
