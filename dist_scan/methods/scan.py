"""SCAN: an image and its neighbour in the same cluster, all clusters in use (Van Gansbeke et al., ECCV 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch, HeldOut
from dist_scan.heads.autograd import scan_heads_loss
from dist_scan.heads.features import BestNetwork, HeadFeatures, publish_heads, select_epoch
from dist_scan.heads.linear import ClusterHeads, NumClusters, head_sizes
from dist_scan.heads.selection import HeadSelection
from dist_scan.heads.split_clusters import scan_clusters_loss
from dist_scan.losses import ScanTerms
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, Step
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.layers import Normalise
from dist_scan.world.world import current

SHARDED = ("heads.weight", "heads.bias", "choice.kept_weight", "choice.kept_bias")


class ScanConfig(NetworkConfig):
    """The draw of neighbours (and the released code's self_as_candidate) is a setting of the train stage."""

    kind: Literal["scan"] = "scan"
    num_clusters: NumClusters
    """One number, or several ([500, 1000, 2000]): num_heads heads of each; the first is what later stages get by default."""
    num_heads: int = Field(default=1, ge=1)
    entropy_weight: float = Field(default=5.0, ge=0)
    """For training; heads and epochs are chosen with weight 1, as released."""
    normalise: Normalise = "standardise"
    """Of the features. A learning rate belongs to their scale: 30 on raw ResNet-50 features is not 30 on standardised ones."""
    train_backbone: bool = True
    """On images: train the network too (small sets), or only the heads, the network in eval mode (ImageNet)."""

    def partitionable_heads(self) -> tuple[int, ...]:
        """Heads, and the clusters of a head, are independent of one another."""
        return head_sizes(self.num_clusters, self.num_heads)


class ScanMethod(Method):
    """H heads at once; per number of clusters the head and epoch with the lowest held-out loss is published, without held-out rows
    the last epoch's first head."""

    Config = ScanConfig
    recipes = ("simclr", "simclr")
    publishes = ("model",)
    uses_neighbours = True

    def __init__(self, config: ScanConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        trained = config.train_backbone and not inputs.on_features
        if trained and not isinstance(config.num_clusters, int):
            raise ValueError(
                f"num_clusters: {list(config.num_clusters)} on a trained network, of which each number would choose another epoch; "
                "give one number, or train_backbone: false"
            )
        backbone = None if inputs.on_features else inputs.backbone
        self.features = HeadFeatures(
            backbone,
            inputs.feature_dim,
            config.normalise,
            inputs.feature_mean,
            inputs.feature_std,
            trained,
        )
        self.heads = ClusterHeads(
            inputs.feature_dim, config.num_clusters, config.num_heads, inputs.head_partition
        )
        if trained:
            convert_batch_norm(backbone, config.bn_groups)
        self.choice = HeadSelection(self.heads)
        self.best = BestNetwork(backbone) if trained else None
        if self.heads.row_sharding is not None:
            self.sharded_state = dict.fromkeys(SHARDED, self.heads.row_sharding)
        self._last = None  # features of the last step, for the check after the epoch: nothing is remembered over epochs

    def forward(self, batch: Batch) -> Step:
        anchors, neighbours = self.features.pair(batch.views[0], batch.views[-1])
        world, share = current(), self.heads.partition
        self._last = (
            anchors.detach()
            if share == "batch"
            else anchors.detach().tensor_split(world.world_size)[world.rank]
        )
        terms = self._terms(anchors, neighbours)
        mine, times = (
            terms.total.sum(),
            world.world_size if share == "heads" else 1,
        )  # other ranks have other heads: their mean is to be the sum
        told = {
            name: value.detach().sum() * times / len(self.heads.sizes)
            for name, value in terms._asdict().items()
        }
        return Step(mine + (times - 1) * mine.detach(), told)

    def _terms(self, anchors_BD: Tensor, neighbours_BD: Tensor) -> ScanTerms:
        """Of this rank's part: of the batch, of the heads, or of their clusters."""
        heads, weight = self.heads, self.config.entropy_weight
        if heads.partition == "clusters":
            return scan_clusters_loss(
                anchors_BD,
                neighbours_BD,
                heads.weight,
                heads.bias,
                heads.sizes,
                heads.local_sizes,
                weight,
            )
        held = [c for c in heads.local_sizes if c]
        return scan_heads_loss(
            anchors_BD,
            neighbours_BD,
            heads.weight,
            heads.bias,
            held,
            weight,
            whole_batch=heads.partition == "heads",
        )

    @torch.no_grad()
    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        values, better = select_epoch(
            epoch, self.heads, self.choice, self.features, held_out, self._last
        )
        if better and self.best is not None:
            self.best.save(self.features.backbone)
        self._last = None
        return values

    def prepare_publish(self) -> None:
        self.choice.gather()

    def publish(self, out: Path) -> None:
        if self.best is not None:
            self.best.restore(self.features.backbone)
        publish_heads(
            out, self.choice, self.features, self.inputs.backbone, self.inputs.backbone_config
        )
