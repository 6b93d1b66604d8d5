"""SCAN's loss and gradient by one head's logits as Triton kernels: what head_step does with PyTorch on a CPU, on a GPU in three passes.

Legend as in head_step: logits [2b, C] in float32, anchors above neighbours. The logits themselves become the gradients; beside them there
are two numbers a row and a partial column sum per block of rows, so probabilities are never held, not even once. Every softmax is
taken from its row's maximum, that of a + n too: nothing underflows and no row needs a second way. No atomics: the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 2048  # of a row in registers at once
ROWS, COLUMNS = 16, 128  # of a block of the column sums
ROWS_PER_SUM = 512


@triton.jit
def _row_stats(logits, top_of, total_of, C, BLOCK: tl.constexpr) -> None:
    """A row's maximum, and its sum of exp(logit - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * C + at, mask=at < C, other=-float("inf"))
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    tl.store(top_of + row, top)
    tl.store(total_of + row, total)


@triton.jit
def _column_sums(
    logits,
    top_of,
    total_of,
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
        there = row < b
        x = tl.load(
            logits + row[:, None] * C + column[None, :],
            mask=there[:, None] & (column < C)[None, :],
            other=-float("inf"),
        )
        top = tl.load(top_of + row, mask=there, other=0.0)
        z = tl.load(total_of + row, mask=there, other=1.0)
        total += tl.sum(tl.exp(x - top[:, None]) / z[:, None], 0)
    tl.store(sums + chunk * C + column, total, mask=column < C)


@triton.jit
def _gradients(
    logits, slope_of, scale_of, top_of, total_of, nll_of, b, C, BLOCK: tl.constexpr
) -> None:
    """A pair's logits become `scale` times its gradients: by n q - r, by a p (slope - <p, slope>) + p - r, r the softmax of a + n."""
    row = tl.program_id(0).to(tl.int64)
    anchor, neighbour = logits + row * C, logits + (b + row) * C
    a_top, n_top = tl.load(top_of + row), tl.load(top_of + b + row)
    a_total, n_total = tl.load(total_of + row), tl.load(total_of + b + row)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    own = tl.full((), 0.0, tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(anchor + at, mask=at < C, other=-float("inf")) - a_top
        n = tl.load(neighbour + at, mask=at < C, other=-float("inf")) - n_top
        entropy_gradient = tl.load(slope_of + at, mask=at < C, other=0.0)
        new = tl.maximum(top, tl.max(a + n, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(a + n - new), 0)
        own += tl.sum(tl.exp(a) / a_total * entropy_gradient, 0)
        top = new
    scale = tl.load(scale_of)
    tl.store(nll_of + row, tl.log(a_total) + tl.log(n_total) - tl.log(total) - top)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(anchor + at, mask=at < C, other=-float("inf")) - a_top
        n = tl.load(neighbour + at, mask=at < C, other=-float("inf")) - n_top
        entropy_gradient = tl.load(slope_of + at, mask=at < C, other=0.0)
        r = tl.exp(a + n - top) / total
        tl.store(neighbour + at, (tl.exp(n) / n_total - r) * scale, mask=at < C)
        tl.store(
            anchor + at,
            (tl.exp(a) / a_total * (entropy_gradient - own + 1.0) - r) * scale,
            mask=at < C,
        )


class KernelHead:
    """One head's logits [2b, C], contiguous float32, which the kernels work on in place. See head_step.TorchHead."""

    dbias = None

    def __init__(self, logits: Tensor, b: int) -> None:
        if logits.dtype != torch.float32 or not logits.is_contiguous() or len(logits) != 2 * b:
            raise ValueError(
                f"logits: {tuple(logits.shape)} {logits.dtype}; allowed: contiguous float32 [{2 * b}, C]; use head_step.TorchHead"
            )
        self.logits, self.b, self.clusters = logits, b, logits.shape[1]
        self.block = min(triton.next_power_of_2(self.clusters), MOST_COLUMNS)
        self.top, self.total = logits.new_empty(2 * b), logits.new_empty(2 * b)
        if b:
            _row_stats[(2 * b,)](logits, self.top, self.total, self.clusters, BLOCK=self.block)

    def anchor_sum(self) -> Tensor:
        """[C]: the sum of the anchors' probabilities."""
        chunks = triton.cdiv(self.b, ROWS_PER_SUM)
        sums = self.logits.new_empty(chunks, self.clusters)
        if chunks:
            _column_sums[(triton.cdiv(self.clusters, COLUMNS), chunks)](
                self.logits,
                self.top,
                self.total,
                sums,
                self.b,
                self.clusters,
                PER_SUM=ROWS_PER_SUM,
                ROWS=ROWS,
                BLOCK=COLUMNS,
            )
        return sums.sum(0)

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        """The logits become scale times the gradients by them of sum(-log<p, q>) + <slope, sum p>; returns the sum of -log<p, q>."""
        nll = self.logits.new_empty(self.b)
        if self.b:
            _gradients[(self.b,)](
                self.logits,
                entropy_gradient.contiguous(),
                scale,
                self.top,
                self.total,
                nll,
                self.b,
                self.clusters,
                BLOCK=self.block,
            )
        return nll.sum()
