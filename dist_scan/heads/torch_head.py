"""SCAN's loss of one head and its gradient by the logits, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_scan.heads.products import RecomputeLogits
from dist_scan.losses import MIN_PROBABILITY

BLOCK = 65536  # numbers a row block of the in-place gradient holds: what a core's cache keeps (1.04 to 1.15 times faster than whole heads)
MIN_INNER_PRODUCT = 1e-25  # below this <p, q> has lost digits in float32: such rows are done again from their logits


def entropy_and_gradient(mean: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Of a mean probability [C]: its entropy, and the slope [C] of -weight * entropy; flat where it is clamped."""
    clamped = mean.clamp(min=MIN_PROBABILITY)
    log_mean = clamped.log()
    return -torch.dot(clamped, log_mean), (log_mean + 1).mul_(weight).mul_(mean >= MIN_PROBABILITY)


def to_gradients_(
    p: Tensor, q: Tensor, entropy_gradient: Tensor, recompute_logits: RecomputeLogits
) -> Tensor:
    """Probabilities [b, C] of one head become, in place, the gradients by the logits of sum(-log<p, q>) + <slope, sum p>.

    By n: q - r; by a: p - r + p (slope - <p, slope>), with r = p q / <p, q>. Returns the sum of -log<p, q>. logits_of(rows) are
    asked for where the product has underflown.
    """
    total, rows = p.new_zeros(()), max(1, BLOCK // p.shape[1])
    scratch, factor = (torch.empty_like(p[:rows]) for _ in range(2))
    for start in range(0, len(p), rows):
        p_rows, q_rows = p[start : start + rows], q[start : start + rows]
        r = torch.mul(p_rows, q_rows, out=scratch[: len(p_rows)])
        s = r.sum(1, keepdim=True)
        low = (s[:, 0] < MIN_INNER_PRODUCT).nonzero()[:, 0]
        if len(low):
            r[low], nll = joint_softmax(*recompute_logits(low + start))
            r_scale = s.clone()
            r_scale[low] = 1
            total -= s.index_fill(0, low, 1).log().sum() - nll
        else:
            r_scale = s
            total -= s.log().sum()
        r.div_(r_scale)
        q_rows.sub_(r)
        own = torch.mv(p_rows, entropy_gradient).sub_(1)[:, None]
        p_rows.mul_(torch.sub(entropy_gradient, own, out=factor[: len(p_rows)])).sub_(r)
    return total


def joint_softmax(a: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(r [b, C], the sum of -log<p, q>) of logits of any size."""
    a, n = (
        a - a.amax(1, keepdim=True),
        n - n.amax(1, keepdim=True),
    )  # centred: the three LSEs below do not cancel
    both = a + n
    lse = torch.logsumexp(both, 1)
    return (both - lse[:, None]).exp_(), (torch.logsumexp(a, 1) + torch.logsumexp(n, 1) - lse).sum()


class TorchHead:
    """One head's logits [2b, C], anchors above neighbours, worked on in place. Faster: head_loops.LoopHead on a CPU, head_kernel.KernelHead on a GPU."""

    dbias: Tensor | None = None
    """[C], where making the gradients has made their sum over rows too."""

    def __init__(self, logits: Tensor, b: int, recompute_logits: RecomputeLogits) -> None:
        self.logits, self.b, self.recompute_logits = (
            torch.softmax(logits, 1, out=logits),
            b,
            recompute_logits,
        )

    def anchor_sum(self) -> Tensor:
        """[C]: the sum of the anchors' probabilities."""
        return self.logits[: self.b].sum(0)

    def to_gradients_(self, entropy_gradient: Tensor, scale: Tensor) -> Tensor:
        """The logits become scale times the gradients by them; see the function of this name, also for what is returned."""
        nll = to_gradients_(
            self.logits[: self.b], self.logits[self.b :], entropy_gradient, self.recompute_logits
        )
        self.logits.mul_(scale)
        return nll
