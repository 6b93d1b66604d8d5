"""SCAN's loss and gradient by one head's logits as compiled loops over rows: what head_kernel does on a GPU, on a CPU. Import it late: numba
takes a second.

Legend as in head_step: logits [2b, C] in float32, anchors above neighbours. A row stays in a core's nearest cache while everything that is to be
done with it is done, so the logits pass through memory twice, once on the way to probabilities and once to gradients. Rows are summed in chunks of
ROWS: the same bits with any number of threads.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dist_scan.compiled import compiled
from dist_scan.head_products import LogitsOf
from dist_scan.head_step import SMALL, from_logits

ROWS = 64
SUMS = {"reassoc", "nsz", "contract"}  # of the compiler's liberties: sums in any order. What makes a NaN a number is not among them.

LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
LOWEST = np.float32(-87.3)  # exp stays 1e-38 below: float32 has only numbers with fewer digits there
P0, P1, P2, P3, P4, P5 = (np.float32(x) for x in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)


@compiled(fastmath={"contract"})
def _exponential(x):
    """exp(x) of x <= 0, to 2 units in the last place (Cephes' expf: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2]). By itself: its sums keep their order."""
    x = LOWEST if x < LOWEST else x  # a NaN stays, and is kept by the polynomial
    k = np.floor(x * LOG2E + HALF)
    r = x - k * LN2_HIGH - k * LN2_LOW
    y = ((((P0 * r + P1) * r + P2) * r + P3) * r + P4) * r + P5
    return (y * r * r + r + ONE) * np.int32((np.int32(k) + 127) << 23).view(np.float32)


@compiled(fastmath=SUMS)
def exponentials(row, top):
    """exp(row - top) in place, no entry above top. Returns their sum."""
    total = ZERO
    for c in range(len(row)):
        y = _exponential(row[c] - top)
        row[c] = y
        total += y
    return total


@compiled()
def _largest_with(row, bias):
    """The bias is added in place; the largest of what comes out. As integers of the same order: a maximum of floats is not vectorised (9 times slower)."""
    for c in range(len(row)):
        row[c] += bias[c]
    bits, top = row.view(np.int32), np.int32(-2**31)
    for c in range(len(row)):
        top = max(top, np.int32(bits[c] ^ ((bits[c] >> 31) & 0x7fffffff)))
    return np.int32(top ^ ((top >> 31) & 0x7fffffff)).view(np.float32)


@compiled(fastmath={"contract"})
def _add(row, share, sums):
    for c in range(len(row)):
        sums[c] += row[c] * share


@compiled()
def numerators(logits, bias, shares, sums, first, last):
    """Logits [2b, C] without their bias become exp(logit - the row's largest); times shares [2b] they are probabilities. sums [chunks, C]: the
    anchors' probabilities. Chunks first to last - 1."""
    b = len(logits) // 2
    for chunk in range(first, last):
        sums[chunk] = ZERO
        for i in range(chunk * ROWS, min(b, (chunk + 1) * ROWS)):
            for at in (i, b + i):
                shares[at] = ONE / exponentials(logits[at], _largest_with(logits[at], bias))
            _add(logits[i], shares[i], sums[chunk])


@compiled(fastmath=SUMS)
def _products(e, f, slope):
    """(<e, f>, <e, slope>)."""
    both, own = ZERO, ZERO
    for c in range(len(e)):
        both += e[c] * f[c]
        own += e[c] * slope[c]
    return both, own


@compiled(fastmath={"contract"})
def _pair(e, f, p_share, q_share, slope, both, own, scale, sums):
    """A pair's numerators become scale times their gradients; sums [C] are added up."""
    back = ONE / both
    for c in range(len(e)):
        r = e[c] * f[c] * back
        dq = (f[c] * q_share - r) * scale
        dp = (e[c] * p_share * (slope[c] - own + ONE) - r) * scale
        f[c], e[c] = dq, dp
        sums[c] += dp + dq


@compiled()
def gradients(numerator, shares, slope, scale, sums, nll, low, first, last):
    """Numerators [2b, C] become scale times the gradients of sum(-log<p, q>) + <slope, sum p>, but for rows with <p, q> < SMALL, which stay.
    sums [chunks, C]: of the gradients, anchors and neighbours; nll [chunks]: of -log<p, q>, those rows left out; low [b]: whether it is one of them.
    Chunks first to last - 1."""
    b = len(numerator) // 2
    for chunk in range(first, last):
        sums[chunk] = ZERO
        nll[chunk] = 0.0
        for i in range(chunk * ROWS, min(b, (chunk + 1) * ROWS)):
            e, f = numerator[i], numerator[b + i]
            both, own = _products(e, f, slope)
            similar = np.float64(both) * shares[i] * shares[b + i]
            low[i] = similar < SMALL
            if not low[i]:  # a NaN is not low: it goes on as it is
                nll[chunk] -= np.log(similar)
                _pair(e, f, shares[i], shares[b + i], slope, both, own * shares[i], scale, sums[chunk])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _in_threads(work: Callable, chunks: int, *given) -> None:
    """work(*given, first, last) over all chunks, on as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), chunks)
    if threads < 2:
        return work(*given, 0, chunks)
    ends = [t * chunks // threads for t in range(threads + 1)]
    list(_pool(threads).map(lambda first, last: work(*given, first, last), ends[:-1], ends[1:]))


class LoopHead:
    """One head's logits [2b, C], contiguous float32 on the CPU and still without their bias, worked on in place. See head_step.TorchHead."""

    def __init__(self, logits: Tensor, bias: Tensor, b: int, logits_of: LogitsOf):
        if logits.dtype != torch.float32 or not logits.is_contiguous() or len(logits) != 2 * b or logits.device.type != "cpu":
            raise ValueError(f"logits: {tuple(logits.shape)} {logits.dtype} on {logits.device.type}; allowed: contiguous float32 [{2 * b}, C] on the cpu; "
                             "use head_step.TorchHead")
        self.logits, self.b, self.logits_of = logits, b, logits_of
        self.shares, self.sums = logits.new_empty(2 * b), logits.new_empty(-(-b // ROWS), logits.shape[1])
        _in_threads(numerators, len(self.sums), _array(logits), _array(bias.detach()), _array(self.shares), _array(self.sums))

    def anchor_sum(self) -> Tensor:
        """[C]: the sum of the anchors' probabilities."""
        return self.sums.sum(0)

    def to_gradients_(self, slope: Tensor, scale: Tensor) -> Tensor:
        """The logits become scale times the gradients by them of sum(-log<p, q>) + <slope, sum p>; dbias [C]: their sum. Returns the sum of -log<p, q>."""
        nll, low = np.empty(len(self.sums)), np.empty(self.b, np.bool_)
        _in_threads(gradients, len(nll), _array(self.logits), _array(self.shares), _array(slope), np.float32(float(scale)), _array(self.sums), nll, low)
        self.dbias = self.sums.sum(0)
        total = torch.tensor(nll.sum(), dtype=self.logits.dtype)
        return total + self._again(torch.from_numpy(np.flatnonzero(low)), slope, scale) if low.any() else total

    def _again(self, low: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
        """The rows whose product has underflown."""
        r, nll = from_logits(*self.logits_of(low))
        p, q = (self.logits[rows] * self.shares[rows, None] for rows in (low, low + self.b))
        dp, dq = (p * (slope - (p @ slope)[:, None] + 1) - r) * scale, (q - r) * scale
        self.logits[low], self.logits[low + self.b] = dp, dq
        self.dbias += dp.sum(0) + dq.sum(0)
        return nll


def _array(x: Tensor) -> np.ndarray:
    return x.numpy() if x.is_contiguous() else x.contiguous().numpy()
