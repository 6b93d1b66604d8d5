"""Losses as short PyTorch functions: the reference to compare with the papers.

Training calls most of these functions directly. Losses of linear heads also exist in a fused form,
which computes the gradient in the forward pass and keeps one head's logits at a time:
`heads/autograd.py` (`scan_heads_loss`, `temi_heads_loss`) and `heads/split_clusters.py`
(`scan_clusters_loss`). The softmax over a sharded memory bank is `methods/nce.py`
(`instance_loss`). Tests compare each of them with this file.

All losses compute in float32 or better. The result is this rank's part: its mean over ranks is the
loss of the global batch, and with DDP's averaging of gradients its gradient is that of the global
batch.

Shape suffixes: B pairs or images of this rank, X = 2 B rows of both views, C clusters, D width of
a feature, H heads, K keys of a queue, N images of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.world.collectives import all_mean, all_rows, all_sum
from dist_scan.world.world import current

MIN_PROBABILITY = 1e-8
"""Mean probabilities are clamped here before the logarithm, as in SCAN's released code."""


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32 if it is bfloat16 or float16; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def on_unit_sphere(x_BD: Tensor) -> Tensor:
    """Rows of unit length, in float32 or better."""
    return F.normalize(at_least_fp32(x_BD), dim=1)


# --- contrastive learning --------------------------------------------------------------------


def info_nce(queries_BD: Tensor, keys_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """MoCo's InfoNCE loss (He et al., CVPR 2020, Eq. 1), mean over this rank's rows.

    -log softmax([q . k, q . queue] / T) at the positive key. Rows have unit length.
    """
    queries = at_least_fp32(queries_BD)
    keys = at_least_fp32(keys_BD).detach()
    positive_logits = (queries * keys).sum(1, keepdim=True)
    negative_logits = queries @ queue_KD.detach().to(queries.dtype).T
    logits = torch.cat([positive_logits, negative_logits], 1) / temperature
    positive = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, positive)


def nt_xent(
    first_BD: Tensor, second_BD: Tensor, temperature: float, symmetric: bool = False
) -> Tensor:
    """SimCLR's NT-Xent loss (Chen et al., ICML 2020, Eq. 1) over the views of the global batch.

    By default only first views are anchors, as in SCAN's released code. Each has 2 W B - 1
    candidates on W ranks. symmetric: the paper's loss, the mean over both views as anchors. Rows
    have unit length; every rank must hold the same number of rows.
    """
    first, second = at_least_fp32(first_BD), at_least_fp32(second_BD)
    all_first, all_second = all_rows(first), all_rows(second)
    loss = _nt_xent_of_anchors(first, all_first, all_second, temperature)
    if not symmetric:
        return loss
    return (loss + _nt_xent_of_anchors(second, all_second, all_first, temperature)) / 2


def _nt_xent_of_anchors(
    anchors: Tensor, same_view: Tensor, other_view: Tensor, temperature: float
) -> Tensor:
    """Loss of this rank's anchors of one view; same_view and other_view are rows of all ranks."""
    rows = torch.arange(len(anchors), device=anchors.device)
    global_rows = current().rank * len(anchors) + rows
    logits = anchors @ torch.cat([same_view, other_view]).T / temperature
    is_itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, global_rows[:, None], True)
    positive = global_rows + len(same_view)
    return F.cross_entropy(logits.masked_fill(is_itself, -torch.inf), positive)


def instance_discrimination_loss(
    projections_BD: Tensor, index_B: Tensor, memory_ND: Tensor, temperature: float
) -> Tensor:
    """Non-parametric softmax (Wu et al., CVPR 2018, Eq. 2): each image is a class of its own.

    -log softmax(memory . z / T) at the image's row of the memory, mean over this rank's rows. Rows
    have unit length.
    """
    logits = at_least_fp32(projections_BD) @ memory_ND.T / temperature
    return F.cross_entropy(logits, index_B)


# --- classification with targets that a method computes --------------------------------------


class ClassificationLoss(NamedTuple):
    """loss: mean cross-entropy. accuracy: share of rows whose largest logit is the target."""

    loss: Tensor
    accuracy: Tensor


def classification_loss(logits_BC: Tensor, targets_B: Tensor) -> ClassificationLoss:
    """Cross-entropy to targets [B] int64 that are known without labels.

    RotNet (Gidaris et al., ICLR 2018, Sec. 2.1) and MMDC's rotation epochs: the rotation of each
    image. DeepCluster (Caron et al., ECCV 2018, Eq. 1): the k-means cluster of each image.
    """
    logits = at_least_fp32(logits_BC)
    accuracy = (logits.detach().argmax(1) == targets_B).double().mean()
    return ClassificationLoss(F.cross_entropy(logits, targets_B), accuracy)


def mmdc_loss(outputs_BD: Tensor, targets_BD: Tensor) -> Tensor:
    """MMDC's loss (Shiran and Weinshall, ICPR 2020, Eq. 1) of unit outputs and their codes.

    As in the released code: the squared distance divided by D, mean over rows. The paper's Eq. 1
    has the distance.
    """
    return F.mse_loss(outputs_BD, targets_BD)


# --- clustering with linear heads ------------------------------------------------------------


class ScanTerms(NamedTuple):
    """Per head [H]: total = consistency - entropy_weight * entropy. Only `total` has a gradient."""

    total: Tensor
    consistency: Tensor
    entropy: Tensor


def scan_loss(anchors_HBC: Tensor, neighbours_HBC: Tensor, entropy_weight: float) -> ScanTerms:
    """SCAN's loss (Van Gansbeke et al., ECCV 2020, Eq. 2) of logits, with one neighbour per anchor.

    -log<p, q> is computed as a log-sum-exp of log p + log q, so that it does not underflow. The
    entropy (nats) is that of the mean prediction over the anchors of the global batch. Every rank
    must hold the same number of rows.
    """
    log_p = at_least_fp32(anchors_HBC).log_softmax(2)
    log_q = at_least_fp32(neighbours_HBC).log_softmax(2)
    consistency = -torch.logsumexp(log_p + log_q, 2).mean(1)
    return _scan_terms(consistency, log_p.exp(), entropy_weight)


def scan_loss_released(
    anchors_HBC: Tensor, neighbours_HBC: Tensor, entropy_weight: float
) -> ScanTerms:
    """SCAN's loss (Eq. 2) as in its released code: softmax, dot product, binary cross-entropy.

    For comparison: the logarithm is clamped at -100, and where the dot product underflows the
    gradient vanishes, just where a pair disagrees most.
    """
    p = at_least_fp32(anchors_HBC).softmax(2)
    q = at_least_fp32(neighbours_HBC).softmax(2)
    similarity = (p * q).sum(2).clamp(max=1)
    log_loss = F.binary_cross_entropy(similarity, torch.ones_like(similarity), reduction="none")
    return _scan_terms(log_loss.mean(1), p, entropy_weight)


def _scan_terms(consistency_H: Tensor, p_HBC: Tensor, entropy_weight: float) -> ScanTerms:
    mean = all_mean(p_HBC.mean(1)).clamp(min=MIN_PROBABILITY)
    entropy = -(mean * mean.log()).sum(1)
    total = consistency_H - entropy_weight * entropy
    return ScanTerms(total, consistency_H.detach(), entropy.detach())


def temi_pair_weights(teacher_log_p: Sequence[Tensor]) -> Tensor:
    """TEMI's weight [B] of each pair (Adaloglou et al., BMVC 2023, Sec. 3).

    The mean over heads of <teacher of one view, teacher of the other>, from log-probabilities [X,
    C] per head, first views before second views. Pairs that the teachers assign to different
    clusters (wrong neighbours) weigh little.
    """
    agreements = []
    for log_p_XC in teacher_log_p:
        first, second = log_p_XC.exp().chunk(2)
        agreements.append((first * second).sum(1))
    return torch.stack(agreements).mean(0)


def temi_loss(
    student_log_p_XC: Tensor,
    teacher_log_p_XC: Tensor,
    marginal_C: Tensor,
    pair_weights_B: Tensor,
    beta: float,
) -> Tensor:
    """TEMI's loss of one head (Adaloglou et al., BMVC 2023, Sec. 3), a scalar.

    -w log sum_c (student_c(x) teacher_c(x'))^beta / marginal_c, mean over pairs (x, x') and both
    directions. Rows are first views before second views; w as in `temi_pair_weights`; marginal:
    the running mean of the teacher's probabilities. Every rank must hold the same number of pairs.
    """
    teacher_of_other_view = teacher_log_p_XC.roll(len(pair_weights_B), 0)
    scores = beta * (student_log_p_XC + teacher_of_other_view) - marginal_C.log()
    pointwise_information = torch.logsumexp(scores, 1)
    return -(pair_weights_B.repeat(2) * pointwise_information).mean()


# --- self-labelling --------------------------------------------------------------------------


class ConfidentLoss(NamedTuple):
    """Loss of the confident images and their numbers.

    loss: part of the graph even if it is 0. num_confident: confident rows of the global batch.
    pseudo_labels [B] and mask [B]: of this rank's rows. per_cluster [C]: confident rows of the
    global batch per cluster.
    """

    loss: Tensor
    num_confident: Tensor
    pseudo_labels: Tensor
    mask: Tensor
    per_cluster: Tensor


def confident_cross_entropy(
    strong_BC: Tensor, weak_BC: Tensor, threshold: float, class_balance: bool
) -> ConfidentLoss:
    """Self-labelling loss (SCAN paper, Sec. 2.3) of logits of strong and weak views.

    Cross-entropy of the strong view to the weak view's argmax, for rows whose weak probability is
    strictly above the threshold; counted over the global batch. class_balance: every cluster
    present has the same total weight. Without a confident row on any rank, the loss is 0.
    """
    strong = at_least_fp32(strong_BC)
    probability, labels = at_least_fp32(weak_BC.detach()).softmax(1).max(1)
    mask = probability > threshold
    per_cluster = all_sum(torch.bincount(labels[mask], minlength=strong.shape[1]).to(strong.dtype))
    if class_balance:
        num_present = (per_cluster > 0).sum().clamp(min=1)
        weights = (1 / (per_cluster.clamp(min=1) * num_present))[labels]
    else:
        weights = 1 / per_cluster.sum().clamp(min=1).expand(len(labels))
    row_losses = F.cross_entropy(strong, labels, reduction="none")
    # The weights are for the global batch, so the sum over ranks is the loss; DDP averages.
    loss = current().world_size * (row_losses * weights * mask).sum()
    return ConfidentLoss(loss, per_cluster.sum(), labels, mask, per_cluster)
