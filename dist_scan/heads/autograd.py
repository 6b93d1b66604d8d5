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

from dist_scan.heads.products import FeaturePair, HeadGradients, head_slices
from dist_scan.heads.torch_head import TorchHead, entropy_and_gradient
from dist_scan.losses import ScanTerms, at_least_fp32, temi_pair_weights
from dist_scan.world.collectives import all_sum
from dist_scan.world.world import current

GROUP_COLUMNS = 4096  # logits [b, columns] held at once when ranks share a batch: one message a group instead of one a head
HAS_TRITON = find_spec("triton") is not None  # it comes with PyTorch where that knows GPUs


def mean_probabilities(
    p_heads: Sequence[Tensor], whole_batch: bool = False
) -> tuple[list[Tensor], Tensor]:
    """The global batch's mean probability [C] of each head p [b, C], and the number of its rows; one message, uneven ranks allowed.
    whole_batch: its rows are all here, nothing is said."""
    return means_from_sums([p.sum(0) for p in p_heads], len(p_heads[0]), whole_batch)


def means_from_sums(
    sums: Sequence[Tensor], rows: int, whole_batch: bool = False
) -> tuple[list[Tensor], Tensor]:
    """`mean_probabilities` from each head's sum [C] over this rank's rows."""
    count = sums[0].new_full((1,), rows)
    if not whole_batch:
        count, *sums = all_sum(torch.cat([count, *sums])).split([1, *map(len, sums)])
    return [total / count for total in sums], count[0]


def uses_cpu_loops(weight: Tensor) -> bool:
    """Whether heads of this weight run in compiled loops."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def make_head(x: FeaturePair, weight: Tensor, bias: Tensor) -> Any:
    """What takes one head's logits to their gradients: in float32 Triton's kernels on a GPU and compiled loops on a CPU, PyTorch for the rest."""
    if uses_cpu_loops(weight):
        from dist_scan.heads.cpu_loops import LoopHead

        return LoopHead(x.logits(weight), bias, x.b, x.again(weight, bias))
    if weight.dtype == torch.float32 and weight.device.type == "cuda" and HAS_TRITON:
        from dist_scan.heads.gpu_kernels import KernelHead

        return KernelHead(x.logits(weight, bias), x.b)
    return TorchHead(x.logits(weight, bias), x.b, x.again(weight, bias))


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


def scan_heads_by_group(
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
        heads = [make_head(x, weight[at], bias[at]) for _, at in group]
        means, count = means_from_sums([head.anchor_sum() for head in heads], x.b, whole_batch)
        scale = (1 if whole_batch else current().world_size) / count
        for (h, _), head, mean in zip(group, heads, means):
            entropy, entropy_gradient = entropy_and_gradient(mean, entropy_weight)
            terms.append((head.to_gradients_(entropy_gradient, scale) * scale, entropy))
            back.store(h, head.logits, head.dbias)
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
            if alone and uses_cpu_loops(weight):
                from dist_scan.heads.cpu_loops import scan_heads_in_loops

                consistency, entropy = scan_heads_in_loops(x, weight, bias, back, entropy_weight)
            else:
                consistency, entropy = scan_heads_by_group(
                    x, weight, bias, back, entropy_weight, alone
                )
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
                back.store(h, log_s.exp_().sub_(r).mul_(row_weights * (scale * beta / temperature)))
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


def scan_heads_loss(
    anchors_BD: Tensor,
    neighbours_BD: Tensor,
    weight_SD: Tensor,
    bias_S: Tensor,
    sizes: Sequence[int],
    entropy_weight: float,
    whole_batch: bool = False,
) -> ScanTerms:
    """`scan_loss` of linear heads on features: head h owns the next sizes[h] rows of weight and bias, S = sum(sizes).

    Heads are worked off in groups (one at a time when alone): a group's logits become its probabilities, then its gradients, in
    place, then the weights' gradient. At once in memory: that gradient and one group's logits, whatever the number of heads.
    whole_batch: these are all rows of the global batch (other ranks have other heads), and the loss is of them alone.
    """
    return ScanTerms(
        *ScanHeadsFunction.apply(
            at_least_fp32(anchors_BD),
            at_least_fp32(neighbours_BD),
            weight_SD,
            bias_S,
            tuple(sizes),
            entropy_weight,
            whole_batch,
        )
    )


def temi_heads_loss(
    first_BD: Tensor,
    second_BD: Tensor,
    weight_SD: Tensor,
    bias_S: Tensor,
    sizes: Sequence[int],
    teacher_log_p: Sequence[Tensor],
    marginals: Sequence[Tensor],
    beta: float,
    temperature: float,
) -> Tensor:
    """TEMI's loss [H] (Adaloglou et al., BMVC 2023, Sec. 3) of linear heads; layout of heads as in `scan_heads_loss`.

    -w * log sum_c (student_c(x) teacher_c(x'))^beta / marginal_c, mean over pairs and both directions; w as `temi_pair_weights` gives it, the
    same for all heads. teacher_log_p: per head [2B, C]; marginals: per head [C], the running mean of the teacher's probabilities.
    By log-sum-exp: bounded at any logit size. Memory: the teacher's probabilities of all heads, the student's of one.
    """
    return TemiHeadsFunction.apply(
        at_least_fp32(first_BD),
        at_least_fp32(second_BD),
        weight_SD,
        bias_S,
        tuple(sizes),
        teacher_log_p,
        marginals,
        temi_pair_weights(teacher_log_p),
        beta,
        temperature,
    )
