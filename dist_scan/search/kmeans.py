"""Exact k-means on sharded rows: every row is assigned in every iteration.

Centroids and assignments are bitwise equal for any number of ranks:

- Rows are multiples of 2^-24 (exact_rows.py) and centroids are rounded to multiples of 2^-22, so
  that a float64 distance is exact. Of equally near centroids the first wins (index.py).
- Cluster sums are float64 sums of multiples of 2^-24 of magnitude at most 4. They are exact for up
  to 2^27 rows, as 4 * 2^27 * 2^24 = 2^53. Ranks may therefore add up in any order, and an iteration
  only adds and subtracts the rows that changed their cluster.

An empty cluster is refilled by splitting a large one (`LloydRun._update_centroids`).

Memory per rank in bytes: 4 D + 20 per row, 40 k D for centroids, sums and the message of an
iteration, and 4 MB per thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dist_scan.data.assignments import Assignments
from dist_scan.data.feature_table import FeatureTable
from dist_scan.monitoring.progress import Progress, StopRequested
from dist_scan.search.exact_rows import LocalRows, prepare_rows
from dist_scan.search.kmeans_checkpoint import KMeansCheckpoint
from dist_scan.search.kmeans_init import initial_centroids
from dist_scan.search.options import KMEANS_DEFAULTS, KMeansOptions, check_num_clusters
from dist_scan.search.shard_readers import content_digest
from dist_scan.search.stopping import never_stop, raise_if_stopped
from dist_scan.storage.arrays import write_npy
from dist_scan.world.collectives import all_sum, gather_rows
from dist_scan.world.world import current

if TYPE_CHECKING:
    from dist_scan.search.index import NearestCentroid

CENTROID_GRID = 2.0**22  # values below 4 then have at most 24 bits, which float32 holds
SPLIT_NUDGE = 1 / 1024  # the halves of a split cluster are its mean times 1 +- this, as in faiss


@dataclass(frozen=True)
class KMeansResult:
    """The best restart."""

    centroids: np.ndarray
    """[k, D] float32, on the scale of the table's rows; of unit rows when they are normalised."""
    assignment: np.ndarray
    """[N] int32."""
    objective: float
    """Sum of squared distances of rows to the means of their clusters."""
    iterations: int
    sizes: np.ndarray
    """[k] rows per cluster."""
    num_splits: int
    """How often an empty cluster was refilled by splitting another, over all iterations."""

    def save(self, folder: Path) -> None:
        """Write assignments.npz and centroids.npy."""
        Assignments(self.assignment, len(self.sizes)).save(folder)
        write_npy(folder / "centroids.npy", self.centroids)

    def describe(self) -> str:
        """Objective, iterations and cluster sizes, in one line."""
        smallest, median, largest = np.percentile(self.sizes, [0, 50, 100]).astype(int)
        n = len(self.assignment)
        return (
            f"{len(self.sizes)} clusters of {n} rows; "
            f"objective {self.objective:.8g} ({self.objective / n:.6g} per row) "
            f"after {self.iterations} iterations; "
            f"sizes {smallest} to {largest}, median {median}; "
            f"{int((self.sizes == 0).sum())} empty, {self.num_splits} refilled by splitting"
        )


def kmeans(
    table: FeatureTable,
    num_clusters: int,
    options: KMeansOptions = KMEANS_DEFAULTS,
    *,
    stop_requested: Callable[[], bool] = never_stop,
    checkpoint_path: Path | None = None,
) -> KMeansResult:
    """Cluster the rows of a table; the restart with the lowest objective. Collective.

    checkpoint_path: file for the state of an unfinished call; an equal call continues from it, with
    any number of ranks.

    Raises ValueError for more clusters than rows, and StopRequested between iterations, after the
    checkpoint is written.
    """
    from dist_scan.search.index import NearestCentroid, thread_pool

    check_num_clusters(num_clusters, table.num_rows)
    # This rank's rows, exact and in memory.
    rows = prepare_rows(table, options.normalise or options.spherical, options.view)
    local = LocalRows(rows)
    nearest = NearestCentroid(local.values, local.max_norm)
    # The state of an earlier, unfinished call with the same settings and features.
    settings = {
        "clusters": num_clusters,
        **asdict(options),
        "features": checkpoint_path and content_digest(table, rows.readers, options.view),
    }
    checkpoint = KMeansCheckpoint(checkpoint_path, settings)
    max_iterations = options.restarts * options.iterations - checkpoint.unused_iterations
    done = (
        checkpoint.restart * options.iterations
        - checkpoint.unused_iterations
        + checkpoint.iteration
    )
    with (
        Progress(
            "k-means", max_iterations, "iterations", done=done, enabled=current().rank == 0
        ) as progress,
        thread_pool() as pool,
    ):
        try:
            while checkpoint.restart < options.restarts:
                # Start, or continue from the last complete iteration.
                centroids = checkpoint.centroids
                if centroids is None:
                    centroids = initial_centroids(
                        local, num_clusters, options, checkpoint.restart, pool, stop_requested
                    )
                seed = options.seed + checkpoint.restart
                run = LloydRun(local, nearest, centroids, options, seed, pool)
                run.run(checkpoint, stop_requested, progress)
        except StopRequested:
            checkpoint.write()
            raise
        # The clusters of the best restart.
        best, best_centroids = checkpoint.best, checkpoint.best_centroids
        assert best is not None and best_centroids is not None, "there is at least one restart"
        local_assignment = checkpoint.best_assignment
        if local_assignment is None:  # an earlier process computed the best restart
            local_assignment = nearest.assign(best_centroids, pool)
    checkpoint.remove()
    # The clusters of all ranks' rows.
    ids = gather_rows(torch.from_numpy(local.ids)).numpy()
    assignment = np.empty(table.num_rows, np.int32)
    assignment[ids] = gather_rows(torch.from_numpy(local_assignment)).numpy()
    return KMeansResult(
        centroids=best_centroids / np.float32(rows.scale),
        assignment=assignment,
        objective=best["objective"] * rows.scale**-2,
        iterations=best["iterations"],
        sizes=np.bincount(assignment, minlength=num_clusters),
        num_splits=best["num_splits"],
    )


class LloydRun:
    """One restart of Lloyd's algorithm on this rank's rows; `run` is collective.

    centroids [k, D] float32; sums [k, D] and counts [k] float64 of the clusters over all ranks;
    assignment [n] int32 of this rank's rows, -1 before the first iteration.
    """

    def __init__(
        self,
        rows: LocalRows,
        nearest: NearestCentroid,
        centroids: np.ndarray,
        options: KMeansOptions,
        seed: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.rows = rows
        self.options = options
        self.random_state = np.random.default_rng(seed)
        self.pool = pool
        self.nearest = nearest
        self.k, self.dim = centroids.shape
        self.centroids = self._to_grid(np.asarray(centroids, np.float64))
        self.assignment = np.full(len(rows.values), -1, np.int32)
        self.sums = np.zeros((self.k, self.dim))
        self.counts = np.zeros(self.k)
        self.num_splits = 0

    def _to_grid(self, centroids: np.ndarray) -> np.ndarray:
        """Centroids [k, D] float64 on the grid, as float32; scaled to unit length if spherical."""
        if self.options.spherical:
            norms = np.sqrt((centroids**2).sum(1, keepdims=True))
            # A mean can be zero; it stays where it is.
            centroids = centroids / np.maximum(norms, 1e-30)
        return (np.rint(centroids * CENTROID_GRID) / CENTROID_GRID).astype(np.float32)

    def run(
        self,
        checkpoint: KMeansCheckpoint,
        stop_requested: Callable[[], bool],
        progress: Progress,
    ) -> None:
        """Iterate until it converges or `options.iterations`; the result goes to the checkpoint."""
        if checkpoint.iteration:
            self._resume(checkpoint)
        iterations, tolerance = self.options.iterations, self.options.tolerance
        for iteration in range(checkpoint.iteration + 1, iterations + 1):
            raise_if_stopped(stop_requested)
            # Assignment step.
            num_moved = self._assign()
            objective = self._objective()
            progress.advance(1, f"objective {objective:.6g}")
            # Converged: no assignment changed, or the objective hardly fell. It is infinite before
            # the first iteration, where the comparison is false: infinity, or NaN for tolerance 0.
            gain = checkpoint.objective - objective
            if num_moved == 0 or gain < tolerance * checkpoint.objective:
                break
            # Update step. The checkpoint has the centroids that were assigned to, since the
            # assignment follows from them.
            if iteration < iterations:
                random = self.random_state.bit_generator.state
                checkpoint.after_iteration(objective, self.centroids, random, self.num_splits)
                self._update_centroids()
        unused_iterations = iterations - iteration
        progress.total -= unused_iterations
        result = {
            "objective": objective,
            "iterations": iteration,
            "num_splits": self.num_splits,
        }
        checkpoint.after_restart(result, self.centroids, self.assignment, unused_iterations)

    def _resume(self, checkpoint: KMeansCheckpoint) -> None:
        """Continue after the last iteration of an earlier process: repeat its assignment."""
        assert checkpoint.centroids is not None and checkpoint.random_state is not None
        self.centroids = checkpoint.centroids
        self.num_splits = checkpoint.num_splits
        self.random_state.bit_generator.state = checkpoint.random_state
        self._assign()
        self._update_centroids()

    def _assign(self) -> int:
        """Assign every row to its nearest centroid, and update the clusters' sums and counts.

        One all-reduce of k D + k + 1 numbers. Returns how many rows of all ranks changed cluster.
        """
        # Nearest centroids, and the rows whose cluster changed.
        new = self.nearest.assign(self.centroids, self.pool)
        moved = np.flatnonzero(new != self.assignment)
        old = self.assignment[moved]

        # Changes of the sums and counts, in one message.
        message = np.zeros(self.k * self.dim + self.k + 1)
        changes, count_changes, num_moved = self._parts(message)
        self._add_changes_of_sums(moved, old, new[moved], changes)
        count_changes += np.bincount(new[moved], minlength=self.k)
        count_changes -= np.bincount(old[old >= 0], minlength=self.k)
        num_moved += len(moved)

        # Their sums over all ranks.
        changes, count_changes, num_moved = self._parts(all_sum(torch.from_numpy(message)).numpy())
        self.sums += changes
        self.counts += count_changes
        self.assignment = new
        return int(num_moved[0])

    def _parts(self, message: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of a message: changes of sums [k, D] and of counts [k], rows that moved [1]."""
        size = self.k * self.dim
        changes, count_changes, num_moved = np.split(message, [size, size + self.k])
        return changes.reshape(self.k, self.dim), count_changes, num_moved

    def _add_changes_of_sums(
        self, moved: np.ndarray, old: np.ndarray, new: np.ndarray, changes: np.ndarray
    ) -> None:
        """Add to changes [k, D] what the moved rows change; each thread has its own columns."""
        from dist_scan.search.kernels import move_rows

        edges = np.linspace(0, self.dim, torch.get_num_threads() + 1).astype(int)
        columns = zip(edges[:-1], edges[1:])
        list(
            self.pool.map(
                lambda part: move_rows(self.rows.values, moved, old, new, changes, part), columns
            )
        )

    def _objective(self) -> float:
        """Sum of squared distances to the clusters' means: sum |x|^2 - sum_c |s_c|^2 / n_c.

        Computed from exact sums, so that it is the same for any number of ranks.
        """
        has_rows = self.counts > 0
        explained = (self.sums[has_rows] ** 2).sum(1) / self.counts[has_rows]
        return self.rows.sum_of_squares - float(explained.sum())

    def _update_centroids(self) -> None:
        """Move the centroids to the means of their clusters, and refill empty clusters.

        An empty cluster splits another, as in faiss: that one is drawn with probability
        proportional to its size minus one. Both get its mean, moved apart by a factor of
        1 +- 1/1024 whose sign alternates over the dimensions; the next assignment divides the rows.
        """
        # Means of the clusters; the sums of an empty cluster are zero.
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        # Refill each empty cluster by splitting another.
        counts = self.counts.copy()
        nudge = np.where(np.arange(self.dim) % 2 == 0, 1 + SPLIT_NUDGE, 1 - SPLIT_NUDGE)
        for empty in np.flatnonzero(counts == 0):
            split = self._cluster_to_split(counts)
            means[empty] = means[split] * nudge
            means[split] = means[split] * (2 - nudge)
            counts[split] /= 2
            counts[empty] = counts[split]
            self.num_splits += 1
        self.centroids = self._to_grid(means)

    def _cluster_to_split(self, counts: np.ndarray) -> int:
        """A cluster drawn with probability proportional to its size minus 1 (faiss's rule)."""
        # A cluster of one row cannot be split, unless there are no others.
        weight = np.maximum(counts - 1, 0)
        if weight.sum() == 0:
            weight = counts
        return int(self.random_state.choice(len(counts), p=weight / weight.sum()))
