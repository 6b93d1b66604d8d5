"""Flat search on a GPU or the CPU: the only import of faiss. GPU/CPU, place 3 of 4."""
from __future__ import annotations

from functools import cache
from typing import Literal

import faiss
import numpy as np
import torch

from dist_scan.world.world import current

Metric = Literal["inner_product", "l2"]
# faiss leaves BLAS for small batches (8 to 10 times slower); it never pays here.
faiss.cvar.distance_compute_blas_threshold = 0
METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


@cache
def _gpu():
    return faiss.StandardGpuResources()


def nearest(queries: np.ndarray, rows: np.ndarray, k: int, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """The k best of `rows` [m, D] float32 for each of `queries` [n, D] float32: (scores [n, k] float32, places [n, k] int64).

    l2 scores are squared distances, smallest first. Approximate only in float32's rounding: callers that need more rescore.
    """
    faiss.omp_set_num_threads(torch.get_num_threads())
    world = current()
    if world.device.type == "cuda":
        return faiss.knn_gpu(_gpu(), queries, rows, k, metric=METRICS[metric], device=world.device.index)
    return faiss.knn(queries, rows, k, metric=METRICS[metric])
