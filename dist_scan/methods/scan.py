"""SCAN: an image and its neighbour in the same cluster, all clusters in use (Van Gansbeke et al., ECCV 2020)."""
from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_scan.artefacts import write_json
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.losses import SMALLEST, scan_loss
from dist_scan.methods.base import Given, Method, MethodConfig, Step
from dist_scan.models.backbone import save_tensors
from dist_scan.models.cluster import ClusterModel, save_cluster_model
from dist_scan.models.layers import ClusterHeads, FeatureNorm, Normalise, check_groups, convert_batch_norm
from dist_scan.world.collectives import gather_rows


class ScanConfig(MethodConfig):
    """The draw of neighbours (and the released code's self_as_candidate) is a setting of the train stage."""

    kind: Literal["scan"] = "scan"
    num_clusters: int = Field(ge=2)
    num_heads: int = Field(default=1, ge=1)
    entropy_weight: float = Field(default=5.0, ge=0)
    """For training; heads and epochs are chosen with weight 1, as released."""
    normalise: Normalise = "standardise"
    """Of the features. A learning rate belongs to their scale: 30 on raw ResNet-50 features is not 30 on standardised ones."""
    train_backbone: bool = True
    """On images: train the network too (small sets), or only the heads, the network in eval mode (ImageNet)."""
    bn_groups: int = Field(default=1, ge=1)

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Batch norm's groups, the ranks and the batch must fit."""
        check_groups(self.bn_groups, world_size, global_batch)


class Scan(Method):
    """H heads at once; the head and epoch with the lowest held-out loss is published, the last epoch's first head without rows."""

    Config = ScanConfig
    recipes = ("simclr", "simclr")
    wants_neighbour = True

    def __init__(self, config: ScanConfig, given: Given):
        super().__init__(config, given)
        if given.feature_dim < 1:
            raise ValueError("scan needs features of a known width: give a backbone, or a feature table")
        self.trained = config.train_backbone and not given.on_features
        self.norm = FeatureNorm(config.normalise, given.feature_dim, given.moments)
        if config.normalise == "standardise" and given.moments is None:
            raise ValueError("normalise: 'standardise' needs the moments of a feature table; allowed on images: none, l2")
        self.heads = ClusterHeads(given.feature_dim, config.num_clusters, config.num_heads)
        self.backbone = None if given.on_features else given.backbone.requires_grad_(self.trained)
        if self.trained:
            convert_batch_norm(self.backbone, config.bn_groups)
        self.register_buffer("best_loss", torch.tensor(float("inf"), dtype=torch.float64))
        self.register_buffer("best_head", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best_epoch", torch.tensor(-1))
        self.register_buffer("head_losses", torch.full((config.num_heads,), float("nan"), dtype=torch.float64))
        for name, tensor in self._live().items():
            self.register_buffer(_best(name), tensor.detach().clone())

    def _live(self) -> dict[str, Tensor]:
        """What the best epoch keeps: the heads, and a network in training."""
        network = self.backbone.state_dict() if self.trained else {}
        return {**{f"heads.{k}": v for k, v in self.heads.state_dict().items()}, **{f"backbone.{k}": v for k, v in network.items()}}

    def train(self, mode: bool = True) -> "Scan":
        super().train(mode)
        if self.backbone is not None and not self.trained:
            self.backbone.eval()
        return self

    def _logits(self, view: Tensor) -> Tensor:
        if self.backbone is not None:
            with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
                view = self.backbone(view)
        return self.heads(self.norm(view))

    def forward(self, batch: Batch) -> Step:
        terms = scan_loss(self._logits(batch.views[0]), self._logits(batch.views[-1]), self.config.entropy_weight)
        return Step(terms.total.sum(), {"total": terms.total.detach().mean(), "consistency": terms.consistency.mean(), "entropy": terms.entropy.mean()})

    @torch.no_grad()
    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        if held_out is None:
            self._keep(epoch, 0, float("nan"))
            return {}
        losses = self._held_out_losses(held_out)
        self.head_losses.copy_(losses)
        ranked = losses.nan_to_num(nan=float("inf"))
        head = int(ranked.argmin())
        if ranked[head] < self.best_loss:
            self._keep(epoch, head, float(ranked[head]))
        return {"held_out_loss": float(ranked[head]), "held_out_mean": float(losses.mean()), "best_head": float(head),
                "best_loss": float(self.best_loss)}

    def _held_out_losses(self, held_out: HeldOut) -> Tensor:
        """Per head: consistency of the anchors with their neighbours minus the entropy of the mean anchor, weight 1. By gathering:
        no matrix of anchors by anchors. Memory M * C per head."""
        mine = [self._logits(b.views[0].to(self.heads.weight.device)) for b in held_out.batches()]
        shape = (self.config.num_heads, 0, self.config.num_clusters)
        logits = torch.cat(mine, 1) if mine else self.heads.weight.new_zeros(shape)
        neighbours = torch.from_numpy(held_out.neighbours).to(logits.device).long()
        return torch.stack([held_out_loss(gather_rows(rows.contiguous()), neighbours) for rows in logits])

    def _keep(self, epoch: int, head: int, loss: float) -> None:
        self.best_loss.fill_(loss)
        self.best_head.fill_(head)
        self.best_epoch.fill_(epoch)
        for name, tensor in self._live().items():
            getattr(self, _best(name)).copy_(tensor)

    def publish(self, out: Path) -> None:
        kept = {name: getattr(self, _best(name)) for name in self._live()}
        head, number = nn.Linear(self.given.feature_dim, self.config.num_clusters), int(self.best_head)
        head.load_state_dict({k: kept[f"heads.{k}"][number].cpu() for k in ("weight", "bias")})
        backbone = self.given.backbone
        if self.trained:
            backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in kept.items() if k.startswith("backbone.")})
        chosen = ClusterModel(backbone, self.norm, head.to(self.heads.weight.device), self.given.backbone_config)
        save_cluster_model(out, chosen, best_head=number, best_epoch=int(self.best_epoch), held_out_loss=_number(self.best_loss))
        save_tensors(out / "heads.safetensors", {k: kept[f"heads.{k}"] for k in ("weight", "bias")})
        losses = [_number(x) for x in self.head_losses]
        write_json(out / "heads.json", {"best_head": number, "best_epoch": int(self.best_epoch), "best_loss": _number(self.best_loss),
                                        "heads": [{"head": h, "held_out_loss": x, "chosen": h == number} for h, x in enumerate(losses)]})


def held_out_loss(logits_MC: Tensor, neighbours_AK: Tensor) -> Tensor:
    """SCAN's loss of held-out rows with entropy weight 1 (the released code's choice of head and epoch); rows 0..A-1 are anchors."""
    log_p = logits_MC.double().log_softmax(1)
    anchors = log_p[:len(neighbours_AK)]
    total = sum(-torch.logsumexp(anchors + log_p[column], 1).mean() for column in neighbours_AK.T)
    mean = anchors.exp().mean(0).clamp(min=SMALLEST)
    return total / neighbours_AK.shape[1] + (mean * mean.log()).sum()


def _best(name: str) -> str:
    return "best_" + name.replace(".", "__")


def _number(x: Tensor) -> float | None:
    return float(x) if torch.isfinite(x) else None
