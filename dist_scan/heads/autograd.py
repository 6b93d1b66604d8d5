"""The head step: SCAN's loss and its gradient, written by hand and in place (PERFORMANCE.md 3). Legend: H heads, B or b rows of this
rank, C clusters of a head, D width, S the clusters of all heads one after the other. X all rows of both views.
`losses.scan_loss`, `scan_heads_loss` and `temi_heads_loss` are the doors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_scan.heads.products import FeaturePair, HeadGradients, LogitsOf, head_slices
from dist_scan.world.collectives import all_sum
from dist_scan.world.world import current

SMALLEST = 1e-8  # the released code clamps mean probabilities here before the logarithm
GROUP_COLUMNS = 4096  # logits [b, columns] held at once when ranks share a batch: one message a group instead of one a head
BLOCK = 65536  # numbers a row block of the in-place gradient holds: what a core's cache keeps (1.04 to 1.15 times faster than whole heads)
TRITON = find_spec("triton") is not None  # it comes with PyTorch where that knows GPUs
SMALL = 1e-25  # below this <p, q> has lost digits in float32: such rows are done again from their logits


def all_means(p_heads: Sequence[Tensor], whole_batch: bool = False) -> tuple[list[Tensor], Tensor]:
    """The global batch's mean probability [C] of each head p [b, C], and the number of its rows; one message, uneven ranks allowed.
    whole_batch: its rows are all here, nothing is said."""
    return means_of([p.sum(0) for p in p_heads], len(p_heads[0]), whole_batch)


def means_of(
    sums: Sequence[Tensor], rows: int, whole_batch: bool = False
) -> tuple[list[Tensor], Tensor]:
    """`all_means` from each head's sum [C] over this rank's rows."""
    count = sums[0].new_full((1,), rows)
    if not whole_batch:
        count, *sums = all_sum(torch.cat([count, *sums])).split([1, *map(len, sums)])
    return [total / count for total in sums], count[0]


def entropy_and_slope(mean: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Of a mean probability [C]: its entropy, and the slope [C] of -weight * entropy; flat where it is clamped."""
    clamped = mean.clamp(min=SMALLEST)
    log_mean = clamped.log()
    return -torch.dot(clamped, log_mean), (log_mean + 1).mul_(weight).mul_(mean >= SMALLEST)


def to_gradients_(p: Tensor, q: Tensor, slope: Tensor, logits_of: LogitsOf) -> Tensor:
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
        low = (s[:, 0] < SMALL).nonzero()[:, 0]
        if len(low):
            r[low], nll = from_logits(*logits_of(low + start))
            r_scale = s.clone()
            r_scale[low] = 1
            total -= s.index_fill(0, low, 1).log().sum() - nll
        else:
            r_scale = s
            total -= s.log().sum()
        r.div_(r_scale)
        q_rows.sub_(r)
        own = torch.mv(p_rows, slope).sub_(1)[:, None]
        p_rows.mul_(torch.sub(slope, own, out=factor[: len(p_rows)])).sub_(r)
    return total


def from_logits(a: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
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

    def __init__(self, logits: Tensor, b: int, logits_of: LogitsOf) -> None:
        self.logits, self.b, self.logits_of = torch.softmax(logits, 1, out=logits), b, logits_of

    def anchor_sum(self) -> Tensor:
        """[C]: the sum of the anchors' probabilities."""
        return self.logits[: self.b].sum(0)

    def to_gradients_(self, slope: Tensor, scale: Tensor) -> Tensor:
        """The logits become scale times the gradients by them; see the function of this name, also for what is returned."""
        nll = to_gradients_(self.logits[: self.b], self.logits[self.b :], slope, self.logits_of)
        self.logits.mul_(scale)
        return nll


def in_loops(weight: Tensor) -> bool:
    """Whether heads of this weight run in compiled loops."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def open_head(x: FeaturePair, weight: Tensor, bias: Tensor) -> Any:
    """What takes one head's logits to their gradients: in float32 Triton's kernels on a GPU and compiled loops on a CPU, PyTorch for the rest."""
    if in_loops(weight):
        from dist_scan.heads.cpu_loops import LoopHead

        return LoopHead(x.logits(weight), bias, x.b, x.again(weight, bias))
    if weight.dtype == torch.float32 and weight.device.type == "cuda" and TRITON:
        from dist_scan.heads.gpu_kernels import KernelHead

        return KernelHead(x.logits(weight, bias), x.b)
    return TorchHead(x.logits(weight, bias), x.b, x.again(weight, bias))


class ScanLossFunction(torch.autograd.Function):
    """On logits [H, B, C]: all heads are one group."""

    @staticmethod
    def forward(ctx, a, n, entropy_weight):
        p, q = (torch.softmax(x, 2).contiguous() for x in (a, n))
        means, count = all_means(list(p))
        scale = current().world_size / count
        entropies, slopes = zip(*(entropy_and_slope(mean, entropy_weight) for mean in means))
        consistency = [
            to_gradients_(p[h], q[h], slope, lambda rows, h=h: (a[h, rows], n[h, rows]))
            for h, slope in enumerate(slopes)
        ]
        ctx.save_for_backward(p.mul_(scale), q.mul_(scale))
        consistency, entropy = torch.stack(consistency) * scale, torch.stack(entropies)
        ctx.mark_non_differentiable(consistency, entropy)
        return consistency - entropy_weight * entropy, consistency, entropy

    @staticmethod
    def backward(ctx, grad, *_):
        da, dn = ctx.saved_tensors
        grad = grad.view(-1, 1, 1)
        return da * grad, dn * grad, None


class HeadsFunction(torch.autograd.Function):
    """Linear heads whose forward has made the gradients of their loss: backward scales them and hands them on, without a copy."""

    @staticmethod
    def keep(ctx, sizes, back, scale=1.0) -> None:
        """For backward: gradients of each head's sum over rows by features (or None), weight and bias; scale makes the sum the loss."""
        ctx.sizes, ctx.scale, ctx.made = sizes, scale, (back.dx, back.dweight, back.dbias)

    @staticmethod
    def handed_on(ctx, grad_H):
        """(dx [X, D] or None, dweight, dbias)."""
        if ctx.made is None:
            raise RuntimeError(
                "a loss of heads hands its gradient on once and keeps no copy; run forward again"
            )
        (dx, dweight, dbias), ctx.made = ctx.made, None
        grad = grad_H * ctx.scale
        if grad.device.type != "cpu" or not bool(
            (grad == 1).all()
        ):  # as nearly always: spares a pass over the gradient (a GPU would have to be asked)
            for h, at in enumerate(head_slices(ctx.sizes)):
                dweight[at].mul_(grad[h])
                dbias[at].mul_(grad[h])
        return None if dx is None else torch.tensordot(grad, dx, 1), dweight, dbias


def head_after_head(
    x: FeaturePair,
    weight: Tensor,
    bias: Tensor,
    back: HeadGradients,
    entropy_weight: float,
    whole_batch: bool,
) -> tuple[Tensor, Tensor]:
    """SCAN's (consistency [H], entropy [H]); the heads' gradients go to `back`. In groups, whose logits are held at once."""
    terms: list[tuple[Tensor, Tensor]] = []
    for group in groups(back.sizes, whole_batch):
        heads = [open_head(x, weight[at], bias[at]) for _, at in group]
        means, count = means_of([head.anchor_sum() for head in heads], x.b, whole_batch)
        scale = (1 if whole_batch else current().world_size) / count
        for (h, _), head, mean in zip(group, heads, means):
            entropy, slope = entropy_and_slope(mean, entropy_weight)
            terms.append((head.to_gradients_(slope, scale) * scale, entropy))
            back.take(h, head.logits, head.dbias)
        del heads, head  # the next group's logits take their place
    consistency, entropies = zip(*terms)
    return torch.stack(consistency), torch.stack(entropies)


class ScanHeadsFunction(HeadsFunction):
    """On features: x holds anchors above neighbours [2B, D], so each head is one product there and one back."""

    @staticmethod
    def forward(ctx, anchors, neighbours, weight, bias, sizes, entropy_weight, whole_batch):
        with torch.autocast(weight.device.type, enabled=False):
            b, alone = len(anchors), whole_batch or current().world_size == 1
            x = FeaturePair(anchors, neighbours, weight.dtype, apart=max(sizes) <= b)
            back = HeadGradients(x, weight, bias, sizes, any(ctx.needs_input_grad[:2]))
            if alone and in_loops(weight):
                from dist_scan.heads.cpu_loops import whole_heads

                consistency, entropy = whole_heads(x, weight, bias, back, entropy_weight)
            else:
                consistency, entropy = head_after_head(x, weight, bias, back, entropy_weight, alone)
        HeadsFunction.keep(ctx, sizes, back)
        ctx.dtype = anchors.dtype
        ctx.mark_non_differentiable(consistency, entropy)
        return consistency - entropy_weight * entropy, consistency, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        dx, dweight, dbias = HeadsFunction.handed_on(ctx, grad)
        danchors, dneighbours = (None, None) if dx is None else dx.to(ctx.dtype).chunk(2)
        return danchors, dneighbours, dweight, dbias, None, None, None


class TemiHeadsFunction(HeadsFunction):
    """TEMI on features: student heads meet the teacher's probabilities of the other view (see losses.temi_heads_loss)."""

    @staticmethod
    def forward(
        ctx,
        first,
        second,
        weight,
        bias,
        sizes,
        teacher_log_p,
        marginals,
        pair_weights,
        beta,
        temperature,
    ):
        with torch.autocast(weight.device.type, enabled=False):
            x, b = (
                FeaturePair(first, second, weight.dtype, apart=max(sizes) <= len(first)),
                len(first),
            )
            back = HeadGradients(x, weight, bias, sizes, any(ctx.needs_input_grad[:2]))
            scale = current().world_size / all_sum(weight.new_full((), b))
            row_weights, pmi = torch.cat([pair_weights, pair_weights])[:, None] / 2, []
            for h, at in enumerate(head_slices(sizes)):
                log_s = torch.log_softmax(x.logits(weight[at], bias[at]).div_(temperature), 1)
                r = (
                    teacher_log_p[h].roll(b, 0).add_(log_s).mul_(beta).sub_(marginals[h].log())
                )  # each row meets the other view's
                lse = torch.logsumexp(r, 1, keepdim=True)
                pmi.append((row_weights * lse).sum())
                r.sub_(lse).exp_()
                back.take(h, log_s.exp_().sub_(r).mul_(row_weights * (scale * beta / temperature)))
        HeadsFunction.keep(ctx, sizes, back)
        ctx.dtype = first.dtype
        return -torch.stack(pmi) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dweight, dbias = HeadsFunction.handed_on(ctx, grad)
        dfirst, dsecond = (None, None) if dx is None else dx.to(ctx.dtype).chunk(2)
        return dfirst, dsecond, dweight, dbias, *([None] * 6)


def groups(sizes: Sequence[int], alone: bool = False) -> Iterator[list[tuple[int, slice]]]:
    """(head, its rows) in groups that share a message: one by one when alone, else GROUP_COLUMNS (of columns and not of
    bytes: ranks with other numbers of rows must send the same messages)."""
    most, group = 0 if alone or current().world_size == 1 else GROUP_COLUMNS, []
    for h, at in enumerate(head_slices(sizes)):
        if group and at.stop - group[0][1].start > most:
            yield group
            group = []
        group.append((h, at))
    yield group
