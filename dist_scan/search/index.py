"""Brute-force search and nearest centroids, on the CPU or a GPU. Only this module imports faiss.

Both compute float32 products first. Neighbour search scores faiss's candidates again in float64
(neighbours.py); NearestCentroid decides in float64 between centroids that float32 does not
distinguish.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Literal

import faiss
import numpy as np
import torch

from dist_scan.search.kernel_types import MAX_NEAR, Centroids, NearCentroids
from dist_scan.search.kernels import LARGEST_FLOAT_BITS, choose_nearest, collect_near
from dist_scan.world.world import current

METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
MAX_GPU_NEIGHBOURS = 2048  # faiss's limit of k on a GPU

# faiss does not use BLAS for small batches, which is 8 to 10 times slower at the sizes used here.
faiss.cvar.distance_compute_blas_threshold = 0
# Select the k best with a reservoir instead of a heap from k = 20 on instead of 100: 0.75 of the
# time at k = 66, D = 128, in blocks of 512 to 1,024 queries.
faiss.cvar.distance_compute_min_k_reservoir = 20

# Block sizes of the CPU's matrix products: 1,024 x 1,024 float32 (4 MB) fit the second-level cache.
BLOCK_ROWS = 1024
BLOCK_CENTROIDS = 1024
GPU_BLOCK_VALUES = 2**28  # values of one matrix product on a GPU


def thread_pool() -> ThreadPoolExecutor:
    """A pool of `torch.get_num_threads()` threads, each with single-threaded BLAS.

    Threads that work on blocks of their own wait for each other only at the end, those of one
    multi-threaded product after every product.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=_use_one_thread)
    # Start all threads now. Their initializers also change the settings of the whole process,
    # which are restored afterwards.
    list(pool.map(lambda _: time.sleep(0.001), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@cache
def _gpu_resources() -> faiss.StandardGpuResources:
    return faiss.StandardGpuResources()


class FlatIndex:
    """Brute-force index over rows [m, D] float32.

    Several threads may search at the same time; on a GPU their searches run one after another.
    """

    def __init__(self, rows: np.ndarray, metric: Literal["inner_product", "l2"]) -> None:
        self.rows = rows
        self.metric = METRICS[metric]
        self.lock = Lock()
        self.gpu_index = None
        device = current().device
        if device.type == "cuda":
            options = faiss.GpuIndexFlatConfig()
            options.device = device.index
            self.gpu_index = faiss.GpuIndexFlat(
                _gpu_resources(), rows.shape[1], self.metric, options
            )
            self.gpu_index.add(rows)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query [n, D] float32, best first.

        Returns (scores [n, k] float32, row numbers [n, k] int64). Scores of l2 are squared
        distances. They and the order of the rows are right within float32's rounding only.
        """
        if self.gpu_index is None:
            return faiss.knn(queries, self.rows, k, metric=self.metric)
        if k > MAX_GPU_NEIGHBOURS:
            raise ValueError(
                f"{k} candidates per row; allowed on a GPU: at most {MAX_GPU_NEIGHBOURS} (a limit "
                "of faiss). Lower the number of neighbours, or use --device cpu"
            )
        with self.lock:
            return self.gpu_index.search(queries, k)


class NearestCentroid:
    """The nearest of k centroids to each row [n, D] float32 on float16's grid, exactly.

    Of equally near centroids the one with the lowest number is taken.

    The cost of centroid c_j for row x is h_j - x.c_j with h_j = |c_j|^2 / 2 + o. It orders
    centroids like |x - c_j|^2 = 2 (h_j - x.c_j) - 2 o + |x|^2. The offset o = 1.01 R + 1e-6 with
    R = max|x| max|c_j| makes every cost positive, so that costs compare like the integers that have
    the same bits.

    Error bound. With u = 2^-24, float32 computes x.c_j with an error of at most about D u R in any
    order of summation, rounds h_j with one of u H (H = max h_j) and their difference with one of
    u (H + R): together less than u ((D + 1) R + 2 H). `margin` is 2 u ((D + 8) R + 4 H). Two costs
    whose float32 values differ by more than `margin` are therefore ordered correctly, with room for
    the rounding of (least + margin) itself. Centroids within `margin` of the least cost are
    compared by |c_j|^2 - 2 x.c_j in float64. That is exact: centroids are multiples of 2^-22 and
    rows of 2^-24, both with norms of about 4 or less, so all partial sums are multiples of 2^-46
    below 2^6.
    """

    def __init__(self, rows: np.ndarray, max_norm: float) -> None:
        """No row's norm is larger than `max_norm`."""
        self.rows = rows
        self.max_norm = max_norm
        self.device = current().device
        self.rows_on_device = torch.from_numpy(rows).to(self.device)

    def assign(self, centroids: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
        """Number of the nearest centroid of each row, [n] int32. centroids [k, D] float32."""
        prepared = self._prepare(centroids)
        centroids_on_device = torch.from_numpy(centroids).to(self.device)
        assign_block, block_rows = self._assign_on_cpu, BLOCK_ROWS
        if self.device.type != "cpu":
            assign_block = self._assign_on_device
            block_rows = max(BLOCK_ROWS, GPU_BLOCK_VALUES // len(centroids))
        out = np.empty(len(self.rows), np.int32)
        blocks = [slice(b, b + block_rows) for b in range(0, len(out), block_rows)]
        list(
            pool.map(
                lambda block: assign_block(block, prepared, centroids_on_device, out[block]), blocks
            )
        )
        return out

    def _prepare(self, centroids: np.ndarray) -> Centroids:
        """The centroids with their half norms h_j and the margin."""
        # Exact: centroids are multiples of 2^-22.
        squared_norms = (centroids.astype(np.float64) ** 2).sum(1)
        largest_product = self.max_norm * float(np.sqrt(squared_norms.max()))
        half_norms = (squared_norms / 2 + 1.01 * largest_product + 1e-6).astype(np.float32)
        dim = self.rows.shape[1]
        margin = 2.0**-23 * ((dim + 8) * largest_product + 4 * float(half_norms.max()))
        return Centroids(centroids, squared_norms, half_norms, np.float32(margin))

    def _assign_on_cpu(
        self, block: slice, centroids: Centroids, centroids_on_device: torch.Tensor, out: np.ndarray
    ) -> None:
        """Assign a block of rows, comparing it with a block of centroids at a time."""
        n, k = len(out), len(centroids_on_device)
        buffer = torch.empty(n * min(BLOCK_CENTROIDS, k))
        near = NearCentroids(
            least=np.full(n, LARGEST_FLOAT_BITS),
            ids=np.empty((n, MAX_NEAR), np.int32),
            costs=np.empty((n, MAX_NEAR), np.int32),
            counts=np.zeros(n, np.int32),
        )
        # Float32: keep the centroids within the margin of the least cost so far.
        for first in range(0, k, BLOCK_CENTROIDS):
            part = centroids_on_device[first : first + BLOCK_CENTROIDS]
            products = buffer[: n * len(part)].view(n, len(part))
            torch.mm(self.rows_on_device[block], part.T, out=products)
            collect_near(products.numpy(), centroids, first, near)
        # Float64: decide between them.
        choose_nearest(self.rows[block], centroids, near, out)

    def _assign_on_device(
        self, block: slice, centroids: Centroids, centroids_on_device: torch.Tensor, out: np.ndarray
    ) -> None:
        """Assign a block of rows on a GPU; those with several near centroids on the CPU."""
        # Float32: the least cost, and how many centroids are within the margin of it.
        half_norms = torch.from_numpy(centroids.half_norms).to(self.device)
        costs = torch.addmm(half_norms, self.rows_on_device[block], centroids_on_device.T, alpha=-1)
        least, nearest = costs.min(1)
        num_near = (costs <= (least + float(centroids.margin))[:, None]).sum(1)
        out[:] = nearest.cpu().numpy()

        # Float64: compare ambiguous rows with all centroids, as if too many were near.
        ambiguous = np.flatnonzero(num_near.cpu().numpy() > 1)
        n = len(ambiguous)
        unused = np.empty((n, MAX_NEAR), np.int32)
        near = NearCentroids(
            least=np.full(n, LARGEST_FLOAT_BITS),
            ids=unused,
            costs=unused,
            counts=np.full(n, MAX_NEAR + 1, np.int32),
        )
        exact = np.empty(n, np.int32)
        choose_nearest(self.rows[block][ambiguous], centroids, near, exact)
        out[ambiguous] = exact
