"""The loss of one head and its gradient by the logits, in PyTorch.

SCAN's loss of one head (Van Gansbeke et al., ECCV 2020, Eq. 2; `losses.scan_loss`) is

    L = -1/B sum_i log <p_i, q_i> + entropy_weight * sum_c m_c log m_c,   m = 1/B sum_i p_i,

with p = softmax(a) of an anchor and q = softmax(n) of its neighbour. With r = p q / <p, q>, which
is the softmax of a + n, and g the gradient of the entropy term by m, the gradients by the logits
are

    B dL/dn = q - r,        B dL/da = p - r + p (g - <p, g>).

With nll = sum_i -log <p_i, q_i>, they are the gradients of nll + <g, sum_i p_i>. They take the
place of the logits. `cpu_loops` and `gpu_kernels` compute the same, faster.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dist_scan.heads.products import RecomputeLogits
from dist_scan.losses import MIN_PROBABILITY

BLOCK_SIZE = 65536
"""Elements of a block of rows whose gradient is computed at once. A core's cache holds it, which is
1.04 to 1.15 times faster than whole heads."""

MIN_INNER_PRODUCT = 1e-25
"""Below this, <p, q> has lost digits in float32: such rows are recomputed from their logits."""


class Head(Protocol):
    """Logits [2b, C] of one head, anchors above neighbours, which become gradients in place."""

    logits: Tensor
    num_pairs: int
    dbias: Tensor | None
    """Sum of the gradients over rows [C], if `to_gradients_` has computed it."""

    def anchor_sum(self) -> Tensor:
        """Sum of the anchors' probabilities [C]."""

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        """Replace the logits by scale times the gradients by them. Returns nll.

        The gradients are those of nll + <g, sum p>, g = entropy_gradient.
        """


class TorchHead:
    """`Head` in PyTorch: the logits become probabilities, then gradients."""

    dbias: Tensor | None = None

    def __init__(self, logits: Tensor, num_pairs: int, recompute_logits: RecomputeLogits) -> None:
        self.logits = torch.softmax(logits, 1, out=logits)
        self.num_pairs = num_pairs
        self.recompute_logits = recompute_logits

    def anchor_sum(self) -> Tensor:
        return self.logits[: self.num_pairs].sum(0)

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        p, q = self.logits[: self.num_pairs], self.logits[self.num_pairs :]
        nll = probabilities_to_gradients_(p, q, entropy_gradient, self.recompute_logits)
        self.logits.mul_(scale)
        return nll


def entropy_and_gradient(mean: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(entropy, gradient [C] of -weight * entropy) of a mean probability [C].

    The gradient is 0 where the mean is clamped.
    """
    clamped = mean.clamp(min=MIN_PROBABILITY)
    log_mean = clamped.log()
    entropy = -torch.dot(clamped, log_mean)
    return entropy, (log_mean + 1).mul_(weight).mul_(mean >= MIN_PROBABILITY)


def probabilities_to_gradients_(
    p: Tensor, q: Tensor, entropy_gradient: Tensor, recompute_logits: RecomputeLogits
) -> Tensor:
    """Replace probabilities p, q [b, C] by the gradients by their logits. Returns nll.

    The gradients are those of nll + <g, sum p>, g = entropy_gradient. Rows whose inner product has
    underflowed are recomputed from recompute_logits(rows).
    """
    total = p.new_zeros(())
    block_rows = max(1, BLOCK_SIZE // p.shape[1])
    product_buffer = torch.empty_like(p[:block_rows])
    factor_buffer = torch.empty_like(p[:block_rows])
    for start in range(0, len(p), block_rows):
        p_rows = p[start : start + block_rows]
        q_rows = q[start : start + block_rows]
        # r = p q / <p, q>, from the logits where the inner product underflows
        r = torch.mul(p_rows, q_rows, out=product_buffer[: len(p_rows)])
        inner_product = r.sum(1, keepdim=True)
        underflowed = (inner_product[:, 0] < MIN_INNER_PRODUCT).nonzero()[:, 0]
        if len(underflowed):
            r[underflowed], nll = joint_softmax(*recompute_logits(underflowed + start))
            divisor = inner_product.index_fill(0, underflowed, 1)
            total -= divisor.log().sum() - nll
        else:
            divisor = inner_product
            total -= divisor.log().sum()
        r.div_(divisor)
        # dL/dn = q - r
        q_rows.sub_(r)
        # dL/da = p (g - <p, g> + 1) - r
        expected_gradient = torch.mv(p_rows, entropy_gradient).sub_(1)[:, None]
        factor = torch.sub(entropy_gradient, expected_gradient, out=factor_buffer[: len(p_rows)])
        p_rows.mul_(factor).sub_(r)
    return total


def joint_softmax(a: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax of a + n [b, C], sum of -log <p, q>) from logits of any size."""
    # Centred, so that the three log-sum-exps below do not cancel.
    a = a - a.amax(1, keepdim=True)
    n = n - n.amax(1, keepdim=True)
    both = a + n
    lse = torch.logsumexp(both, 1)
    nll = (torch.logsumexp(a, 1) + torch.logsumexp(n, 1) - lse).sum()
    return (both - lse[:, None]).exp_(), nll
