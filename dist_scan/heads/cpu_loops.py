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

from dist_scan.compiled import compiled, wide_vectors
from dist_scan.heads.products import FeaturePair, HeadGradients, RecomputeLogits
from dist_scan.heads.torch_head import MIN_INNER_PRODUCT, joint_softmax
from dist_scan.losses import MIN_PROBABILITY

ROWS = 64
SUMS = {
    "reassoc",
    "nsz",
    "contract",
}  # of the compiler's liberties: sums in any order. What makes a NaN a number is not among them.

LOG2E, LN2_HIGH, LN2_LOW = (
    np.float32(1.44269504),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
LOWEST = np.float32(
    -87.3
)  # exp stays 1e-38 below: float32 has only numbers with fewer digits there
ROUND = np.float32(
    1.5 * 2**23 + 127
)  # adding it rounds to an integer and leaves that, and float32's bias of exponents, in the lowest bits
E1, E2, E3, E4, E5 = (
    np.float32(x)
    for x in (
        0.9999997063022554,
        0.4999914783067549,
        0.166676381603376,
        0.04189816061562441,
        0.008290270044410422,
    )
)
ZERO, ONE, LEAST = np.float32(0), np.float32(1), np.float32(MIN_PROBABILITY)


@compiled(fastmath={"contract"})
def _exponential(logit, bias, top):
    """exp(logit + bias - top) of what is at most 0, to 2 units in the last place: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2], whose relative error
    is 9.2e-8 (the least there is with five coefficients and 1 at 0). By itself: its sums keep their order."""
    x = (logit + bias) - top
    x = LOWEST if x < LOWEST else x  # a NaN stays, and is kept by the polynomial
    rounded = x * LOG2E + ROUND
    k = rounded - ROUND
    r = x - k * LN2_HIGH - k * LN2_LOW
    y = ((((E5 * r + E4) * r + E3) * r + E2) * r + E1) * r + ONE
    return y * np.int32(np.float32(rounded).view(np.int32) << 23).view(np.float32)


@compiled(fastmath=SUMS)
def exponentials(row, bias, top):
    """exp(row + bias - top) in place, no sum above top. Returns their sum."""
    wide_vectors()
    total = ZERO
    for c in range(len(row)):
        y = _exponential(row[c], bias[c], top)
        row[c] = y
        total += y
    return total


@compiled()
def _largest(row, bias):
    """The largest row + bias. As integers of the same order: a maximum of floats is not vectorised (9 times slower)."""
    wide_vectors()
    top = np.int32(-(2**31))
    for c in range(len(row)):
        bits = np.float32(row[c] + bias[c]).view(np.int32)
        top = max(top, np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF)))
    return np.int32(top ^ ((top >> 31) & 0x7FFFFFFF)).view(np.float32)


@compiled(fastmath={"contract"})
def _add(row, share, sums) -> None:
    wide_vectors()
    for c in range(len(row)):
        sums[c] += row[c] * share


@compiled()
def exponentiate(logits, bias, shares, sums, first, last) -> None:
    """Logits [2b, C] without their bias become exp(logit - the row's largest); times shares [2b] they are probabilities. sums [chunks, C]: the
    anchors' probabilities. Chunks first to last - 1."""
    wide_vectors()
    b = len(logits) // 2
    for chunk in range(first, last):
        sums[chunk] = ZERO
        for i in range(chunk * ROWS, min(b, (chunk + 1) * ROWS)):
            for at in (i, b + i):
                shares[at] = ONE / exponentials(logits[at], bias, _largest(logits[at], bias))
            _add(logits[i], shares[i], sums[chunk])


@compiled(fastmath=SUMS)
def _products(e, f, entropy_gradient):
    """(<e, f>, <e, slope>)."""
    wide_vectors()
    both, own = ZERO, ZERO
    for c in range(len(e)):
        both += e[c] * f[c]
        own += e[c] * entropy_gradient[c]
    return both, own


@compiled(fastmath={"contract"})
def _pair(e, f, p_share, q_share, entropy_gradient, both, own, scale, sums) -> None:
    """A pair's numerators become scale times their gradients; sums [C] are added up."""
    wide_vectors()
    back = ONE / both
    for c in range(len(e)):
        r = e[c] * f[c] * back
        dq = (f[c] * q_share - r) * scale
        dp = (e[c] * p_share * (entropy_gradient[c] - own + ONE) - r) * scale
        f[c], e[c] = dq, dp
        sums[c] += dp + dq


@compiled()
def gradients(numerator, shares, entropy_gradient, scale, sums, nll, low, first, last) -> None:
    """Numerators [2b, C] become scale times the gradients of sum(-log<p, q>) + <slope, sum p>, but for rows with <p, q> < SMALL, which stay.
    sums [chunks, C]: of the gradients, anchors and neighbours; nll [chunks]: of -log<p, q>, those rows left out; low [b]: whether it is one of them.
    Chunks first to last - 1."""
    wide_vectors()
    b = len(numerator) // 2
    for chunk in range(first, last):
        sums[chunk] = ZERO
        nll[chunk] = 0.0
        for i in range(chunk * ROWS, min(b, (chunk + 1) * ROWS)):
            e, f = numerator[i], numerator[b + i]
            both, own = _products(e, f, entropy_gradient)
            similar = np.float64(both) * shares[i] * shares[b + i]
            low[i] = similar < MIN_INNER_PRODUCT
            if not low[i]:  # a NaN is not low: it goes on as it is
                nll[chunk] -= np.log(similar)
                _pair(
                    e,
                    f,
                    shares[i],
                    shares[b + i],
                    entropy_gradient,
                    both,
                    own * shares[i],
                    scale,
                    sums[chunk],
                )


@compiled()
def column_sums(sums):
    """[C] of [chunks, C], in order."""
    total = np.zeros(sums.shape[1], np.float32)
    for chunk in range(len(sums)):
        for c in range(len(total)):
            total[c] += sums[chunk, c]
    return total


@compiled()
def entropy_and_gradient(sums, count, weight):
    """head_step's of the mean of `count` rows, from their sums [chunks, C]: (entropy, slope [C])."""
    entropy_gradient, entropy = column_sums(sums), 0.0
    for c in range(len(entropy_gradient)):
        mean = entropy_gradient[c] / np.float32(count)
        clamped = LEAST if mean < LEAST else mean  # a NaN stays
        log = np.log(clamped)
        entropy -= clamped * log
        entropy_gradient[c] = ZERO if mean < LEAST else (log + ONE) * weight
    return entropy, entropy_gradient


@compiled()
def add_up(sums, nll, low):
    """What chunks have left: (sum [C] of the gradients, of -log<p, q>, whether there are rows to be done again)."""
    return column_sums(sums), nll.sum(), low.any()


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

    def __init__(
        self, logits: Tensor, bias: Tensor, b: int, recompute_logits: RecomputeLogits
    ) -> None:
        if (
            logits.dtype != torch.float32
            or not logits.is_contiguous()
            or len(logits) != 2 * b
            or logits.device.type != "cpu"
        ):
            raise ValueError(
                f"logits: {tuple(logits.shape)} {logits.dtype} on {logits.device.type}; allowed: contiguous float32 [{2 * b}, C] on the cpu; "
                "use head_step.TorchHead"
            )
        if bias.dtype != torch.float32 or bias.shape != logits.shape[1:]:
            raise ValueError(
                f"bias: {tuple(bias.shape)} {bias.dtype}; allowed: float32 [{logits.shape[1]}], as the logits"
            )
        chunks, clusters = -(-b // ROWS), logits.shape[1]
        self.logits, self.b, self.rows = logits, b, logits.numpy()
        self.shares, self.sums = torch.empty(2 * b).numpy(), torch.empty(chunks, clusters).numpy()
        self.nll, self.low = (
            torch.empty(chunks, dtype=torch.float64).numpy(),
            torch.empty(b, dtype=torch.bool).numpy(),
        )
        self.begin(_array(bias), recompute_logits)

    def begin(self, bias: np.ndarray, recompute_logits: RecomputeLogits) -> None:
        """Make numerators of the logits; in the same memory again for the next head's."""
        self.recompute_logits = recompute_logits
        _in_threads(exponentiate, len(self.sums), self.rows, bias, self.shares, self.sums)

    def anchor_sum(self) -> Tensor:
        """[C]: the sum of the anchors' probabilities."""
        return torch.from_numpy(column_sums(self.sums))

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        """The logits become scale times the gradients by them of sum(-log<p, q>) + <slope, sum p>; dbias [C]: their sum. Returns the sum of -log<p, q>."""
        return torch.tensor(
            self._to_gradients(_array(entropy_gradient), float(scale)), dtype=self.logits.dtype
        )

    def finish_(self, entropy_weight: float) -> tuple[float, float]:
        """All rows of the batch are here: the logits become the gradients of the head's loss. Returns its (consistency, entropy)."""
        count = max(1, self.b)
        entropy, entropy_gradient = entropy_and_gradient(
            self.sums, count, np.float32(entropy_weight)
        )
        return self._to_gradients(entropy_gradient, 1 / count) / count, entropy

    def _to_gradients(self, entropy_gradient: np.ndarray, scale: float) -> float:
        _in_threads(
            gradients,
            len(self.nll),
            self.rows,
            self.shares,
            entropy_gradient,
            np.float32(scale),
            self.sums,
            self.nll,
            self.low,
        )
        dbias, nll, again = add_up(self.sums, self.nll, self.low)
        self.dbias = torch.from_numpy(dbias)
        return nll + self._again(entropy_gradient, scale) if again else nll

    def _again(self, entropy_gradient: np.ndarray, scale: float) -> float:
        """The rows whose product has underflown."""
        low, entropy_gradient = (
            torch.from_numpy(np.flatnonzero(self.low)),
            torch.from_numpy(entropy_gradient),
        )
        r, nll = joint_softmax(*self.recompute_logits(low))
        p, q = (
            self.logits[rows] * torch.from_numpy(self.shares)[rows, None]
            for rows in (low, low + self.b)
        )
        dp, dq = (
            (p * (entropy_gradient - (p @ entropy_gradient)[:, None] + 1) - r) * scale,
            (q - r) * scale,
        )
        self.logits[low], self.logits[low + self.b] = dp, dq
        self.dbias += dp.sum(0) + dq.sum(0)
        return float(nll)


def scan_heads_in_loops(
    x: FeaturePair, weight: Tensor, bias: Tensor, back: HeadGradients, entropy_weight: float
) -> tuple[Tensor, Tensor]:
    """(consistency [H], entropy [H]) of heads whose batch is all here; their gradients go to `back`. As head_step's loop over heads, in the memory of
    the head before and without PyTorch between the products: after one no cache holds anything of its small calls."""
    head, terms, biases = None, [], _array(bias)
    for h, (at, own) in enumerate(zip(back.at, weight.split(back.sizes))):
        if head is None or head.logits.shape[1] != len(own):
            head = None  # before the new one: its logits take the place of this one's
            head = LoopHead(x.logits(own), bias[at], x.b, x.again(own, bias[at]))
        else:
            x.logits(own, out=head.logits)
            head.begin(biases[at], x.again(own, bias[at]))
        terms.append(head.finish_(entropy_weight))
        back.store(h, head.logits, head.dbias)
    return torch.tensor(terms, dtype=weight.dtype).T.unbind()


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()
