"""Selection of heads and epochs by held-out rows, and the heads that a stage publishes.

No label is used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.heads.consensus import consensus, stability
from dist_scan.heads.linear import ClusterHeads
from dist_scan.heads.products import head_slices
from dist_scan.losses import MIN_PROBABILITY
from dist_scan.search.matching import match_clusters
from dist_scan.storage.atomic import write_json
from dist_scan.storage.tensors import load_tensors, save_tensors
from dist_scan.world.collectives import all_max, all_sum, gather_rows

MAX_LOGIT = 1e5
"""float32 resolves 0.008 here: a softmax of such logits is noise."""

MAX_CLUSTER_SHARE = 0.95
"""Heads have collapsed if, in every head, one cluster's mean probability is larger than this."""

PATIENCE = 3
"""Consecutive epochs with collapsed heads after which training stops. In the first epochs heads may
collapse and recover."""

REMEDY = (
    "Lower the optimizer's lr (it depends on the scale of the features: divide by 10), set "
    "method.normalise: standardise (l2 on images), or raise method.entropy_weight (scan)"
)


class HeadSelection(nn.Module):
    """For each number of clusters, the head with the lowest held-out loss of all epochs.

    Heads with the same number of clusters form a group. When a group improves, all its heads are
    stored as they are. The state is in buffers, so that a resumed run selects the same heads:

    - best_loss, best_head, best_epoch: one entry per group
    - losses [H], stability [H]: held-out loss and stability of each head at the best epoch
    - alignment [S]: the selected head's cluster that corresponds to each cluster; -1 if unknown
      (no held-out rows)
    - collapsed: number of epochs in a row in which all heads were collapsed
    - best_weight [S, D], best_bias [S]: the heads at the best epoch; if they are partitioned, only
      this rank's rows until `gather`
    """

    best_loss: Tensor
    best_head: Tensor
    best_epoch: Tensor
    losses: Tensor
    stability: Tensor
    alignment: Tensor
    collapsed: Tensor
    best_weight: Tensor
    best_bias: Tensor

    def __init__(self, heads: ClusterHeads) -> None:
        super().__init__()
        self.cluster_counts = tuple(dict.fromkeys(heads.sizes))
        self.sizes = heads.sizes
        self.row_sharding = heads.row_sharding
        num_groups, num_heads = len(self.cluster_counts), len(heads.sizes)
        first_heads = torch.tensor([heads.sizes.index(c) for c in self.cluster_counts])
        self.register_buffer("best_loss", torch.full((num_groups,), math.inf, dtype=torch.float64))
        self.register_buffer("best_head", first_heads)
        self.register_buffer("best_epoch", torch.full((num_groups,), -1))
        self.register_buffer("losses", torch.full((num_heads,), math.nan, dtype=torch.float64))
        self.register_buffer("stability", torch.full((num_heads,), math.nan, dtype=torch.float64))
        self.register_buffer("alignment", torch.full((sum(heads.sizes),), -1))
        self.register_buffer("collapsed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best_weight", heads.weight.detach().clone())
        self.register_buffer("best_bias", heads.bias.detach().clone())

    def heads_of_group(self, group: int) -> list[int]:
        """Heads with this group's number of clusters."""
        return [h for h, c in enumerate(self.sizes) if c == self.cluster_counts[group]]

    @torch.no_grad()
    def check_health(self, heads: ClusterHeads, features_BD: Tensor) -> dict[str, float]:
        """Raise ValueError, with the remedy, if the heads have diverged or collapsed. Collective.

        Diverged: a logit is above MAX_LOGIT. Collapsed: for PATIENCE epochs in a row, every head
        has put almost all images into one cluster; the buffer `collapsed` counts them. Returns what
        to log: the largest logit, and the largest mean probability of a cluster, which is that of
        the head where it is smallest.
        """
        # Largest logit, and the largest cluster of every head, over the global batch
        device = features_BD.device
        largest = torch.zeros((), device=device)
        shares = []
        num_rows = all_sum(torch.tensor(float(len(features_BD)), device=device)).clamp(min=1)
        for h in range(len(heads.sizes)):
            logits = heads.head_logits(h, features_BD).float()
            largest = torch.cat([largest.view(1), logits.abs().flatten()]).amax()
            shares.append(float((all_sum(logits.softmax(1).sum(0)) / num_rows).max()))
        largest_logit = float(all_max(largest))
        share = min(shares)
        # "not <=" is also true for NaN.
        if not largest_logit <= MAX_LOGIT:
            raise ValueError(
                f"the heads diverged: the largest logit is {largest_logit:.3g} "
                f"(allowed: {MAX_LOGIT:.0e}). {REMEDY}"
            )
        # Heads may collapse for an epoch or two and recover.
        if share > MAX_CLUSTER_SHARE:
            self.collapsed += 1
        else:
            self.collapsed.zero_()
        if self.collapsed >= PATIENCE:
            raise ValueError(
                f"the heads collapsed: for {PATIENCE} epochs, one cluster of every head has taken "
                f"at least {share:.0%} of the images. {REMEDY}"
            )
        return {"largest_logit": largest_logit, "largest_cluster": share}

    @torch.no_grad()
    def keep_newest(self, epoch: int, heads: ClusterHeads) -> None:
        """Without held-out rows: store the newest heads; the first of each group is selected."""
        self.best_epoch.fill_(epoch)
        self.best_loss.fill_(math.nan)
        self.best_weight.copy_(heads.weight)
        self.best_bias.copy_(heads.bias)

    @torch.no_grad()
    def update(
        self, epoch: int, heads: ClusterHeads, rows_mD: Tensor, neighbours_AK: np.ndarray
    ) -> tuple[dict[str, float], bool]:
        """Store the heads of every group whose lowest held-out loss has improved. Collective.

        rows [m, D]: features of this rank's m of the M held-out rows. neighbours [A, K]:
        positions among the M rows, as in `HeldOut`. Memory: one head's logits [M, C] in float64.

        Returns (what to log, whether the first group improved). Raises ValueError if every loss is
        NaN.
        """
        # Held-out loss and assignment of every head, on all ranks
        neighbours = torch.from_numpy(neighbours_AK).to(rows_mD.device).long()
        losses = []
        assignments = []
        for h in range(len(self.sizes)):
            logits = gather_rows(heads.head_logits(h, rows_mD).contiguous())
            losses.append(held_out_loss(logits, neighbours))
            assignments.append(logits[: len(neighbours)].argmax(1).cpu().numpy())
        losses_H = torch.stack(losses).nan_to_num(nan=math.inf)
        if not torch.isfinite(losses_H).any():
            raise ValueError(
                f"epoch {epoch + 1}: the held-out loss of every head is NaN, so none can be "
                f"selected ({len(neighbours)} held-out images). Check the held-out features for "
                "NaN, or hold out more images (held_out_share)"
            )
        # Every group selects its own head and epoch.
        improved = [
            self._update_group(group, epoch, heads, losses_H, assignments)
            for group in range(len(self.cluster_counts))
        ]
        first_group = self.heads_of_group(0)
        first_losses = losses_H[first_group]
        metrics = {
            "held_out_loss": float(first_losses.min()),
            "held_out_mean": float(first_losses.mean()),
            "best_head": float(first_losses.argmin()),
            "best_loss": float(self.best_loss[0]),
            "stability": float(self.stability[first_group].mean()),
        }
        return metrics, improved[0]

    def _update_group(
        self,
        group: int,
        epoch: int,
        heads: ClusterHeads,
        losses_H: Tensor,
        assignments: list[np.ndarray],
    ) -> bool:
        """Store the heads of a group if its lowest loss has improved; True if it has."""
        members, num_clusters = self.heads_of_group(group), self.cluster_counts[group]
        best = members[int(losses_H[members].argmin())]
        if not losses_H[best] < self.best_loss[group]:
            return False
        self.best_loss[group] = losses_H[best]
        self.best_head[group] = best
        self.best_epoch[group] = epoch
        # Heads of the group: loss, agreement with the others, match with the best, weights
        stabilities = stability([assignments[h] for h in members], num_clusters)
        for h, value in zip(members, stabilities):
            self.losses[h] = losses_H[h]
            self.stability[h] = value
            mapping = match_clusters(assignments[best], assignments[h], num_clusters)
            self.alignment[heads.slices[h]] = torch.from_numpy(mapping).to(self.alignment.device)
            local = heads.local_slices[h]
            self.best_weight[local] = heads.weight[local]
            self.best_bias[local] = heads.bias[local]
        return True

    @torch.no_grad()
    def gather(self) -> None:
        """Collect the stored heads of all ranks in rank 0's host memory, to publish. Collective."""
        if self.row_sharding is None:
            return
        weight = self.row_sharding.gather(self.best_weight)
        bias = self.row_sharding.gather(self.best_bias)
        if weight is not None and bias is not None:
            self.best_weight = weight
            self.best_bias = bias

    def selected_head(self, group: int = 0) -> nn.Linear:
        """The selected head of a group, with its weights of the best epoch."""
        rows = head_slices(self.sizes)[int(self.best_head[group])]
        weight, bias = self.best_weight[rows], self.best_bias[rows]
        num_clusters, dim = weight.shape
        head = nn.Linear(dim, num_clusters, dtype=weight.dtype, device=weight.device)
        head.load_state_dict({"weight": weight, "bias": bias})
        return head

    def publish(self, out: Path) -> None:
        """Write heads.safetensors (weight, bias, alignment of all heads) and heads.json."""
        save_tensors(
            out / "heads.safetensors",
            {"weight": self.best_weight, "bias": self.best_bias, "alignment": self.alignment},
        )
        selected = self.best_head.tolist()
        rows = [
            {
                "head": h,
                "num_clusters": c,
                "held_out_loss": number_or_none(self.losses[h]),
                "stability": number_or_none(self.stability[h]),
                "selected": h in selected,
            }
            for h, c in enumerate(self.sizes)
        ]
        table = {
            "best_head": selected[0],
            "best_epoch": int(self.best_epoch[0]),
            "best_loss": number_or_none(self.best_loss[0]),
            "sizes": list(self.sizes),
            "selected": selected,
            "heads": rows,
        }
        write_json(out / "heads.json", table)


class PublishedHeads:
    """All heads in a folder that `HeadSelection.publish` has written."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        table = json.loads((folder / "heads.json").read_text())
        tensors = load_tensors(folder / "heads.safetensors")
        self.folder = folder
        self.sizes = tuple(table["sizes"])
        self.selected = tuple(table["selected"])
        """The selected head of each number of clusters."""
        self.weight = tensors["weight"].to(device).split(self.sizes)
        self.bias = tensors["bias"].to(device).split(self.sizes)
        self.alignment = tensors["alignment"].to(device).split(self.sizes)

    def logits(self, head: int, features: Tensor) -> Tensor:
        """Normalised features [B, D] -> [B, sizes[head]]."""
        weight, bias = self.weight[head], self.bias[head]
        return nn.functional.linear(features.to(weight.dtype), weight, bias)

    def consensus(self, num_clusters: int, features: Tensor) -> Tensor:
        """Mean probability [B, num_clusters] of all heads with this number of clusters.

        In the clusters of the selected one.
        """
        members = [h for h, c in enumerate(self.sizes) if c == num_clusters]
        if not members:
            raise ValueError(
                f"num_clusters: no head has {num_clusters}; "
                f"allowed: {', '.join(map(str, dict.fromkeys(self.sizes)))}"
            )
        if any((self.alignment[h] < 0).any() for h in members):
            raise ValueError(
                f"{self.folder}: heads that were not selected by held-out rows are not aligned, so "
                "they have no consensus; give the heads stage held_out_share (or "
                "held_out_neighbours), or use an `assign` stage, which takes the selected head"
            )
        logits = [self.logits(h, features) for h in members]
        return consensus(logits, [self.alignment[h] for h in members])


def held_out_loss(logits_MC: Tensor, neighbours_AK: Tensor) -> Tensor:
    """SCAN's loss (Eq. 2) of held-out rows with entropy weight 1, as the released code selects.

    Rows 0..A-1 are the anchors. The released code also pairs every anchor with itself, because its
    tables of neighbours contain it; here the mean is over neighbours alone, as in the paper's Eq.
    2.
    """
    log_p = logits_MC.double().log_softmax(1)
    anchors = log_p[: len(neighbours_AK)]
    # One neighbour at a time: a matrix of anchors by anchors would not fit in memory.
    total = sum(-torch.logsumexp(anchors + log_p[column], 1).mean() for column in neighbours_AK.T)
    mean = anchors.exp().mean(0).clamp(min=MIN_PROBABILITY)
    return total / neighbours_AK.shape[1] + (mean * mean.log()).sum()


def number_or_none(x: Tensor) -> float | None:
    """For JSON: NaN and infinity are None."""
    return float(x) if torch.isfinite(x) else None
