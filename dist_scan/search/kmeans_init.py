"""Where k-means starts: random rows, or greedy k-means++ on a fixed sample. The same for any number of ranks.

Rows are chosen by a hash of their index; squared distances are added up as integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dist_scan.data.hashing import uniform
from dist_scan.monitoring.progress import StopRequested
from dist_scan.world.collectives import all_sum, any_rank
from dist_scan.world.world import current

STREAM = 401  # this use's stream of the hash
SAMPLE = (
    16384,
    262144,
)  # k-means++ looks at 32 rows a cluster, at least and at most so many, and never at fewer than 2 a cluster
GREEDY = 1000  # clusters up to which each next row is the best of 2 + ln k drawn ones: the cost grows with the square of k


def first_centroids(
    rows: np.ndarray,
    squares: np.ndarray,
    own: np.ndarray,
    num_rows: int,
    k: int,
    init: str,
    seed: int,
    restart: int,
    pool: ThreadPoolExecutor,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """[k, D] float64: rows to start from. rows [n, D] float32, their squared norms [n] and ascending indices `own` [n] of num_rows: this rank's.

    kmeans++ (Arthur and Vassilvitskii 2007): each next one is drawn in proportion to its squared distance to the nearest of those before, by
    all ranks together. Greedy, as in their section 5 and scikit-learn: of 2 + ln k drawn ones that which leaves the smallest sum of
    squared distances (on real features .70 ACC instead of .66, docs/search.md).
    """
    count = (
        k if init == "random" else min(num_rows, max(2 * k, min(max(32 * k, SAMPLE[0]), SAMPLE[1])))
    )
    chance = uniform(seed, STREAM, restart, np.arange(num_rows))
    sample = np.sort(np.argpartition(chance, count - 1)[:count])
    del chance
    at = np.flatnonzero(np.isin(own, sample, assume_unique=True))
    if init == "random":
        out = np.zeros((k, rows.shape[1]))
        out[np.searchsorted(sample, own[at])] = rows[at]
        return all_sum(torch.from_numpy(out)).numpy()
    trials = 2 + int(math.log(k)) if k <= GREEDY else 1
    held = Sample(rows[at], squares[at], np.searchsorted(sample, own[at]), count, pool)
    chosen = [
        held.at((uniform(seed, STREAM, restart, 0, np.arange(1)) * count).astype(np.int64))[0]
    ]
    held.take(chosen[0][None])
    for i in range(1, k):
        if i % 64 == 0 and any_rank(stop()):
            raise StopRequested()
        drawn = held.drawn(uniform(seed, STREAM, restart, i, np.arange(trials)))
        chosen.append(drawn[held.take(drawn)])
    return np.stack(chosen).astype(np.float64)


class Sample:
    """This rank's part of a sample of `count` rows: rows [m, D] float32, squared norms [m], places in the sample [m]; how far each is from
    the chosen ones: nearest [m] int64, squared distances in units of 2^-32."""

    def __init__(
        self,
        rows: np.ndarray,
        squares: np.ndarray,
        places: np.ndarray,
        count: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.rows, self.squares, self.places, self.count, self.pool = (
            rows,
            squares,
            places,
            count,
            pool,
        )
        self.nearest = np.full(len(rows), 2**40, np.int64)  # further than any
        edges = np.linspace(0, len(rows), torch.get_num_threads() + 1).astype(int)
        self.parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]

    def at(self, places: np.ndarray) -> np.ndarray:
        """[t, D] float32: the rows at these places of the sample, whichever ranks have them."""
        here = np.isin(places, self.places)
        return self._everyone(here, np.searchsorted(self.places, places[here]))

    def drawn(self, draws: np.ndarray) -> np.ndarray:
        """[t, D] float32: the rows at which the running sum of squared distances, over all ranks' rows in order, passes `draws` [t] of its total."""
        world, totals = current(), np.zeros(current().world_size, np.int64)
        totals[world.rank] = self.nearest.sum()
        ends = np.cumsum(all_sum(torch.from_numpy(totals)).numpy())
        if ends[-1] == 0:  # every row of the sample is a centre already: any will do
            return self.at((draws * self.count).astype(np.int64))
        targets = np.minimum((draws * float(ends[-1])).astype(np.int64), ends[-1] - 1) - (
            ends[world.rank] - totals[world.rank]
        )
        here = (targets >= 0) & (targets < totals[world.rank])
        return self._everyone(
            here, np.searchsorted(np.cumsum(self.nearest), targets[here], side="right")
        )

    def take(self, centres: np.ndarray) -> int:
        """Which of `centres` [t, D] leaves the smallest sum of squared distances (the first of equals); it counts as chosen from now on."""
        from dist_scan.search.kernels import nearer

        wide = centres.astype(np.float64)
        squares, after = (wide**2).sum(1), np.empty((len(centres), len(self.rows)), np.int64)
        list(
            self.pool.map(
                lambda p: nearer(
                    self.rows[p], self.squares[p], centres, squares, self.nearest[p], after[:, p]
                ),
                self.parts,
            )
        )
        best = int(all_sum(torch.from_numpy(after.sum(1))).argmin())
        self.nearest = after[best].copy()
        return best

    def _everyone(self, here: np.ndarray, mine: np.ndarray) -> np.ndarray:
        rows = np.zeros((len(here), self.rows.shape[1]), np.float32)
        rows[here] = self.rows[mine]
        return all_sum(torch.from_numpy(rows)).numpy()
