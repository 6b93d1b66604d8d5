"""Losses as pure functions, all in fp32 or better. Legend of shape suffixes: H heads, B rows of this rank, C clusters, D width, K queue,
S the clusters of all heads one after the other.

Every loss is this rank's: its mean over ranks is the global loss, and with DDP's mean over gradients its gradient is the global one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.heads.autograd import SMALLEST, ScanHeadsFunction, ScanLossFunction, TemiHeadsFunction
from dist_scan.heads.split_clusters import ScanClustersFunction
from dist_scan.world.collectives import all_mean, all_rows, all_sum
from dist_scan.world.world import current


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def info_nce(queries_BD: Tensor, keys_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """MoCo's loss (He et al., CVPR 2020, Eq. 1): -log softmax([q.k, q.queue] / T) at the own key, mean over rows. Rows are unit length."""
    queries, keys = at_least_fp32(queries_BD), at_least_fp32(keys_BD).detach()
    own = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([own, queries @ queue_KD.detach().to(queries.dtype).T], 1) / temperature
    return F.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    )


def nt_xent(
    first_BD: Tensor, second_BD: Tensor, temperature: float, symmetric: bool = False
) -> Tensor:
    """SimCLR's loss (Chen et al., ICML 2020, Eq. 1) among the views of the whole global batch; rows are unit length.

    One-sided, as SCAN's released code has it: only first views are anchors, each against the 2B-1 others. `symmetric`: the
    paper's, the mean over both views as anchors.
    """
    first, second = at_least_fp32(first_BD), at_least_fp32(second_BD)
    all_first, all_second = all_rows(first), all_rows(second)
    loss = _one_side(first, all_first, all_second, temperature)
    return (loss + _one_side(second, all_second, all_first, temperature)) / 2 if symmetric else loss


def _one_side(anchors: Tensor, same: Tensor, other: Tensor, temperature: float) -> Tensor:
    rows = torch.arange(len(anchors), device=anchors.device)
    own = current().rank * len(anchors) + rows
    logits = anchors @ torch.cat([same, other]).T / temperature
    mask = torch.zeros_like(logits, dtype=torch.bool).index_put_(
        (rows, own), torch.tensor(True, device=logits.device)
    )
    return F.cross_entropy(logits.masked_fill(mask, -torch.inf), own + len(same))


class ScanTerms(NamedTuple):
    """Per head [H]: total = consistency - entropy_weight * entropy. Only `total` carries a gradient."""

    total: Tensor
    consistency: Tensor
    entropy: Tensor


def scan_loss(anchors_HBC: Tensor, neighbours_HBC: Tensor, entropy_weight: float) -> ScanTerms:
    """SCAN's loss (Van Gansbeke et al., ECCV 2020, Eq. 2), of logits, with the entropy (nats) of the global batch's mean anchor.

    -log<p, q> = LSE(a) + LSE(n) - LSE(a + n): no underflow, and a gradient that is bounded at any logit size, where the published
    softmax + BCE form loses it (`scan_loss_released`). The gradient is written by hand. Ranks may hold different numbers of rows.
    """
    return ScanTerms(
        *ScanLossFunction.apply(at_least_fp32(anchors_HBC), at_least_fp32(neighbours_HBC), entropy_weight)
    )


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


def scan_clusters_loss(
    anchors_BD: Tensor,
    neighbours_BD: Tensor,
    weight_sD: Tensor,
    bias_s: Tensor,
    sizes: Sequence[int],
    own_sizes: Sequence[int],
    entropy_weight: float,
) -> ScanTerms:
    """`scan_heads_loss` on the whole global batch where each rank holds own_sizes[h] of the sizes[h] clusters of every head, s = sum(own_sizes).

    Collective. The terms [H] are the same on all ranks; the gradient is that of the global loss by this rank's clusters.
    """
    anchors, neighbours = at_least_fp32(anchors_BD), at_least_fp32(neighbours_BD)
    return ScanTerms(
        *ScanClustersFunction.apply(
            anchors, neighbours, weight_sD, bias_s, tuple(sizes), tuple(own_sizes), entropy_weight
        )
    )


def scan_loss_released(
    anchors_HBC: Tensor, neighbours_HBC: Tensor, entropy_weight: float
) -> ScanTerms:
    """The released code's form: softmax, dot product, binary cross-entropy (its logarithm clamped at -100). For comparisons:
    where the dot product underflows its gradient vanishes, just where the pair disagrees most."""
    p, q = at_least_fp32(anchors_HBC).softmax(2), at_least_fp32(neighbours_HBC).softmax(2)
    similarity = (p * q).sum(2)
    consistency = F.binary_cross_entropy(
        similarity.clamp(max=1), torch.ones_like(similarity), reduction="none"
    ).mean(1)
    mean = all_mean(p.mean(1)).clamp(min=SMALLEST)
    entropy = -(mean * mean.log()).sum(1)
    return ScanTerms(consistency - entropy_weight * entropy, consistency.detach(), entropy.detach())


def pair_weights(teacher_log_p: Sequence[Tensor]) -> Tensor:
    """TEMI's weight [B] of each pair: the mean over heads of <teacher of one view, teacher of the other>; log-probabilities [2B, C],
    first views above second ones. Pairs that the teachers put into different clusters (wrong neighbours) weigh little."""
    halves = (
        (each.exp()[: len(each) // 2], each.exp()[len(each) // 2 :]) for each in teacher_log_p
    )
    return torch.stack([(p * q).sum(1) for p, q in halves]).mean(0)


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

    -w * log sum_c (student_c(x) teacher_c(x'))^beta / marginal_c, mean over pairs and both directions; w as `pair_weights` gives it, the
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
        pair_weights(teacher_log_p),
        beta,
        temperature,
    )


class Confident(NamedTuple):
    """loss: this rank's, connected to the graph even when 0. count: confident rows of the global batch. pseudo_labels [B] and
    mask [B]: this rank's. per_class [C]: confident rows per cluster, global."""

    loss: Tensor
    count: Tensor
    pseudo_labels: Tensor
    mask: Tensor
    per_class: Tensor


def confident_cross_entropy(
    strong_BC: Tensor, weak_BC: Tensor, threshold: float, class_balance: bool
) -> Confident:
    """Self-labelling (SCAN paper, Sec. 2.3): cross-entropy of the strong view's logits to the weak view's argmax, where its
    probability is above the threshold (strictly). Counts are of the global batch; class_balance gives every cluster that is
    present the same total weight. With no confident row anywhere loss and count are 0.
    """
    strong = at_least_fp32(strong_BC)
    probability, labels = at_least_fp32(weak_BC.detach()).softmax(1).max(1)
    mask = probability > threshold
    per_class = all_sum(torch.bincount(labels[mask], minlength=strong.shape[1]).to(strong.dtype))
    if class_balance:
        share = 1 / (per_class.clamp(min=1) * (per_class > 0).sum().clamp(min=1))
        weights = share[labels]
    else:
        weights = 1 / per_class.sum().clamp(min=1).expand(len(labels))
    each = F.cross_entropy(strong, labels, reduction="none")
    loss = current().world_size * (each * weights * mask).sum()
    return Confident(loss, per_class.sum(), labels, mask, per_class)
