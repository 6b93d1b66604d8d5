"""SCAN's loss when the clusters of every head are split over the ranks.

All ranks have the whole batch, and a softmax is over the columns of all ranks. Per group of heads,
four messages are all-reduced: row maxima [G, 2b] and [G, b], then row sums [G, 3b] and [G, b + 1];
no gradient is sent. Shapes as in the package's docstring, with b pairs of the global batch, G
heads of a group and c clusters of a head on this rank. Every softmax subtracts its row's maximum:
nothing underflows, and no rank does more work than another because of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_scan.heads.autograd import HeadsFunction, head_groups
from dist_scan.heads.products import FeaturePair, HeadGradients, head_slices
from dist_scan.heads.torch_head import entropy_and_gradient
from dist_scan.losses import ScanTerms, at_least_fp32
from dist_scan.world.collectives import all_max, all_sum
from dist_scan.world.world import current


def scan_clusters_loss(
    anchors_BD: Tensor,
    neighbours_BD: Tensor,
    weight_sD: Tensor,
    bias_s: Tensor,
    sizes: Sequence[int],
    local_sizes: Sequence[int],
    entropy_weight: float,
) -> ScanTerms:
    """SCAN's loss (Eq. 2, `losses.scan_loss`) of linear heads whose clusters are split over ranks.

    Every rank passes the features of the whole global batch, and weight and bias of its
    local_sizes[h] of the sizes[h] clusters of every head, s = sum(local_sizes). Collective. The
    terms [H] are the same on all ranks; the gradient is that of the global loss by this rank's
    clusters, and can be computed only once.
    """
    anchors = at_least_fp32(anchors_BD)
    neighbours = at_least_fp32(neighbours_BD)
    return ScanTerms(
        *ScanClustersFunction.apply(
            anchors, neighbours, weight_sD, bias_s, sizes, local_sizes, entropy_weight
        )
    )


class ScanClustersFunction(HeadsFunction):
    """(total, consistency, entropy) [H] of `scan_clusters_loss`; total has the gradient."""

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd functions take their arguments one by one
        ctx: Any,
        anchors: Tensor,
        neighbours: Tensor,
        weight: Tensor,
        bias: Tensor,
        sizes: Sequence[int],
        local_sizes: Sequence[int],
        entropy_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if any(ctx.needs_input_grad[:2]):
            raise ValueError(
                "heads whose clusters are split over ranks train on fixed features only; "
                "partition the batch to train the network too"
            )
        with torch.autocast(weight.device.type, enabled=False):
            x = FeaturePair(anchors, neighbours, weight.dtype, max(local_sizes))
            gradients = HeadGradients(x, weight, bias, local_sizes, with_features=False)
            local = head_slices(local_sizes)
            # All ranks must send the same messages: groups follow the rank with the most clusters.
            most_clusters = [-(-c // current().world_size) for c in sizes]
            consistencies: list[Tensor] = []
            entropies: list[Tensor] = []
            for group in head_groups(most_clusters):
                logits = [x.logits(weight[local[h]], bias[local[h]]) for h, _ in group]
                consistency, entropy = clusters_to_gradients_(logits, entropy_weight)
                consistencies.append(consistency)
                entropies.append(entropy)
                for (h, _), dlogits in zip(group, logits):
                    gradients.store(h, dlogits)
        scale = weight.new_ones(()) / len(anchors)
        HeadsFunction.save_gradients(ctx, gradients, anchors.dtype, scale)
        consistency, entropy = torch.cat(consistencies), torch.cat(entropies)
        ctx.mark_non_differentiable(consistency, entropy)
        return consistency - entropy_weight * entropy, consistency, entropy


def clusters_to_gradients_(
    logits: Sequence[Tensor], entropy_weight: float
) -> tuple[Tensor, Tensor]:
    """Replace this rank's columns of the logits [2b, c] of G heads by b times their gradients.

    Returns (consistency [G], entropy [G]), the same on all ranks. Collective. The gradients are
    those of `torch_head`, whose names p, q and r are used here.
    """
    b = len(logits[0]) // 2
    # Softmax in place, step by step: `separate` becomes p and q, `joint` becomes r.
    # First the row maxima over all ranks: of the logits, then of the sums a + n.
    maxima = all_max(torch.stack([separate.amax(1) for separate in logits]))
    joints = []
    for separate, maximum in zip(logits, maxima):
        separate.sub_(maximum[:, None])
        joints.append(separate[:b] + separate[b:])
    joint_maxima = all_max(torch.stack([joint.amax(1) for joint in joints]))
    # Exponentials, and their row sums over all ranks
    for separate, joint, maximum in zip(logits, joints, joint_maxima):
        separate.exp_()
        joint.sub_(maximum[:, None]).exp_()
    row_sums = all_sum(
        torch.stack(
            [torch.cat([separate.sum(1), joint.sum(1)]) for separate, joint in zip(logits, joints)]
        )
    )
    # Probabilities p, q and r; the entropy and its gradient, of this rank's clusters
    entropy_gradients = []
    local_sums = []
    for p_and_q, r, row_sum in zip(logits, joints, row_sums):
        p_and_q.div_(row_sum[: 2 * b, None])
        r.div_(row_sum[2 * b :, None])
        p = p_and_q[:b]
        entropy, entropy_gradient = entropy_and_gradient(p.mean(0), entropy_weight)
        entropy_gradients.append(entropy_gradient)
        local_sums.append(torch.cat([torch.mv(p, entropy_gradient), entropy.view(1)]))
    # [G, b + 1]: <p, entropy gradient> of each anchor, and the entropy, over all ranks
    global_sums = all_sum(torch.stack(local_sums))
    # Gradients by the logits
    for p_and_q, r, entropy_gradient, sums in zip(logits, joints, entropy_gradients, global_sums):
        p_and_q[b:].sub_(r)
        p_and_q[:b].mul_(entropy_gradient - (sums[:b, None] - 1)).sub_(r)
    lse = row_sums.log()
    nll = lse[:, :b] + lse[:, b : 2 * b] - lse[:, 2 * b :] - joint_maxima
    return nll.mean(1), global_sums[:, b]
