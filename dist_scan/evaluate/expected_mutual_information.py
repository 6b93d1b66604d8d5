"""The mutual information two labellings with given sizes have by chance: the expectation in AMI, vectorised."""

from __future__ import annotations

import numpy as np

TAIL = 40.0
"""Overlaps left out have a probability under e^-40 (Bernstein's bound) on each side: below float64's resolution of the sum."""
PAIRS, CELLS = 1_000_000, 100_000
FEW = 300.0
"""Up to this mean overlap P(n) / P(0) < e^300 fits in float64, and logarithms are spared."""


def expected_mutual_information(row_sizes: np.ndarray, column_sizes: np.ndarray) -> float:
    """E[I] in nats under the permutation model (Vinh, Epps and Bailey 2010, eq. 24a). Sizes >= 0, equal sums.

    An overlap n of sizes a and b is hypergeometric. Three things make it fast: equal sizes are counted once (at most
    sqrt(2 N) sizes differ); only overlaps near a b / N are summed, outside Bernstein's bound nothing is left; and
    probabilities come from the ratios of neighbours, normalised to 1, which also keeps the digits that differences
    of log factorials of millions lose. Memory stays under about 200 MB.
    """
    a, a_times = np.unique(row_sizes[row_sizes > 0], return_counts=True)
    b, b_times = np.unique(column_sizes[column_sizes > 0], return_counts=True)
    if a_times.sum() <= 1 or b_times.sum() <= 1:
        return 0.0
    rows, total, expected = max(PAIRS // len(b), 1), int(row_sizes.sum()), 0.0
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        left, right = (
            np.repeat(a[part], len(b)).astype(float),
            np.tile(b, len(a[part])).astype(float),
        )
        weight = np.outer(a_times[part], b_times).ravel().astype(float)
        expected += _expected_of_pairs(left, right, weight, float(total))
    return expected


def _expected_of_pairs(a: np.ndarray, b: np.ndarray, weight: np.ndarray, total: float) -> float:
    """Weighted sum of the expectations of size pairs a, b [m]; pairs of similar window widths share a rectangle."""
    mean = a * b / total
    spread = mean * np.minimum(1 - a / total, 1 - b / total)
    reach = TAIL / 3 + np.sqrt((TAIL / 3) ** 2 + 2 * TAIL * spread)
    low = np.maximum(np.maximum(0, a + b - total), np.floor(mean - reach))
    high = np.minimum(np.minimum(a, b), np.ceil(mean + reach))
    order = np.argsort(high - low, kind="stable")
    a, b, low, high, weight = (x[order] for x in (a, b, low, high, weight))
    width, done, out = (high - low).astype(np.int64) + 1, 0, 0.0
    while done < len(a):
        end = min(done + max(CELLS // int(width[done]), 1), len(a))
        end = max(min(end, int(np.searchsorted(width, 2 * width[done], side="right"))), done + 1)
        part = slice(done, end)
        out += float(
            weight[part]
            @ _window(a[part], b[part], low[part], high[part], int(width[end - 1]), total)
        )
        done = end
    return out


def _window(
    a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, width: int, total: float
) -> np.ndarray:
    """Sum over overlaps n in [low, high] of P(n) n/N log(N n / (a b)), per pair [m]."""
    few = not low.any() and bool((a * b <= FEW * total).all())
    p, n = _few(a, b, width, total) if few else _many(a, b, low, high, width, total)
    n_log_n = n * np.log(np.maximum(n, 1))
    logs = p @ n_log_n if few else (p * n_log_n).sum(axis=1)
    mean = p @ n if few else (p * n).sum(axis=1)
    return (logs + mean * np.log(total / (a * b))) / (p.sum(axis=1) * total)


def _few(a: np.ndarray, b: np.ndarray, width: int, total: float) -> tuple[np.ndarray, np.ndarray]:
    """P(n) / P(0) [m, width] for n = 0 ... width - 1, by products of the ratios of neighbours."""
    n = np.arange(width, dtype=np.float64)
    p = np.ones((len(a), width))
    ratio = p[:, 1:]
    np.multiply(a[:, None] - n[:-1], b[:, None] - n[:-1], out=ratio)
    ratio /= (total - a - b + 1)[:, None] + n[:-1]
    ratio /= n[1:]
    np.maximum(
        ratio, 0, out=ratio
    )  # beyond the smaller size: exactly 0 at the size itself, so 0 from there on
    return np.cumprod(p, axis=1, out=p), n


def _many(
    a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, width: int, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """P(n) / max P [m, width] and n [m, width] from `low` on, by sums of logarithms: any size, any start."""
    n = low[:, None] + np.arange(width)
    a, b, top = a[:, None], b[:, None], high[:, None]
    up = np.where(n < top, (a - n) * (b - n), 1.0)
    rise = np.log(up / ((n + 1) * np.maximum(total - a - b + n + 1, 1)))
    log_p = np.zeros_like(n)
    np.cumsum(rise[:, :-1], axis=1, out=log_p[:, 1:])
    log_p[n > top] = -np.inf
    return np.exp(log_p - log_p.max(axis=1, keepdims=True)), n
