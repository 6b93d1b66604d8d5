"""SCAN's head step where every head's clusters are dealt over the ranks: all ranks have the whole batch, a softmax is over all ranks' columns.

Legend as in head_step; b rows of the batch, G heads of a group, c this rank's clusters of a head. Said per group: row maxima [G, 2b] and
[G, b], row sums [G, 3b] and [G, b + 1]; no gradient. Written with log-sum-exp throughout: nothing underflows, and no rank does
more than another because of the numbers it meets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_scan.heads.autograd import HeadsFunction, groups
from dist_scan.heads.products import FeaturePair, HeadGradients, head_slices
from dist_scan.heads.torch_head import entropy_and_gradient
from dist_scan.losses import ScanTerms, at_least_fp32
from dist_scan.world.collectives import all_max, all_sum
from dist_scan.world.world import current


def over_clusters_(logits: Sequence[Tensor], entropy_weight: float) -> tuple[Tensor, Tensor]:
    """This rank's columns of the logits [2b, c] of some heads become, in place, b times their gradients by them.
    Returns (consistency [G], entropy [G]), the same on all ranks. Collective."""
    b = len(logits[0]) // 2
    top = all_max(torch.stack([each.amax(1) for each in logits]))
    both = []
    for each, most in zip(logits, top):
        each.sub_(most[:, None])
        both.append(each[:b] + each[b:])
    both_top = all_max(torch.stack([r.amax(1) for r in both]))
    for each, r, most in zip(logits, both, both_top):
        each.exp_()
        r.sub_(most[:, None]).exp_()
    sums = all_sum(
        torch.stack([torch.cat([each.sum(1), r.sum(1)]) for each, r in zip(logits, both)])
    )
    entropy_gradients, sent = [], []
    for each, r, total in zip(logits, both, sums):
        each.div_(total[: 2 * b, None])
        r.div_(total[2 * b :, None])
        entropy, entropy_gradient = entropy_and_gradient(each[:b].mean(0), entropy_weight)
        entropy_gradients.append(entropy_gradient)
        sent.append(torch.cat([torch.mv(each[:b], entropy_gradient), entropy.view(1)]))
    heard = all_sum(torch.stack(sent))
    for each, r, entropy_gradient, own in zip(logits, both, entropy_gradients, heard):
        each[b:].sub_(r)
        each[:b].mul_(entropy_gradient - (own[:b, None] - 1)).sub_(r)
    lse = sums.log()
    return (lse[:, :b] + lse[:, b : 2 * b] - lse[:, 2 * b :] - both_top).mean(1), heard[:, b]


class ScanClustersFunction(HeadsFunction):
    """On features that need no gradient: weight and bias hold own_sizes[h] of the sizes[h] clusters of head h."""

    @staticmethod
    def forward(ctx, anchors, neighbours, weight, bias, sizes, local_sizes, entropy_weight):
        if any(ctx.needs_input_grad[:2]):
            raise ValueError(
                "heads whose clusters are dealt over ranks train on fixed features; share the batch to train the network too"
            )
        with torch.autocast(weight.device.type, enabled=False):
            x, own = (
                FeaturePair(
                    anchors, neighbours, weight.dtype, apart=max(local_sizes) <= len(anchors)
                ),
                head_slices(local_sizes),
            )
            back, consistency, entropy = HeadGradients(x, weight, bias, local_sizes, False), [], []
            for group in groups(
                [-(-c // current().world_size) for c in sizes]
            ):  # by what the fullest rank has: all send the same messages
                logits = [x.logits(weight[own[h]], bias[own[h]]) for h, _ in group]
                values = over_clusters_(logits, entropy_weight)
                for (h, _), each in zip(group, logits):
                    back.store(h, each)
                consistency.append(values[0])
                entropy.append(values[1])
        HeadsFunction.keep(ctx, local_sizes, back, weight.new_ones(()) / len(anchors))
        consistency, entropy = torch.cat(consistency), torch.cat(entropy)
        ctx.mark_non_differentiable(consistency, entropy)
        return consistency - entropy_weight * entropy, consistency, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        _, dweight, dbias = HeadsFunction.handed_on(ctx, grad)
        return None, None, dweight, dbias, None, None, None


def scan_clusters_loss(
    anchors_BD: Tensor,
    neighbours_BD: Tensor,
    weight_sD: Tensor,
    bias_s: Tensor,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    entropy_weight: float,
) -> ScanTerms:
    """`scan_heads_loss` on the whole global batch where each rank holds own_sizes[h] of the sizes[h] clusters of every head, s = sum(own_sizes).

    Collective. The terms [H] are the same on all ranks; the gradient is that of the global loss by this rank's clusters.
    """
    anchors, neighbours = at_least_fp32(anchors_BD), at_least_fp32(neighbours_BD)
    return ScanTerms(
        *ScanClustersFunction.apply(
            anchors, neighbours, weight_sD, bias_s, tuple(sizes), tuple(local_sizes), entropy_weight
        )
    )
