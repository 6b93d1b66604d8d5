"""Nearest neighbours the slow, obvious way: every pair in extended precision."""

from __future__ import annotations

import numpy as np

from dist_scan.search.exact_rows import unit_rows


def neighbours(rows: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, scores) [n, k] of the nearest other rows, by (score descending, id ascending)."""
    wide = (unit_rows(rows) if metric == "cosine" else rows).astype(np.longdouble)
    scores = wide @ wide.T
    if metric == "l2":
        squares = (wide**2).sum(1)
        scores = 2 * scores - squares[:, None] - squares[None]
    scores = scores.astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    each = np.arange(len(rows))
    ids = np.stack([np.lexsort((each, -row_scores))[:k] for row_scores in scores])
    return ids, np.take_along_axis(scores, ids, 1)
