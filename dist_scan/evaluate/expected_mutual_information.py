"""Mutual information that two random labellings with given group sizes share: the E[I] in AMI."""

from __future__ import annotations

import numpy as np

TAIL = 40.0
"""Overlaps with a probability below e^-40 on each side (Bernstein's bound) are left out; the sum in
float64 cannot resolve them."""
PAIRS = 1_000_000
"""Pairs of sizes that are processed at a time."""
CELLS = 100_000
"""Largest number of probabilities in one rectangle."""
MAX_MEAN_OVERLAP_FOR_RATIOS = 300.0
"""Up to this mean overlap, P(n) / P(0) < e^300 fits in float64, so no logarithms are needed."""


def expected_mutual_information(row_sizes: np.ndarray, column_sizes: np.ndarray) -> float:
    """E[I] in nats under the permutation model (Vinh, Epps and Bailey 2010, Eq. 24a).

    Sizes are >= 0, with equal sums. The overlap n of two groups of sizes a and b is hypergeometric.
    Three things make this fast. Equal sizes are counted once: at most sqrt(2 N) sizes differ. Only
    overlaps near a b / N are summed: Bernstein's bound leaves nothing outside. Probabilities come
    from the ratios of consecutive ones, normalised to 1. This avoids differences of large log
    factorials, which lose digits. Memory stays below about 200 MB.
    """
    a, a_times = np.unique(row_sizes[row_sizes > 0], return_counts=True)
    b, b_times = np.unique(column_sizes[column_sizes > 0], return_counts=True)
    if a_times.sum() <= 1 or b_times.sum() <= 1:
        return 0.0
    total = float(row_sizes.sum())
    rows = max(PAIRS // len(b), 1)
    expected = 0.0
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        pair_a = np.repeat(a[part], len(b)).astype(float)
        pair_b = np.tile(b, len(a[part])).astype(float)
        weight = np.outer(a_times[part], b_times).ravel().astype(float)
        expected += _weighted_sum(pair_a, pair_b, weight, total)
    return expected


def _weighted_sum(a: np.ndarray, b: np.ndarray, weight: np.ndarray, total: float) -> float:
    """Weighted sum of the expectations of the size pairs a, b [m]."""
    # Overlaps to sum: the range [low, high] of each pair.
    mean = a * b / total
    spread = mean * np.minimum(1 - a / total, 1 - b / total)
    reach = TAIL / 3 + np.sqrt((TAIL / 3) ** 2 + 2 * TAIL * spread)
    low = np.maximum(np.maximum(0, a + b - total), np.floor(mean - reach))
    high = np.minimum(np.minimum(a, b), np.ceil(mean + reach))
    # Pairs with ranges of similar width share a rectangle: sort by width.
    order = np.argsort(high - low, kind="stable")
    a, b, low, high, weight = (x[order] for x in (a, b, low, high, weight))
    width = (high - low).astype(np.int64) + 1
    start, result = 0, 0.0
    while start < len(a):
        # At most CELLS cells, and no range more than twice as wide as the narrowest.
        end = min(start + max(CELLS // int(width[start]), 1), len(a))
        end = min(end, int(np.searchsorted(width, 2 * width[start], side="right")))
        end = max(end, start + 1)
        part = slice(start, end)
        widest = int(width[end - 1])
        values = _expected_per_pair(a[part], b[part], low[part], high[part], widest, total)
        result += float(weight[part] @ values)
        start = end
    return result


def _expected_per_pair(
    a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, width: int, total: float
) -> np.ndarray:
    """Sum over overlaps n in [low, high] of P(n) n/N log(N n / (a b)), per pair [m]."""
    if not low.any() and bool((a * b <= MAX_MEAN_OVERLAP_FOR_RATIOS * total).all()):
        p, n = _ratios_to_zero_overlap(a, b, width, total)
        information, mean = p @ _n_log_n(n), p @ n
    else:
        p, n = _ratios_to_mode(a, b, low, high, width, total)
        information, mean = (p * _n_log_n(n)).sum(axis=1), (p * n).sum(axis=1)
    return (information + mean * np.log(total / (a * b))) / (p.sum(axis=1) * total)


def _n_log_n(n: np.ndarray) -> np.ndarray:
    return n * np.log(np.maximum(n, 1))


def _ratios_to_zero_overlap(
    a: np.ndarray, b: np.ndarray, width: int, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """P(n) / P(0) [m, width] for n = 0 ... width - 1, as products of consecutive ratios."""
    n = np.arange(width, dtype=np.float64)
    p = np.ones((len(a), width))
    ratio = p[:, 1:]
    np.multiply(a[:, None] - n[:-1], b[:, None] - n[:-1], out=ratio)
    ratio /= (total - a - b + 1)[:, None] + n[:-1]
    ratio /= n[1:]
    # The ratio is exactly 0 at the smaller size, so the product stays 0 beyond it.
    np.maximum(ratio, 0, out=ratio)
    return np.cumprod(p, axis=1, out=p), n


def _ratios_to_mode(
    a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, width: int, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """P(n) / max P [m, width] and n [m, width] from ``low`` on, as sums of logarithms of ratios."""
    n = low[:, None] + np.arange(width)
    a, b, high = a[:, None], b[:, None], high[:, None]
    numerator = np.where(n < high, (a - n) * (b - n), 1.0)
    log_ratio = np.log(numerator / ((n + 1) * np.maximum(total - a - b + n + 1, 1)))
    log_p = np.zeros_like(n)
    np.cumsum(log_ratio[:, :-1], axis=1, out=log_p[:, 1:])
    log_p[n > high] = -np.inf
    return np.exp(log_p - log_p.max(axis=1, keepdims=True)), n
