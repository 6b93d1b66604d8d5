"""SCAN's loss and gradient by one head's logits as Triton kernels, in float32 on a GPU.

Computes what `torch_head.TorchHead` does; formulas and names are explained there. The logits
become the gradients in three passes. Beside them there are two numbers per row and a partial
column sum per block of rows; probabilities are never stored. Every softmax subtracts its row's
maximum, that of a + n too: nothing underflows and no row needs to be recomputed. There
are no atomics, so the result is bitwise equal each time.
"""

# Pointers and numbers of a kernel have no Python type, and are passed one by one.
# ruff: noqa: ANN001, PLR0913

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 2048
"""Columns of a row in registers at once."""

SUM_ROWS, SUM_COLUMNS = 16, 128
"""Rows and columns of a block of the column sums."""

ROWS_PER_SUM = 512
"""Rows of a partial column sum."""


@triton.jit
def _row_stats(logits, maxima, totals, C, BLOCK: tl.constexpr) -> None:
    """Maximum of each row, and its sum of exp(logit - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * C + columns, mask=columns < C, other=-float("inf"))
        new = tl.maximum(maximum, tl.max(x, 0))
        total = total * tl.exp(maximum - new) + tl.sum(tl.exp(x - new), 0)
        maximum = new
    tl.store(maxima + row, maximum)
    tl.store(totals + row, total)


@triton.jit
def _column_sums(
    logits,
    maxima,
    totals,
    sums,
    b,
    C,
    PER_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums [chunk, C] of the probabilities of PER_SUM anchors each."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PER_SUM, ROWS):
        row = chunk * PER_SUM + start + tl.arange(0, ROWS)
        is_anchor = row < b
        x = tl.load(
            logits + row[:, None] * C + column[None, :],
            mask=is_anchor[:, None] & (column < C)[None, :],
            other=-float("inf"),
        )
        maximum = tl.load(maxima + row, mask=is_anchor, other=0.0)
        z = tl.load(totals + row, mask=is_anchor, other=1.0)
        total += tl.sum(tl.exp(x - maximum[:, None]) / z[:, None], 0)
    tl.store(sums + chunk * C + column, total, mask=column < C)


@triton.jit
def _gradients(
    logits, entropy_gradient, scale_pointer, maxima, totals, nll, b, C, BLOCK: tl.constexpr
) -> None:
    """Replace a pair's logits by `scale` times its gradients.

    By n: q - r; by a: p (g - <p, g>) + p - r, with g the entropy gradient and r the softmax of a +
    n.
    """
    row = tl.program_id(0).to(tl.int64)
    anchor, neighbour = logits + row * C, logits + (b + row) * C
    a_max, n_max = tl.load(maxima + row), tl.load(maxima + b + row)
    a_total, n_total = tl.load(totals + row), tl.load(totals + b + row)
    # First pass: maximum and total of a + n, and <p, g>
    maximum = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    expected_gradient = tl.full((), 0.0, tl.float32)
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = tl.load(anchor + columns, mask=columns < C, other=-float("inf")) - a_max
        n = tl.load(neighbour + columns, mask=columns < C, other=-float("inf")) - n_max
        g = tl.load(entropy_gradient + columns, mask=columns < C, other=0.0)
        new = tl.maximum(maximum, tl.max(a + n, 0))
        total = total * tl.exp(maximum - new) + tl.sum(tl.exp(a + n - new), 0)
        expected_gradient += tl.sum(tl.exp(a) / a_total * g, 0)
        maximum = new
    scale = tl.load(scale_pointer)
    tl.store(nll + row, tl.log(a_total) + tl.log(n_total) - tl.log(total) - maximum)
    # Second pass: the gradients
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = tl.load(anchor + columns, mask=columns < C, other=-float("inf")) - a_max
        n = tl.load(neighbour + columns, mask=columns < C, other=-float("inf")) - n_max
        g = tl.load(entropy_gradient + columns, mask=columns < C, other=0.0)
        r = tl.exp(a + n - maximum) / total
        tl.store(neighbour + columns, (tl.exp(n) / n_total - r) * scale, mask=columns < C)
        dlogits = (tl.exp(a) / a_total * (g - expected_gradient + 1.0) - r) * scale
        tl.store(anchor + columns, dlogits, mask=columns < C)


class KernelHead:
    """`torch_head.Head` in Triton kernels, for contiguous float32 logits [2b, C]."""

    dbias: Tensor | None = None

    def __init__(self, logits: Tensor, num_pairs: int) -> None:
        self.logits = logits
        self.num_pairs = num_pairs
        self.num_clusters = logits.shape[1]
        self.block = min(triton.next_power_of_2(self.num_clusters), MAX_COLUMNS)
        self.maxima = logits.new_empty(2 * num_pairs)
        self.totals = logits.new_empty(2 * num_pairs)
        if num_pairs:
            _row_stats[(2 * num_pairs,)](
                logits, self.maxima, self.totals, self.num_clusters, BLOCK=self.block
            )

    def anchor_sum(self) -> Tensor:
        chunks = triton.cdiv(self.num_pairs, ROWS_PER_SUM)
        sums = self.logits.new_empty(chunks, self.num_clusters)
        if chunks:
            _column_sums[(triton.cdiv(self.num_clusters, SUM_COLUMNS), chunks)](
                self.logits,
                self.maxima,
                self.totals,
                sums,
                self.num_pairs,
                self.num_clusters,
                PER_SUM=ROWS_PER_SUM,
                ROWS=SUM_ROWS,
                BLOCK=SUM_COLUMNS,
            )
        return sums.sum(0)

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        nll = self.logits.new_empty(self.num_pairs)
        if self.num_pairs:
            _gradients[(self.num_pairs,)](
                self.logits,
                entropy_gradient.contiguous(),
                scale,
                self.maxima,
                self.totals,
                nll,
                self.num_pairs,
                self.num_clusters,
                BLOCK=self.block,
            )
        return nll.sum()
