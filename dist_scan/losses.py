"""Losses as pure functions, all in fp32 or better. Legend of shape suffixes: H heads, B rows of this rank, C clusters, D width, K queue,
S the clusters of all heads one after the other.

Every loss is this rank's: its mean over ranks is the global loss, and with DDP's mean over gradients its gradient is the global one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.world.collectives import all_mean, all_rows, all_sum
from dist_scan.world.world import current

MIN_PROBABILITY = 1e-8  # the released code clamps mean probabilities here before the logarithm


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
    """SCAN's loss (Van Gansbeke et al., ECCV 2020, Eq. 2) of logits.

    -log<p, q> is the log-sum-exp of log p + log q: nothing underflows. The entropy (nats) is that of the global batch's mean anchor.
    """
    log_p = at_least_fp32(anchors_HBC).log_softmax(2)
    log_q = at_least_fp32(neighbours_HBC).log_softmax(2)
    consistency = -torch.logsumexp(log_p + log_q, 2).mean(1)
    mean = all_mean(log_p.exp().mean(1)).clamp(min=MIN_PROBABILITY)
    entropy = -(mean * mean.log()).sum(1)
    return ScanTerms(consistency - entropy_weight * entropy, consistency.detach(), entropy.detach())


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
    mean = all_mean(p.mean(1)).clamp(min=MIN_PROBABILITY)
    entropy = -(mean * mean.log()).sum(1)
    return ScanTerms(consistency - entropy_weight * entropy, consistency.detach(), entropy.detach())


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
