"""Initial centroids of k-means: random rows, or greedy k-means++ on a sample of the rows.

Both are the same for any number of ranks: rows are drawn by a hash of their index, and squared
distances are summed as integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dist_scan.data.hashing import uniform
from dist_scan.search.exact_rows import LocalRows
from dist_scan.search.options import KMeansOptions
from dist_scan.search.stopping import raise_if_stopped
from dist_scan.world.collectives import all_sum
from dist_scan.world.world import current

SAMPLE_STREAM, FIRST_STREAM, DRAW_STREAM = 401, 402, 403  # streams of the hash
SAMPLE_ROWS_PER_CLUSTER = 32
MIN_SAMPLE = 16_384
MAX_SAMPLE = 262_144  # but at least two rows per cluster
MAX_GREEDY_CLUSTERS = 1000  # more clusters get one trial per draw: the cost is quadratic in k
LARGEST_DISTANCE = 2**40  # in units of 2^-32, more than the 64 that two rows of norm 4 can have
STOP_CHECK_EVERY = 64  # centroids


def initial_centroids(
    rows: LocalRows,
    num_clusters: int,
    options: KMeansOptions,
    restart: int,
    pool: ThreadPoolExecutor,
    stop_requested: Callable[[], bool],
) -> np.ndarray:
    """Rows to start a restart from, [k, D] float64. Collective. Raises StopRequested.

    Greedy k-means++ (Arthur and Vassilvitskii 2007, sections 2.2 and 5; as in scikit-learn): each
    centroid after the first is drawn with probability proportional to the squared distance to the
    nearest one before. Of 2 + ln k such draws the one that leaves the smallest sum of squared
    distances is taken, which on real features gave an accuracy of .70 instead of .66.
    """
    # The rows to choose from: k random rows, or a larger sample for k-means++.
    seed = options.seed
    count = num_clusters
    if options.init == "kmeans++":
        preferred = min(max(SAMPLE_ROWS_PER_CLUSTER * num_clusters, MIN_SAMPLE), MAX_SAMPLE)
        count = min(rows.num_rows, max(2 * num_clusters, preferred))
    sample = SeedingSample(rows, _draw_rows(rows.num_rows, count, seed, restart), pool)
    if options.init == "random":
        return sample.rows_at(np.arange(num_clusters)).astype(np.float64)

    # The first centroid: any row of the sample.
    draws = uniform(seed, FIRST_STREAM, restart, np.arange(1))
    candidates = sample.rows_at((draws * count).astype(np.int64))
    centroids = [candidates[sample.add_best(candidates)]]
    # The others: the best of several draws.
    trials = 2 + int(math.log(num_clusters)) if num_clusters <= MAX_GREEDY_CLUSTERS else 1
    for i in range(1, num_clusters):
        if i % STOP_CHECK_EVERY == 0:
            raise_if_stopped(stop_requested)
        candidates = sample.draw(uniform(seed, DRAW_STREAM, restart, i, np.arange(trials)))
        centroids.append(candidates[sample.add_best(candidates)])
    return np.stack(centroids).astype(np.float64)


def _draw_rows(num_rows: int, count: int, seed: int, restart: int) -> np.ndarray:
    """Ascending indices of `count` random rows: those with the smallest hashes."""
    draws = uniform(seed, SAMPLE_STREAM, restart, np.arange(num_rows))
    return np.sort(np.argpartition(draws, count - 1)[:count])


class SeedingSample:
    """The sample of k-means++, distributed over the ranks, with distances to the centroids so far.

    values [m, D] float32 and squared_norms [m] of this rank's rows, their ascending positions [m]
    in the whole sample of `count` rows, and nearest [m] int64: squared distances to the nearest
    centroid so far in units of 2^-32. Sums of these integers are the same in any order.
    """

    def __init__(self, rows: LocalRows, index: np.ndarray, pool: ThreadPoolExecutor) -> None:
        # This rank's rows of the sample.
        local = np.flatnonzero(np.isin(rows.ids, index, assume_unique=True))
        self.values = rows.values[local]
        self.squared_norms = rows.squared_norms[local]
        self.positions = np.searchsorted(index, rows.ids[local])
        self.count = len(index)
        self.pool = pool
        self.nearest = np.full(len(local), LARGEST_DISTANCE, np.int64)
        # Each thread has a part of them.
        edges = np.linspace(0, len(local), torch.get_num_threads() + 1).astype(int)
        self.parts = [slice(start, stop) for start, stop in zip(edges[:-1], edges[1:])]

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows [t, D] float32 at positions [t] of the sample. Collective."""
        is_local = np.isin(positions, self.positions)
        return self._gather(is_local, np.searchsorted(self.positions, positions[is_local]))

    def draw(self, draws: np.ndarray) -> np.ndarray:
        """Rows [t, D] drawn in proportion to their squared distances. Collective.

        A row is the one at which the running sum of squared distances, over the ranks' rows in rank
        order, passes draws [t] in [0, 1) times the total.
        """
        # Where the running sum of each rank's rows begins and ends.
        rank = current().rank
        sums = np.zeros(current().world_size, np.int64)
        sums[rank] = self.nearest.sum()
        sums = all_sum(torch.from_numpy(sums)).numpy()
        ends = np.cumsum(sums)
        total = ends[-1]
        if total == 0:  # every row of the sample equals a centroid: draw any
            return self.rows_at((draws * self.count).astype(np.int64))
        # The draws that fall on rows of this rank.
        targets = np.minimum((draws * float(total)).astype(np.int64), total - 1)
        targets -= ends[rank] - sums[rank]
        is_local = (targets >= 0) & (targets < sums[rank])
        running = np.cumsum(self.nearest)
        return self._gather(is_local, np.searchsorted(running, targets[is_local], side="right"))

    def add_best(self, candidates: np.ndarray) -> int:
        """Add the candidate [t, D] that leaves the smallest sum of distances. Collective.

        Returns its number; of equal sums the first is taken.
        """
        from dist_scan.search.kernels import distances_after

        squares = (candidates.astype(np.float64) ** 2).sum(1)
        after = np.empty((len(candidates), len(self.values)), np.int64)

        def update(part: slice) -> None:
            distances_after(
                self.values[part],
                self.squared_norms[part],
                candidates,
                squares,
                self.nearest[part],
                after[:, part],
            )

        # Distances with each of the candidates, then the candidate with the smallest sum.
        list(self.pool.map(update, self.parts))
        best = int(all_sum(torch.from_numpy(after.sum(1))).argmin())
        self.nearest = after[best].copy()
        return best

    def _gather(self, is_local: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Rows [t, D] on all ranks, each from the rank where is_local [t] is true."""
        rows = np.zeros((len(is_local), self.values.shape[1]), np.float32)
        rows[is_local] = self.values[local]
        return all_sum(torch.from_numpy(rows)).numpy()
