"""Flat search on a GPU or the CPU: the only import of faiss. GPU/CPU, place 3 of 4."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Literal, NamedTuple

import faiss
import numpy as np
import torch

from dist_scan.search.kernels import KEPT, keep_near, settle
from dist_scan.world.world import current

Metric = Literal["inner_product", "l2"]
METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
MOST_ON_GPU = 2048  # faiss's limit on K there
# faiss leaves BLAS for small batches (8 to 10 times slower); it never pays here.
faiss.cvar.distance_compute_blas_threshold = 0
# A reservoir instead of a heap from K = 20 on, not 100: 0.75 of the time at K = 66, D = 128, in blocks of 512 to 1,024 queries.
faiss.cvar.distance_compute_min_k_reservoir = 20
ROWS, CENTROIDS = 1024, 1024  # products that fit the second cache: 4 MB
FURTHEST = np.int32(0x7F7FFFFF)


def thread_pool() -> ThreadPoolExecutor:
    """As many threads as torch may use, each with one thread of BLAS's own: they share the work and wait for each other only at its end."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=_single)
    list(
        pool.map(lambda _: time.sleep(0.001), range(threads))
    )  # all are up: what they set for the process is set back
    torch.set_num_threads(threads)
    return pool


def _single() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@cache
def _gpu():
    return faiss.StandardGpuResources()


class FlatIndex:
    """Rows [m, D] float32 to search in. Several threads (`thread_pool`) may search at once; on a GPU they take turns."""

    def __init__(self, rows: np.ndarray, metric: Metric) -> None:
        self.rows, self.metric, self.lock, self.index = rows, METRICS[metric], Lock(), None
        device = current().device
        if device.type == "cuda":
            options = faiss.GpuIndexFlatConfig()
            options.device = device.index
            self.index = faiss.GpuIndexFlat(_gpu(), rows.shape[1], self.metric, options)
            self.index.add(rows)

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best for each of `queries` [n, D] float32, best first: (scores [n, k] float32, places [n, k] int64).

        l2 scores are squared distances. Right within float32's rounding only: callers that need more score again.
        """
        if self.index is None:
            return faiss.knn(queries, self.rows, k, metric=self.metric)
        if k > MOST_ON_GPU:
            raise ValueError(
                f"{k} candidates a row; on a GPU faiss finds at most {MOST_ON_GPU}: lower the number of neighbours, or use the CPU"
            )
        with self.lock:
            return self.index.search(queries, k)


class Centroids(NamedTuple):
    """rows [k, D] float32, here and on the device; squares [k] float64; half [k] and margin as `NearestCentroid` explains."""

    rows: np.ndarray
    there: torch.Tensor
    squares: np.ndarray
    half: np.ndarray
    margin: np.float32


class NearestCentroid:
    """Rows [n, D] float32 on float16's grid, and which of some centroids is nearest to each: exactly, of equals the first.

    half[j] - x.c_j, positive by a term that is the same for all, is half the squared distance but for terms of the row alone. In float32 it is
    wrong by less than half of `margin`: centroids within it of the least are compared in float64.
    """

    def __init__(self, rows: np.ndarray, longest: float) -> None:
        """longest: no row's norm is larger."""
        self.rows, self.longest, self.device = rows, longest, current().device
        self.there = torch.from_numpy(rows).to(self.device)

    def __call__(self, centroids: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
        """[n] int32. centroids [k, D] float32 on multiples of 2^-22, so that float64 products with rows are exact (rows.py)."""
        squares = (centroids.astype(np.float64) ** 2).sum(1)
        reach = self.longest * float(np.sqrt(squares.max()))
        half = (squares / 2 + 1.01 * reach + 1e-6).astype(np.float32)
        margin = np.float32(2.0**-23 * ((self.rows.shape[1] + 8) * reach + 4 * float(half.max())))
        c = Centroids(centroids, torch.from_numpy(centroids).to(self.device), squares, half, margin)
        out = np.empty(len(self.rows), np.int32)
        work, step = (
            (self._on_cpu, ROWS)
            if self.device.type == "cpu"
            else (self._on_device, max(ROWS, 2**28 // len(centroids)))
        )
        list(
            pool.map(
                lambda b: work(slice(b, b + step), c, out[b : b + step]), range(0, len(out), step)
            )
        )
        return out

    def _on_cpu(self, part: slice, c: Centroids, out: np.ndarray) -> None:
        rows, n, k = self.there[part], len(out), len(c.rows)
        buffer = torch.empty(n * min(CENTROIDS, k))
        best, counts = np.full(n, FURTHEST), np.zeros(n, np.int32)
        names, values = np.empty((n, KEPT), np.int32), np.empty((n, KEPT), np.int32)
        for first in range(0, k, CENTROIDS):
            block = c.there[first : first + CENTROIDS]
            products = torch.mm(rows, block.T, out=buffer[: n * len(block)].view(n, len(block)))
            keep_near(
                products.numpy(),
                c.half[first : first + CENTROIDS],
                first,
                c.margin,
                best,
                names,
                values,
                counts,
            )
        settle(self.rows[part], c.rows, c.squares, c.margin, best, names, values, counts, out)

    def _on_device(self, part: slice, c: Centroids, out: np.ndarray) -> None:
        """The same with torch: rows with several centroids near go to `settle` as if they had too many to keep."""
        distances = torch.addmm(
            torch.from_numpy(c.half).to(self.device), self.there[part], c.there.T, alpha=-1
        )
        least, place = distances.min(1)
        near = (distances <= (least + float(c.margin))[:, None]).sum(1)
        out[:] = place.cpu().numpy()
        several = np.flatnonzero(near.cpu().numpy() > 1)
        n, exact = len(several), np.empty(len(several), np.int32)
        none = np.empty((n, KEPT), np.int32)
        settle(
            self.rows[part][several],
            c.rows,
            c.squares,
            c.margin,
            np.full(n, FURTHEST),
            none,
            none,
            np.full(n, KEPT + 1, np.int32),
            exact,
        )
        out[several] = exact
