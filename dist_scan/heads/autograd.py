"""Losses of linear heads as autograd functions that compute their gradient in the forward pass.

`scan_heads_loss` is SCAN's loss. With p_i and q_i the probabilities of an anchor i and its
neighbour, B pairs in the global batch and C clusters, one head has (Eq. 2)

    L = -1/B sum_i log <p_i, q_i> + entropy_weight * sum_c m_c log m_c,   m = 1/B sum_i p_i.

The first term is the consistency, -sum_c m_c log m_c the entropy. With a_i and n_i the logits of
anchor and neighbour, r_i = p_i q_i / <p_i, q_i> elementwise, and g_c = entropy_weight * (log m_c
+ 1) the gradient of the entropy term by m_c, the gradients by the logits are

    B dL/dn_i = q_i - r_i,        B dL/da_i = p_i - r_i + p_i (g - <p_i, g>).

`ScanHeadsFunction.forward` computes both for one head after another: logits, the mean m over all
ranks (one all-reduce), then loss and gradients. `torch_head.probabilities_to_gradients_` has these
lines in PyTorch; `cpu_loops` and `gpu_kernels` compute the same, faster.

`temi_heads_loss` is TEMI's loss. `losses.scan_loss` and `losses.temi_loss` are the readable forms,
with autograd. A head's logits become, in place, its probabilities and then its gradients by the
logits, which are multiplied with the features at once. Of the logits only one group's are in
memory; the gradients are those of all weights and, if features need them, of all features for each
head. Shapes as in the package's docstring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_scan.heads.products import FeaturePair, HeadGradients, head_slices
from dist_scan.heads.torch_head import Head, TorchHead, entropy_and_gradient
from dist_scan.losses import ScanTerms, at_least_fp32, temi_pair_weights
from dist_scan.world.collectives import all_sum
from dist_scan.world.world import current

GROUP_COLUMNS = 4096
"""Columns of logits held at once when ranks share a batch: one message per group instead of one per
head. Counted in columns and not in bytes, because ranks with different numbers of rows must send
the same messages."""

HAS_TRITON = find_spec("triton") is not None
"""Triton comes with the builds of PyTorch for GPUs."""


# --- SCAN ------------------------------------------------------------------------------------


def scan_heads_loss(
    anchors_BD: Tensor,
    neighbours_BD: Tensor,
    weight_SD: Tensor,
    bias_S: Tensor,
    sizes: Sequence[int],
    entropy_weight: float,
    whole_batch: bool = False,
) -> ScanTerms:
    """SCAN's loss (Eq. 2, `losses.scan_loss`) of linear heads on features, fused; terms [H].

    For each head, with p = softmax(anchors weight^T + bias), q the same of the neighbours, and m
    the mean of p over the global batch:

        consistency = -mean_i log sum_c p_ic q_ic
        entropy = -sum_c m_c log m_c
        total = consistency - entropy_weight * entropy

    Head h has the next sizes[h] rows of weight and bias, S = sum(sizes). Ranks may hold different
    numbers of rows. whole_batch: the rows are those of the global batch (other ranks have other
    heads), and nothing is summed over ranks. The gradient can be computed only once.
    """
    return ScanTerms(
        *ScanHeadsFunction.apply(
            at_least_fp32(anchors_BD),
            at_least_fp32(neighbours_BD),
            weight_SD,
            bias_S,
            sizes,
            entropy_weight,
            whole_batch,
        )
    )


class HeadsFunction(torch.autograd.Function):
    """Loss [H] of linear heads: forward computes the gradients, backward only scales them.

    Inputs of every subclass: the two views' features, weight, bias, then constants.
    """

    @staticmethod
    def save_gradients(
        ctx: Any, gradients: HeadGradients, feature_dtype: torch.dtype, scale: Tensor | float = 1.0
    ) -> None:
        """Store what backward needs; `scale`: factor that backward applies to the gradients."""
        ctx.gradients = (gradients.dx, gradients.dweight, gradients.dbias)
        ctx.slices = gradients.slices
        ctx.feature_dtype = feature_dtype
        ctx.scale = scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_H: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of scan_heads_loss, scan_clusters_loss or temi_heads_loss can be "
                "computed only once; run forward again"
            )
        dx, dweight, dbias = ctx.gradients
        ctx.gradients = None
        grad = grad_H * ctx.scale
        # The factors are usually 1, and skipping them saves a pass over the gradient. On a GPU the
        # comparison would wait for the device, so they are always applied there.
        if grad.device.type != "cpu" or not bool((grad == 1).all()):
            for h, rows in enumerate(ctx.slices):
                dweight[rows].mul_(grad[h])
                dbias[rows].mul_(grad[h])
        # Gradient by the features: the weighted sum over heads
        dfirst = dsecond = None
        if dx is not None:
            dfirst, dsecond = torch.tensordot(grad, dx, 1).to(ctx.feature_dtype).chunk(2)
        num_constants = len(ctx.needs_input_grad) - 4
        return dfirst, dsecond, dweight, dbias, *[None] * num_constants


class ScanHeadsFunction(HeadsFunction):
    """(total, consistency, entropy) [H] of `scan_heads_loss`; total has the gradient."""

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd functions take their arguments one by one
        ctx: Any,
        anchors: Tensor,
        neighbours: Tensor,
        weight: Tensor,
        bias: Tensor,
        sizes: Sequence[int],
        entropy_weight: float,
        whole_batch: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(weight.device.type, enabled=False):
            whole_batch = whole_batch or current().world_size == 1
            x = FeaturePair(anchors, neighbours, weight.dtype, max(sizes))
            gradients = HeadGradients(x, weight, bias, sizes, any(ctx.needs_input_grad[:2]))
            # Losses and gradients, head by head
            if whole_batch and uses_cpu_loops(weight):
                from dist_scan.heads.cpu_loops import scan_heads_in_loops

                consistency, entropy = scan_heads_in_loops(
                    x, weight, bias, gradients, entropy_weight
                )
            else:
                consistency, entropy = scan_heads_by_group(
                    x, weight, bias, gradients, entropy_weight, whole_batch
                )
        HeadsFunction.save_gradients(ctx, gradients, anchors.dtype)
        ctx.mark_non_differentiable(consistency, entropy)
        return consistency - entropy_weight * entropy, consistency, entropy


def scan_heads_by_group(
    x: FeaturePair,
    weight: Tensor,
    bias: Tensor,
    gradients: HeadGradients,
    entropy_weight: float,
    whole_batch: bool,
) -> tuple[Tensor, Tensor]:
    """SCAN's (consistency [H], entropy [H]), group by group; fills `gradients`."""
    consistencies: list[Tensor] = []
    entropies: list[Tensor] = []
    for group in head_groups(gradients.sizes, one_by_one=whole_batch):
        # Forward: logits, and the mean probabilities of the global batch.
        heads = [make_head(x, weight[rows], bias[rows]) for _, rows in group]
        sums = [head.anchor_sum() for head in heads]
        means, count = mean_probabilities(sums, x.num_pairs, whole_batch)
        scale = (1 if whole_batch else current().world_size) / count
        # Backward: the logits become gradients, which are multiplied with the features.
        for (h, _), head, mean in zip(group, heads, means):
            entropy, entropy_gradient = entropy_and_gradient(mean, entropy_weight)
            consistencies.append(head.to_gradients_(entropy_gradient, scale) * scale)
            entropies.append(entropy)
            gradients.store(h, head.logits, head.dbias)
        # Free the memory of the logits for those of the next group.
        del heads, head
    return torch.stack(consistencies), torch.stack(entropies)


def head_groups(
    sizes: Sequence[int], one_by_one: bool = False
) -> Iterator[list[tuple[int, slice]]]:
    """Groups of (head, its rows in the weight) that share a message.

    A group has at most GROUP_COLUMNS columns; one head if one_by_one or if there is one rank.
    """
    max_columns = 0 if one_by_one or current().world_size == 1 else GROUP_COLUMNS
    group: list[tuple[int, slice]] = []
    for h, rows in enumerate(head_slices(sizes)):
        if group and rows.stop - group[0][1].start > max_columns:
            yield group
            group = []
        group.append((h, rows))
    yield group


def mean_probabilities(
    sums: Sequence[Tensor], num_rows: int, whole_batch: bool = False
) -> tuple[list[Tensor], Tensor]:
    """(mean probability [C] of each head over the global batch, number of its rows).

    From the sums [C] over this rank's num_rows rows; one message, and ranks may have different
    numbers of rows. whole_batch: the rows are those of the global batch, no message.
    """
    count = sums[0].new_full((1,), num_rows)
    if not whole_batch:
        count, *sums = all_sum(torch.cat([count, *sums])).split([1, *map(len, sums)])
    return [total / count for total in sums], count[0]


def uses_cpu_loops(weight: Tensor) -> bool:
    """True if heads of this weight run in compiled loops on the CPU."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def make_head(x: FeaturePair, weight: Tensor, bias: Tensor) -> Head:
    """One head's logits, in the fastest form for the weight's device and dtype."""
    # Imported here: numba takes a second, and Triton is not always installed.
    if uses_cpu_loops(weight):
        from dist_scan.heads.cpu_loops import LoopHead

        return LoopHead(x.logits(weight), bias, x.num_pairs, x.recompute_logits(weight, bias))
    if weight.dtype == torch.float32 and weight.device.type == "cuda" and HAS_TRITON:
        from dist_scan.heads.gpu_kernels import KernelHead

        return KernelHead(x.logits(weight, bias), x.num_pairs)
    return TorchHead(x.logits(weight, bias), x.num_pairs, x.recompute_logits(weight, bias))


# --- TEMI ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TemiObjective:
    """What TEMI's student heads are trained with."""

    teacher_log_p: Sequence[Tensor]
    """Per head: the teacher's log-probabilities [X, C], first views above second views."""
    marginals: Sequence[Tensor]
    """Per head: the running mean [C] of the teacher's probabilities."""
    beta: float
    temperature: float
    """Of the student's softmax."""


def temi_heads_loss(
    first_BD: Tensor,
    second_BD: Tensor,
    weight_SD: Tensor,
    bias_S: Tensor,
    sizes: Sequence[int],
    objective: TemiObjective,
) -> Tensor:
    """TEMI's loss [H] (`losses.temi_loss`) of linear heads on features, fused.

    Layout of the heads as in `scan_heads_loss`. All heads use the same pair weights
    (`losses.temi_pair_weights`). Memory: the teacher's probabilities of all heads, the student's of
    one. The gradient can be computed only once.
    """
    return TemiHeadsFunction.apply(
        at_least_fp32(first_BD), at_least_fp32(second_BD), weight_SD, bias_S, sizes, objective
    )


class TemiHeadsFunction(HeadsFunction):
    """Loss [H] of `temi_heads_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        weight: Tensor,
        bias: Tensor,
        sizes: Sequence[int],
        objective: TemiObjective,
    ) -> Tensor:
        b, beta, temperature = len(first), objective.beta, objective.temperature
        with torch.autocast(weight.device.type, enabled=False):
            x = FeaturePair(first, second, weight.dtype, max(sizes))
            gradients = HeadGradients(x, weight, bias, sizes, any(ctx.needs_input_grad[:2]))
            scale = current().world_size / all_sum(weight.new_full((), b))
            pair_weights = temi_pair_weights(objective.teacher_log_p)
            # Half the weight of a pair for each direction.
            row_weights = torch.cat([pair_weights, pair_weights])[:, None] / 2
            information: list[Tensor] = []
            for h, rows in enumerate(head_slices(sizes)):
                log_s = torch.log_softmax(x.logits(weight[rows], bias[rows]).div_(temperature), 1)
                # beta (log s + log t) - log marginal, with the teacher of the other view
                scores = objective.teacher_log_p[h].roll(b, 0).add_(log_s).mul_(beta)
                scores.sub_(objective.marginals[h].log())
                lse = torch.logsumexp(scores, 1, keepdim=True)
                information.append((row_weights * lse).sum())
                # Gradient by the logits: (s - softmax(scores)) beta / temperature
                softmax = scores.sub_(lse).exp_()
                dlogits = log_s.exp_().sub_(softmax)
                gradients.store(h, dlogits.mul_(row_weights * (scale * beta / temperature)))
        HeadsFunction.save_gradients(ctx, gradients, first.dtype)
        return -torch.stack(information) * scale
