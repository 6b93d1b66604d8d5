"""SCAN's loss and gradient by one head's logits as compiled loops over rows, in float32 on a CPU.

Computes what `torch_head.TorchHead` does; formulas and names are explained there. Import it late:
numba takes a second. A row stays in the L1 cache while everything is done with it, so the logits
pass through memory twice: once to become exponentials, once to become gradients. Sums are taken
over chunks of PAIRS_PER_CHUNK pairs, so the result is bitwise equal for any number of threads.
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

PAIRS_PER_CHUNK = 64
"""Pairs (an anchor and its neighbour) whose sums are added up by one thread."""

ANY_ORDER = {"reassoc", "nsz", "contract"}
"""Optimisations that the compiler may do in loops that sum: any order, but NaN stays NaN."""

ZERO, ONE = np.float32(0), np.float32(1)
MIN_MEAN = np.float32(MIN_PROBABILITY)

# Constants of _exponential: exp(x) = 2^k e^r with k = round(x / ln 2) and r = x - k ln 2.
LOG2_E = np.float32(1.44269504)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# exp stays at 1e-38 below this: smaller float32 numbers have fewer digits.
LOWEST = np.float32(-87.3)
# Adding this rounds to an integer and leaves it, with float32's exponent bias, in the lowest bits.
ROUND = np.float32(1.5 * 2**23 + 127)
E1 = np.float32(0.9999997063022554)
E2 = np.float32(0.4999914783067549)
E3 = np.float32(0.166676381603376)
E4 = np.float32(0.04189816061562441)
E5 = np.float32(0.008290270044410422)


# --- kernels ---------------------------------------------------------------------------------
#
# Functions that kernels call are inlined by the compiler. Otherwise a process that has compiled
# them would run another version, with sums in another order, than one that loads them from the
# cache.


@compiled(fastmath={"contract"}, forceinline=True)
def _exponential(logit: np.float32, bias: np.float32, maximum: np.float32) -> np.float32:
    """exp(logit + bias - maximum) of a sum of at most 0, to 2 units in the last place.

    2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] with a relative error of 9.2e-8, the least for
    five coefficients and the value 1 at 0. A function of its own, so that its sums keep their
    order.
    """
    x = (logit + bias) - maximum
    # A NaN is not below LOWEST; the polynomial keeps it.
    x = LOWEST if x < LOWEST else x
    rounded = x * LOG2_E + ROUND
    k = rounded - ROUND
    r = x - k * LN2_HIGH - k * LN2_LOW
    y = ((((E5 * r + E4) * r + E3) * r + E2) * r + E1) * r + ONE
    return y * np.int32(np.float32(rounded).view(np.int32) << 23).view(np.float32)


@compiled(fastmath=ANY_ORDER, forceinline=True)
def exponentiate_row(row: np.ndarray, bias: np.ndarray, maximum: np.float32) -> np.float32:
    """Replace row by exp(row + bias - maximum), all at most 1. Returns their sum."""
    wide_vectors()
    total = ZERO
    for c in range(len(row)):
        y = _exponential(row[c], bias[c], maximum)
        row[c] = y
        total += y
    return total


@compiled(forceinline=True)
def _row_maximum(row: np.ndarray, bias: np.ndarray) -> np.float32:
    """The largest row + bias.

    Compared as integers of the same order: a maximum of floats is not vectorised (9 times slower).
    """
    wide_vectors()
    maximum = np.int32(-(2**31))
    for c in range(len(row)):
        bits = np.float32(row[c] + bias[c]).view(np.int32)
        maximum = max(maximum, np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF)))
    return np.int32(maximum ^ ((maximum >> 31) & 0x7FFFFFFF)).view(np.float32)


@compiled(fastmath={"contract"}, forceinline=True)
def _add_scaled(row: np.ndarray, scale: np.float32, sums: np.ndarray) -> None:
    wide_vectors()
    for c in range(len(row)):
        sums[c] += row[c] * scale


@compiled()
def exponentiate_logits(
    logits: np.ndarray,
    bias: np.ndarray,
    inverse_sums: np.ndarray,
    sums: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Replace logits [2b, C] without their bias by e = exp(logits + bias - row maximum).

    inverse_sums [2b]: 1 / sum of e, so that e * inverse_sum is the probability. sums [chunks, C]:
    the anchors' probabilities. Works on chunks first to last - 1.
    """
    wide_vectors()
    b = len(logits) // 2
    for chunk in range(first, last):
        sums[chunk] = ZERO
        for i in range(chunk * PAIRS_PER_CHUNK, min(b, (chunk + 1) * PAIRS_PER_CHUNK)):
            for row in (i, b + i):
                inverse_sums[row] = ONE / exponentiate_row(
                    logits[row], bias, _row_maximum(logits[row], bias)
                )
            _add_scaled(logits[i], inverse_sums[i], sums[chunk])


@compiled(fastmath=ANY_ORDER, forceinline=True)
def _inner_products(
    e: np.ndarray, f: np.ndarray, entropy_gradient: np.ndarray
) -> tuple[np.float32, np.float32]:
    """(<e, f>, <e, entropy_gradient>)."""
    wide_vectors()
    inner_product, expected_gradient = ZERO, ZERO
    for c in range(len(e)):
        inner_product += e[c] * f[c]
        expected_gradient += e[c] * entropy_gradient[c]
    return inner_product, expected_gradient


@compiled(fastmath={"contract"}, forceinline=True)
def _pair_to_gradients(  # noqa: PLR0913 - compiled loops take arrays and numbers one by one
    e: np.ndarray,
    f: np.ndarray,
    p_scale: np.float32,
    q_scale: np.float32,
    entropy_gradient: np.ndarray,
    inner_product: np.float32,
    expected_gradient: np.float32,
    scale: np.float32,
    sums: np.ndarray,
) -> None:
    """Replace a pair's exponentials by scale times their gradients, and add these to sums [C].

    p = e * p_scale and q = f * q_scale; expected_gradient is <p, entropy_gradient>.
    """
    wide_vectors()
    inverse = ONE / inner_product
    for c in range(len(e)):
        r = e[c] * f[c] * inverse
        dq = (f[c] * q_scale - r) * scale
        dp = (e[c] * p_scale * (entropy_gradient[c] - expected_gradient + ONE) - r) * scale
        f[c], e[c] = dq, dp
        sums[c] += dp + dq


@compiled()
def exponentials_to_gradients(  # noqa: PLR0913 - compiled loops take arrays and numbers one by one
    e_and_f: np.ndarray,
    inverse_sums: np.ndarray,
    entropy_gradient: np.ndarray,
    scale: np.float32,
    sums: np.ndarray,
    nll: np.ndarray,
    underflowed: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Replace exponentials [2b, C], e of anchors above f of neighbours, by scale times gradients.

    The gradients by the logits of nll + <g, sum p>, g = entropy_gradient. Rows with
    <p, q> < MIN_INNER_PRODUCT stay as they are and are marked in underflowed [b].
    sums [chunks, C]: of the gradients of anchors and neighbours; nll [chunks]: of -log <p, q>; both
    without those rows. Works on chunks first to last - 1.
    """
    wide_vectors()
    b = len(e_and_f) // 2
    for chunk in range(first, last):
        sums[chunk] = ZERO
        nll[chunk] = 0.0
        for i in range(chunk * PAIRS_PER_CHUNK, min(b, (chunk + 1) * PAIRS_PER_CHUNK)):
            e, f = e_and_f[i], e_and_f[b + i]
            inner_product, expected_gradient = _inner_products(e, f, entropy_gradient)
            similarity = np.float64(inner_product) * inverse_sums[i] * inverse_sums[b + i]
            underflowed[i] = similarity < MIN_INNER_PRODUCT
            # A NaN is not below the limit and is passed on to the gradients.
            if not underflowed[i]:
                nll[chunk] -= np.log(similarity)
                _pair_to_gradients(
                    e,
                    f,
                    inverse_sums[i],
                    inverse_sums[b + i],
                    entropy_gradient,
                    inner_product,
                    expected_gradient * inverse_sums[i],
                    scale,
                    sums[chunk],
                )


@compiled(forceinline=True)
def column_sums(sums: np.ndarray) -> np.ndarray:
    """Sum [C] over the rows of sums [chunks, C], in order."""
    total = np.zeros(sums.shape[1], np.float32)
    for chunk in range(len(sums)):
        for c in range(len(total)):
            total[c] += sums[chunk, c]
    return total


@compiled()
def entropy_and_gradient(
    sums: np.ndarray, count: int, weight: np.float32
) -> tuple[float, np.ndarray]:
    """(entropy, gradient [C] of -weight * entropy) of the mean over `count` rows.

    sums [chunks, C]: of the rows' probabilities. As `torch_head.entropy_and_gradient`.
    """
    gradient = column_sums(sums)
    entropy = 0.0
    for c in range(len(gradient)):
        mean = gradient[c] / np.float32(count)
        # A NaN is not below the limit and stays.
        clamped = MIN_MEAN if mean < MIN_MEAN else mean
        log = np.log(clamped)
        entropy -= clamped * log
        gradient[c] = ZERO if mean < MIN_MEAN else (log + ONE) * weight
    return entropy, gradient


@compiled()
def add_chunks(
    sums: np.ndarray, nll: np.ndarray, underflowed: np.ndarray
) -> tuple[np.ndarray, float, np.bool_]:
    """(sum [C] of the gradients, sum of -log <p, q>, whether any row has underflowed)."""
    return column_sums(sums), nll.sum(), underflowed.any()


# --- heads -----------------------------------------------------------------------------------


@cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


def _run_in_threads(kernel: Callable[..., None], num_chunks: int, *arguments: object) -> None:
    """kernel(*arguments, first, last) over all chunks, on as many threads as PyTorch uses."""
    num_threads = min(torch.get_num_threads(), num_chunks)
    if num_threads < 2:
        kernel(*arguments, 0, num_chunks)
        return
    ends = [t * num_chunks // num_threads for t in range(num_threads + 1)]
    ranges = zip(ends[:-1], ends[1:])
    list(_thread_pool(num_threads).map(lambda chunks: kernel(*arguments, *chunks), ranges))


class LoopHead:
    """`torch_head.Head` in compiled loops. Logits [2b, C] come without their bias."""

    dbias: Tensor | None = None

    def __init__(
        self, logits: Tensor, bias: Tensor, num_pairs: int, recompute_logits: RecomputeLogits
    ) -> None:
        num_chunks = -(-num_pairs // PAIRS_PER_CHUNK)
        self.logits = logits
        self.num_pairs = num_pairs
        # Arrays that the kernels work on; allocated by PyTorch, whose memory is aligned.
        self._array = logits.numpy()
        self._inverse_sums = torch.empty(2 * num_pairs).numpy()
        # Per chunk: sums of probabilities, then (after `to_gradients_`) of gradients
        self._sums = torch.empty(num_chunks, logits.shape[1]).numpy()
        self._nll = torch.empty(num_chunks, dtype=torch.float64).numpy()
        self._underflowed = torch.empty(num_pairs, dtype=torch.bool).numpy()
        self.load_logits(_array(bias), recompute_logits)

    def load_logits(self, bias: np.ndarray, recompute_logits: RecomputeLogits) -> None:
        """Exponentiate the logits in `self.logits`; call again when the next head's are there."""
        self._recompute_logits = recompute_logits
        _run_in_threads(
            exponentiate_logits, len(self._sums), self._array, bias, self._inverse_sums, self._sums
        )

    def anchor_sum(self) -> Tensor:
        return torch.from_numpy(column_sums(self._sums))

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        nll = self._replace_by_gradients(_array(entropy_gradient), float(scale))
        return torch.tensor(nll, dtype=self.logits.dtype)

    def loss_and_gradients_(self, entropy_weight: float) -> tuple[float, float]:
        """(consistency, entropy) of a head whose rows are those of the global batch.

        Replaces the logits by the gradients of the head's loss.
        """
        count = max(1, self.num_pairs)
        entropy, entropy_gradient = entropy_and_gradient(
            self._sums, count, np.float32(entropy_weight)
        )
        return self._replace_by_gradients(entropy_gradient, 1 / count) / count, entropy

    def _replace_by_gradients(self, entropy_gradient: np.ndarray, scale: float) -> float:
        _run_in_threads(
            exponentials_to_gradients,
            len(self._nll),
            self._array,
            self._inverse_sums,
            entropy_gradient,
            np.float32(scale),
            self._sums,
            self._nll,
            self._underflowed,
        )
        dbias, nll, any_underflowed = add_chunks(self._sums, self._nll, self._underflowed)
        self.dbias = torch.from_numpy(dbias)
        if any_underflowed:
            nll += self._recompute_underflowed(self.dbias, entropy_gradient, scale)
        return nll

    def _recompute_underflowed(
        self, dbias: Tensor, entropy_gradient: np.ndarray, scale: float
    ) -> float:
        """Replace the underflowed rows by their gradients, and add these to dbias.

        Returns the rows' part of nll.
        """
        anchors = torch.from_numpy(np.flatnonzero(self._underflowed))
        neighbours = anchors + self.num_pairs
        g = torch.from_numpy(entropy_gradient)
        inverse_sums = torch.from_numpy(self._inverse_sums)
        p = self.logits[anchors] * inverse_sums[anchors, None]
        q = self.logits[neighbours] * inverse_sums[neighbours, None]
        r, nll = joint_softmax(*self._recompute_logits(anchors))
        dp = (p * (g - (p @ g)[:, None] + 1) - r) * scale
        dq = (q - r) * scale
        self.logits[anchors] = dp
        self.logits[neighbours] = dq
        dbias += dp.sum(0) + dq.sum(0)
        return float(nll)


def scan_heads_in_loops(
    x: FeaturePair, weight: Tensor, bias: Tensor, gradients: HeadGradients, entropy_weight: float
) -> tuple[Tensor, Tensor]:
    """SCAN's (consistency [H], entropy [H]) of heads that see the global batch; fills `gradients`.

    As `autograd.scan_heads_by_group`, but all heads of a size use the memory of the first one, and
    PyTorch does nothing but the products: its small calls between them would run with cold caches.
    """
    head: LoopHead | None = None
    terms = []
    biases = _array(bias)
    weights = weight.split(gradients.sizes)
    for h, (rows, head_weight) in enumerate(zip(gradients.slices, weights)):
        recompute_logits = x.recompute_logits(head_weight, bias[rows])
        if head is None or head.logits.shape[1] != len(head_weight):
            # Free the old logits before the new ones are allocated.
            head = None
            head = LoopHead(x.logits(head_weight), bias[rows], x.num_pairs, recompute_logits)
        else:
            x.logits(head_weight, out=head.logits)
            head.load_logits(biases[rows], recompute_logits)
        terms.append(head.loss_and_gradients_(entropy_weight))
        gradients.store(h, head.logits, head.dbias)
    consistency, entropy = torch.tensor(terms, dtype=weight.dtype).T.unbind()
    return consistency, entropy


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()
