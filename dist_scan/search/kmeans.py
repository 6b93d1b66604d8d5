"""Exact k-means on sharded rows: every row, every iteration; centroids and assignments bitwise equal for any number of ranks.

Rows lie on float16's grid and centroids on multiples of 2^-22, so a float64 distance is exact and ties are ties: the first centroid wins. The
sums are float64 over numbers on a grid, hence exact, so that only rows that moved are added and taken away, and ranks may add up in any order.
Memory per rank: 4 D + 20 bytes a row, 40 k D bytes for centroids, sums and the message of an iteration, 4 MB a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.monitoring.progress import Progress, StopRequested
from dist_scan.search.exact_rows import content, prepare_rows, squares
from dist_scan.search.kmeans_checkpoint import KMeansCheckpoint
from dist_scan.search.kmeans_init import first_centroids
from dist_scan.search.options import KMEANS_DEFAULTS, KMeansOptions, check_num_clusters
from dist_scan.world.collectives import all_max, all_sum, any_rank, gather_rows

CENTROID_GRID = 2.0**22  # numbers below 4 then have 24 bits: float32 holds them


@dataclass(frozen=True)
class KMeansResult:
    """centroids [k, D] float32 (in the rows' own scale; unit rows when normalised), assignment [N] int32, sum of squared distances."""

    centroids: np.ndarray
    assignment: np.ndarray
    objective: float
    iterations: int
    sizes: np.ndarray
    num_splits: int
    """Clusters that had to be re-seeded by splitting, over all iterations."""


def kmeans(
    table: FeatureTable,
    num_clusters: int,
    options: KMeansOptions = KMEANS_DEFAULTS,
    *,
    start: np.ndarray | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
    checkpoint_path: Path | None = None,
) -> KMeansResult:
    """The best of `restarts` runs by objective. Collective. start: centroids [k, D] to begin with (in the scale of the result's) instead of init.
    keep: a file that says how far this is while it is unfinished (not with `start`): the same call goes on from there.

    Raises ValueError when k > N, a setting is out of bounds, or `start` has another shape; Stopped between iterations.
    """
    from dist_scan.search.index import NearestCentroid, thread_pool

    n = table.num_rows
    check_num_clusters(num_clusters, n)
    start = None if start is None else _given(start, num_clusters, table.dim)
    rows = prepare_rows(table, options.normalise or options.spherical, options.view)
    own = rows.own()
    points = Points(rows.read(own).astype(np.float32))
    asked = {
        "clusters": num_clusters,
        **asdict(options),
        "features": checkpoint_path and content(table, rows.held, options.view),
    }
    kept = KMeansCheckpoint(checkpoint_path if start is None else None, asked)
    done = kept.restart * options.iterations - kept.spared + kept.iteration
    with (
        Progress(
            "k-means",
            options.restarts * options.iterations - kept.spared,
            "iterations",
            done=done,
            enabled=progress,
        ) as line,
        thread_pool() as pool,
    ):
        try:
            while kept.restart < options.restarts:
                begin = (
                    start * rows.scale
                    if start is not None
                    else kept.centroids
                    if kept.iteration
                    else first_centroids(
                        points.rows,
                        points.squares,
                        own,
                        n,
                        num_clusters,
                        options.init,
                        options.seed,
                        kept.restart,
                        pool,
                        stop,
                    )
                )
                LloydRun(points, begin, options.spherical, options.seed + kept.restart, pool).run(
                    options.iterations, options.tolerance, stop, line, kept
                )
        except StopRequested:
            kept.write()
            raise
        mine = (
            kept.best_assignment
            if kept.best_assignment is not None
            else NearestCentroid(points.rows, points.longest)(kept.best_centroids, pool)
        )
    kept.over()
    assignment = np.empty(n, np.int32)
    assignment[gather_rows(torch.from_numpy(own)).numpy()] = gather_rows(
        torch.from_numpy(mine)
    ).numpy()
    return KMeansResult(
        kept.best_centroids / np.float32(rows.scale),
        assignment,
        kept.best["objective"] * rows.scale**-2,
        kept.best["iterations"],
        np.bincount(assignment, minlength=num_clusters),
        kept.best["num_empty"],
    )


def _given(start: np.ndarray, num_clusters: int, dim: int) -> np.ndarray:
    start = np.asarray(start, np.float64)
    if start.shape != (num_clusters, dim) or not np.isfinite(start).all():
        raise ValueError(
            f"centroids to start from of shape {list(start.shape)}, {int((~np.isfinite(start)).sum())} numbers NaN or Inf; "
            f"allowed: [{num_clusters}, {dim}], all finite"
        )
    return start


class Points:
    """This rank's rows [n, D] float32 on float16's grid, their squared norms [n] float64, and of all ranks' the sum and the longest's norm."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.squares = rows, squares(rows)
        self.total = _exact_sum(self.squares)
        self.longest = (
            float(all_max(torch.tensor(self.squares.max(initial=0.0), dtype=torch.float64))) ** 0.5
        )


class LloydRun:
    """One run on this rank's points."""

    def __init__(
        self,
        points: Points,
        centroids: np.ndarray,
        spherical: bool,
        seed: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        from dist_scan.search.index import NearestCentroid

        self.points, self.spherical, self.random, self.pool = (
            points,
            spherical,
            np.random.default_rng(seed),
            pool,
        )
        self.nearest = NearestCentroid(points.rows, points.longest)
        self.k, self.dim = centroids.shape
        self.centroids = self._directed(np.asarray(centroids, np.float64))
        self.assignment = np.full(len(points.rows), -1, np.int32)
        self.sums, self.counts = np.zeros((self.k, self.dim)), np.zeros(self.k)
        self.num_empty = 0

    def _directed(self, centroids: np.ndarray) -> np.ndarray:
        """[k, D] float64 to float32 on the centroids' grid, of unit length when spherical."""
        if self.spherical:
            centroids = centroids / np.maximum(np.sqrt((centroids**2).sum(1, keepdims=True)), 1e-30)
        return (np.rint(centroids * CENTROID_GRID) / CENTROID_GRID).astype(np.float32)

    def run(
        self,
        iterations: int,
        tolerance: float,
        stop: Callable[[], bool],
        line: Progress,
        kept: KMeansCheckpoint,
    ) -> None:
        """Until nothing moves, the gain falls below `tolerance`, or `iterations`; what is found goes to `kept`."""
        if kept.iteration:
            self._go_on(kept)
        for iteration in range(kept.iteration + 1, iterations + 1):
            if any_rank(stop()):
                raise StopRequested()
            moved = self._assign()
            objective = self._objective()
            line.advance(1, f"objective {objective:.6g}")
            if moved == 0 or kept.objective - objective < tolerance * kept.objective:
                break
            if iteration < iterations:
                kept.after_iteration(
                    objective, self.centroids, self.random.bit_generator.state, self.num_empty
                )
                self._update()
        line.total -= iterations - iteration  # it has converged: there is no more to do
        kept.after_restart(
            {"objective": objective, "iterations": iteration, "num_empty": self.num_empty},
            self.centroids,
            self.assignment,
            iterations - iteration,
        )

    def _go_on(self, kept: KMeansCheckpoint) -> None:
        """From an iteration that an earlier start has done: what it assigned follows from its centroids."""
        self.centroids, self.num_empty, self.random.bit_generator.state = (
            kept.centroids,
            kept.num_empty,
            kept.random,
        )
        self._assign()
        self._update()

    def _assign(self) -> int:
        """New clusters for this rank's rows; sums and counts follow those that moved. Returns how many moved on all ranks."""
        new = self.nearest(self.centroids, self.pool)
        moved = np.flatnonzero(new != self.assignment)
        message = np.zeros(self.k * self.dim + self.k + 1)
        delta, counts = (
            message[: self.k * self.dim].reshape(self.k, self.dim),
            message[self.k * self.dim : -1],
        )
        self._move(moved, new, delta)
        old = self.assignment[moved]
        counts += np.bincount(new[moved], minlength=self.k) - np.bincount(
            old[old >= 0], minlength=self.k
        )
        message[-1] = len(moved)
        message = all_sum(torch.from_numpy(message)).numpy()
        self.sums += message[: self.k * self.dim].reshape(self.k, self.dim)
        self.counts += message[self.k * self.dim : -1]
        self.assignment = new
        return int(message[-1])

    def _move(self, moved: np.ndarray, new: np.ndarray, delta: np.ndarray) -> None:
        """A thread has some of the columns to itself."""
        from dist_scan.search.kernels import move

        edges, away, to = (
            np.linspace(0, self.dim, torch.get_num_threads() + 1).astype(int),
            self.assignment[moved],
            new[moved],
        )
        list(
            self.pool.map(
                lambda first, last: move(self.points.rows, moved, away, to, delta, first, last),
                edges[:-1],
                edges[1:],
            )
        )

    def _objective(self) -> float:
        """Sum of squared distances to the clusters' means, from the exact sums: the same number for any number of ranks."""
        held = self.counts > 0
        explained = (self.sums[held] ** 2).sum(1) / self.counts[held]
        return self.points.total - float(explained.sum())

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
        self.centroids = self._directed(means)

    def _donor(self, counts: np.ndarray) -> int:
        """A cluster to split, with probability in proportion to size - 1 (faiss's rule), the same on all ranks."""
        weight = np.maximum(counts - 1, 0)
        weight = weight if weight.sum() > 0 else counts
        return int(self.random.choice(len(counts), p=weight / weight.sum()))


def _exact_sum(squared_norms: np.ndarray) -> float:
    """Sum over all ranks of numbers on the grid of 2^-48, in integers: the same for any number of ranks."""
    whole = (squared_norms * 2.0**48).astype(np.int64)
    high, low = all_sum(
        torch.tensor([int((whole >> 24).sum()), int((whole & (2**24 - 1)).sum())])
    ).tolist()
    return float(high * 2**24 + low) * 2.0**-48
