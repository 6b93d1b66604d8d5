"""Choosing among heads and epochs by held-out rows, and what is kept of the choice. No label is
read.
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
from dist_scan.losses import MIN_PROBABILITY
from dist_scan.models.backbone import load_tensors, save_tensors
from dist_scan.search.matching import match_clusters
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import all_max, all_sum, gather_rows

LARGEST_LOGIT = 1e5  # float32 then resolves 0.008: a softmax of such logits is noise
LARGEST_SHARE = 0.95  # of the mean probability, in one cluster of every head
PATIENCE = 3  # epochs in a row: heads may pass through such a state in their first steps
OUT = (
    "Lower the optimizer's lr (it belongs to the features' scale: divide by 10), set method.normalise: standardise (l2 on images), "
    "or raise method.entropy_weight (scan)"
)


class HeadSelection(nn.Module):
    """For each number of clusters: the head with the lowest held-out loss of all epochs, and all
    heads as they were then.

    Buffers, so that a resumed run chooses as an undisturbed one: kept_weight [S, D] and kept_bias
    [S]; losses [H] of the epoch kept; stability [H]; alignment [S]: the chosen head's cluster that
    each cluster is (-1: not known, no held-out rows); collapsed: epochs in a row in which every
    head had one cluster for all. Of heads dealt over ranks, kept_weight and kept_bias are this
    rank's rows until `collect`.
    """

    def __init__(self, heads: ClusterHeads) -> None:
        super().__init__()
        self.numbers = tuple(dict.fromkeys(heads.sizes))
        self.sizes, self.row_sharding = heads.sizes, heads.row_sharding
        groups, count = len(self.numbers), len(heads.sizes)
        self.register_buffer("best_loss", torch.full((groups,), math.inf, dtype=torch.float64))
        self.register_buffer(
            "best_head", torch.tensor([heads.sizes.index(c) for c in self.numbers])
        )
        self.register_buffer("best_epoch", torch.full((groups,), -1))
        self.register_buffer("losses", torch.full((count,), math.nan, dtype=torch.float64))
        self.register_buffer("stability", torch.full((count,), math.nan, dtype=torch.float64))
        self.register_buffer("alignment", torch.full((sum(heads.sizes),), -1))
        self.register_buffer("collapsed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("kept_weight", heads.weight.detach().clone())
        self.register_buffer("kept_bias", heads.bias.detach().clone())

    def heads_of_group(self, group: int) -> list[int]:
        """Heads with this group's number of clusters."""
        return [h for h, c in enumerate(self.sizes) if c == self.numbers[group]]

    @torch.no_grad()
    def check_divergence(self, heads: ClusterHeads, features_BD: Tensor) -> dict[str, float]:
        """After an epoch: the largest logit, and the largest cluster's share of the mean
        probability in the head where it is smallest. Collective. Raises ValueError, with the way
        out, when logits are beyond float32, or for the PATIENCE-th epoch in a row every head has
        put everything into one cluster.
        """
        size, shares = torch.zeros((), device=features_BD.device), []
        rows = all_sum(torch.tensor(float(len(features_BD)), device=features_BD.device)).clamp(
            min=1
        )
        for h in range(len(heads.sizes)):
            logits = heads.head_logits(h, features_BD).float()
            size = torch.cat([size.view(1), logits.abs().flatten()]).amax()
            shares.append(float((all_sum(logits.softmax(1).sum(0)) / rows).max()))
        largest, share = float(all_max(size)), min(shares)
        if not largest <= LARGEST_LOGIT:
            raise ValueError(
                f"the heads diverged: the largest logit is {largest:.3g} (allowed: {LARGEST_LOGIT:.0e}). {OUT}"
            )
        self.collapsed.copy_(self.collapsed + 1 if share > LARGEST_SHARE else 0 * self.collapsed)
        if self.collapsed >= PATIENCE:
            raise ValueError(
                f"the heads collapsed: for {PATIENCE} epochs one cluster of every head has taken at least {share:.0%} of the images. {OUT}"
            )
        return {"largest_logit": largest, "largest_cluster": share}

    @torch.no_grad()
    def keep_newest(self, epoch: int, heads: ClusterHeads) -> None:
        """Without held-out rows: the newest epoch, and of each number of clusters its first
        head.
        """
        self.best_epoch.fill_(epoch)
        self.best_loss.fill_(math.nan)
        self.kept_weight.copy_(heads.weight)
        self.kept_bias.copy_(heads.bias)

    @torch.no_grad()
    def update(
        self, epoch: int, heads: ClusterHeads, rows_MD: Tensor, neighbours_AK: np.ndarray
    ) -> tuple[dict[str, float], bool]:
        """(what to log, whether the first number of clusters improved). Raises ValueError when no
        loss is a number. Collective: rows [m, D] are this rank's part of the M held-out rows,
        their features as the heads see them. Memory: one head's logits [M, C] in float64.
        """
        neighbours = torch.from_numpy(neighbours_AK).to(rows_MD.device).long()
        losses, assigned = [], []
        for h in range(len(self.sizes)):
            logits = gather_rows(heads.head_logits(h, rows_MD).contiguous())
            losses.append(held_out_loss(logits, neighbours))
            assigned.append(logits[: len(neighbours)].argmax(1).cpu().numpy())
        now = torch.stack(losses).nan_to_num(nan=math.inf)
        if not torch.isfinite(now).any():
            raise ValueError(
                f"epoch {epoch + 1}: no head's held-out loss is a number ({len(neighbours)} held-out images): there is nothing to choose by. "
                "Look at the held-out features (a NaN among them?), or hold out more (held_out_share)"
            )
        improved = [
            self._update_group(g, epoch, heads, now, assigned) for g in range(len(self.numbers))
        ]
        first = now[self.heads_of_group(0)]
        return {
            "held_out_loss": float(first.min()),
            "held_out_mean": float(first.mean()),
            "best_head": float(first.argmin()),
            "best_loss": float(self.best_loss[0]),
            "stability": float(self.stability[self.heads_of_group(0)].mean()),
        }, improved[0]

    def _update_group(
        self, group: int, epoch: int, heads: ClusterHeads, now: Tensor, assigned: list[np.ndarray]
    ) -> bool:
        members, number = self.heads_of_group(group), self.numbers[group]
        best = members[int(now[members].argmin())]
        if not now[best] < self.best_loss[group]:
            return False
        self.best_loss[group], self.best_head[group], self.best_epoch[group] = (
            now[best],
            best,
            epoch,
        )
        alike = stability([assigned[h] for h in members], number)
        for h, value in zip(members, alike):
            at = heads.local_rows(h)
            self.losses[h], self.stability[h] = now[h], value
            self.alignment[heads.rows(h)] = torch.from_numpy(
                match_clusters(assigned[best], assigned[h], number)
            ).to(self.alignment.device)
            self.kept_weight[at], self.kept_bias[at] = heads.weight[at], heads.bias[at]
        return True

    @torch.no_grad()
    def gather(self) -> None:
        """Before publishing (collective): rank 0 has all kept heads, in its host memory."""
        if self.row_sharding is None:
            return
        weight, bias = (
            self.row_sharding.gather(self.kept_weight),
            self.row_sharding.gather(self.kept_bias),
        )
        if weight is not None and bias is not None:
            self.kept_weight, self.kept_bias = weight, bias

    def selected_head(self, group: int = 0) -> nn.Linear:
        """The chosen head of a number of clusters."""
        start = sum(self.sizes[: int(self.best_head[group])])
        at = slice(start, start + self.numbers[group])
        head = nn.Linear(
            self.kept_weight.shape[1],
            self.numbers[group],
            dtype=self.kept_weight.dtype,
            device=self.kept_weight.device,
        )
        head.load_state_dict({"weight": self.kept_weight[at], "bias": self.kept_bias[at]})
        return head

    def publish(self, out: Path) -> None:
        """heads.safetensors (weight, bias, alignment of all heads) and heads.json (the table)."""
        save_tensors(
            out / "heads.safetensors",
            {"weight": self.kept_weight, "bias": self.kept_bias, "alignment": self.alignment},
        )
        chosen = self.best_head.tolist()
        rows = [
            {
                "head": h,
                "num_clusters": c,
                "held_out_loss": number_or_none(self.losses[h]),
                "stability": number_or_none(self.stability[h]),
                "chosen": h in chosen,
            }
            for h, c in enumerate(self.sizes)
        ]
        write_json(
            out / "heads.json",
            {
                "best_head": chosen[0],
                "best_epoch": int(self.best_epoch[0]),
                "best_loss": number_or_none(self.best_loss[0]),
                "sizes": list(self.sizes),
                "chosen": chosen,
                "heads": rows,
            },
        )


class PublishedHeads:
    """All heads that a stage published, on features as the heads see them."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        facts, tensors = (
            json.loads((folder / "heads.json").read_text()),
            load_tensors(folder / "heads.safetensors"),
        )
        self.folder, self.sizes, self.chosen = folder, tuple(facts["sizes"]), tuple(facts["chosen"])
        weight, bias, alignment = (
            tensors[k].to(device).split(self.sizes) for k in ("weight", "bias", "alignment")
        )
        self.weight, self.bias, self.alignment = weight, bias, alignment

    @classmethod
    def exist_in(cls, folder: Path) -> bool:
        """Whether a folder holds heads (a self-labelled model has none)."""
        return (folder / "heads.json").is_file()

    def logits(self, head: int, features: Tensor) -> Tensor:
        """Features [B, D] -> [B, sizes[head]]."""
        return nn.functional.linear(
            features.to(self.weight[head].dtype), self.weight[head], self.bias[head]
        )

    def consensus(self, num_clusters: int, features: Tensor) -> Tensor:
        """The mean probability [B, num_clusters] of all heads with so many clusters, in the
        clusters of the chosen one.
        """
        members = [h for h, c in enumerate(self.sizes) if c == num_clusters]
        if not members:
            raise ValueError(
                f"num_clusters: no head has {num_clusters}; there are: {', '.join(map(str, dict.fromkeys(self.sizes)))}"
            )
        if any((self.alignment[h] < 0).any() for h in members):
            raise ValueError(
                f"{self.folder}: heads that were not chosen by held-out rows are not aligned, so they have no consensus; give the heads "
                "stage held_out_share (or held_out_neighbours), or assign with head: chosen"
            )
        return consensus(
            [self.logits(h, features) for h in members], [self.alignment[h] for h in members]
        )


def held_out_loss(logits_MC: Tensor, neighbours_AK: Tensor) -> Tensor:
    """SCAN's loss of held-out rows with entropy weight 1 (the released code's choice of head and
    epoch); rows 0..A-1 are anchors.

    The released code also pairs every anchor with itself, because its neighbour files hold the row
    first; mined tables here never do, so this is the mean over neighbours alone (the paper's Eq.
    2). By gathering: no matrix of anchors by anchors."""
    log_p = logits_MC.double().log_softmax(1)
    anchors = log_p[: len(neighbours_AK)]
    total = sum(-torch.logsumexp(anchors + log_p[column], 1).mean() for column in neighbours_AK.T)
    mean = anchors.exp().mean(0).clamp(min=MIN_PROBABILITY)
    return total / neighbours_AK.shape[1] + (mean * mean.log()).sum()


def number_or_none(x: Tensor) -> float | None:
    """For JSON: NaN and infinity are None."""
    return float(x) if torch.isfinite(x) else None
