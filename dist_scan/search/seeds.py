"""Where k-means starts: random rows, or k-means++ on a fixed sample. The same for any number of ranks.

Rows are chosen by a hash of their index; squared distances are added up as integers.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dist_scan.data.hashing import uniform
from dist_scan.progress import Stopped
from dist_scan.world.collectives import agree, all_sum
from dist_scan.world.world import current

STREAM = 401  # this use's stream of the hash
SAMPLE = 65536, 262144  # k-means++ looks at 64 rows a cluster, at least and at most so many, and never fewer than 2 a cluster


def first_centroids(rows: np.ndarray, squares: np.ndarray, own: np.ndarray, num_rows: int, k: int, init: str, seed: int, restart: int,
                    pool: ThreadPoolExecutor, stop: Callable[[], bool] = lambda: False) -> np.ndarray:
    """[k, D] float64: rows to start from. rows [n, D] float32, their squared norms [n] and ascending indices `own` [n] of num_rows: this rank's.

    kmeans++ (Arthur and Vassilvitskii 2007): each next one is drawn in proportion to its squared distance to the nearest of those before, by
    all ranks together. It reads its sample once per cluster: min(N, max(64 k, ...)) * k * D products over all ranks.
    """
    count = k if init == "random" else min(num_rows, max(2 * k, min(max(64 * k, SAMPLE[0]), SAMPLE[1])))
    chance = uniform(seed, STREAM, restart, np.arange(num_rows))
    sample = np.sort(np.argpartition(chance, count - 1)[:count])
    del chance
    at = np.flatnonzero(np.isin(own, sample, assume_unique=True))
    if init == "random":
        out = np.zeros((k, rows.shape[1]))
        out[np.searchsorted(sample, own[at])] = rows[at]
        return all_sum(torch.from_numpy(out)).numpy()
    held = Sample(rows[at], squares[at], np.searchsorted(sample, own[at]), pool)
    return _plus_plus(held, k, count, lambda i: float(uniform(seed, STREAM, restart, -1 - i)), stop)


class Sample:
    """This rank's part of the sample: rows [m, D] float32, squared norms [m], places in the sample [m]; and how far each is from the chosen."""

    def __init__(self, rows: np.ndarray, squares: np.ndarray, places: np.ndarray, pool: ThreadPoolExecutor):
        self.rows, self.squares, self.places, self.pool = rows, squares, places, pool
        self.nearest = np.full(len(rows), 2**62, np.int64)
        edges = np.linspace(0, len(rows), torch.get_num_threads() + 1).astype(int)
        self.parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]

    def row(self, mine: np.ndarray) -> np.ndarray:
        """The one row of all ranks' that is in some rank's `mine`."""
        return all_sum(torch.from_numpy(self.rows[mine].sum(0))).numpy()

    def choose(self, centre: np.ndarray) -> None:
        """Take one more centre into account."""
        from dist_scan.search.kernels import draw_nearer

        square = float((centre.astype(np.float64) ** 2).sum())
        list(self.pool.map(lambda p: draw_nearer(self.rows[p], self.squares[p], centre, square, self.nearest[p]), self.parts))

    def drawn(self, draw: float) -> np.ndarray:
        """Where the row lies at which the running sum of squared distances, over all ranks' rows in order, passes `draw` of its total; nowhere
        on other ranks, nor on any when all distances are 0."""
        world = current()
        totals = np.zeros(world.world_size, np.int64)
        totals[world.rank] = self.nearest.sum()
        ends = np.cumsum(all_sum(torch.from_numpy(totals)).numpy())
        target = min(int(draw * int(ends[-1])), int(ends[-1]) - 1)
        before = int(ends[world.rank]) - int(totals[world.rank])
        if not before <= target < ends[world.rank]:
            return np.zeros(0, np.int64)
        return np.searchsorted(np.cumsum(self.nearest), [target - before], side="right")


def _plus_plus(sample: Sample, k: int, count: int, draw: Callable[[int], float], stop: Callable[[], bool]) -> np.ndarray:
    chosen = [sample.row(np.flatnonzero(sample.places == int(draw(0) * count)))]
    for i in range(1, k):
        if i % 64 == 0 and agree(stop()):
            raise Stopped()
        sample.choose(chosen[-1])
        mine = sample.drawn(draw(i))
        if not int(all_sum(torch.tensor(len(mine)))):  # every row of the sample is a centre already: any will do
            mine = np.flatnonzero(sample.places == int(draw(i) * count))
        chosen.append(sample.row(mine))
    return np.stack(chosen).astype(np.float64)
