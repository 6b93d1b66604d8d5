"""A backbone or features that exist already, in the place of a pretext or an embedding of our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import nn

from dist_scan.config.stage import Images, StageConfig
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.data.images import input_description
from dist_scan.models.backbone import BackboneConfig, build_backbone, save_backbone
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.import_weights import read_cluster_head
from dist_scan.models.layers import FeatureNorm
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import barrier


class GivenConfig(StageConfig):
    """Exactly one of `backbone` (with its checkpoint file) and `features` (a .npy, [N, D])."""

    kind: Literal["given"] = "given"
    backbone: BackboneConfig | None = None
    cluster_head: Literal["best"] | int | None = None
    """Also publish a cluster head of the backbone's checkpoint (files of SCAN's released code): best is the one the file names; or its
    number. The stage then serves as `model:` too (assign, selflabel)."""
    features: str | None = None
    images: Images | None = None
    """Which images the features are of; rows must be in their order."""
    num_shards: int = Field(default=16, ge=1)

    def publishes(self) -> tuple[str, ...]:
        return (
            ("features",)
            if self.features is not None
            else ("backbone",)
            if self.cluster_head is None
            else ("backbone", "model")
        )

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """One of the two, and the files exist."""
        if (self.backbone is None) == (self.features is None):
            raise ValueError(f"stages.{name}: give exactly one of backbone and features")
        if self.cluster_head is not None and (
            self.backbone is None or self.backbone.checkpoint is None
        ):
            raise ValueError(
                f"stages.{name}.cluster_head: {self.cluster_head!r}, but there is no backbone.checkpoint to take it from; give one, or remove it"
            )
        path = self.features or (self.backbone and self.backbone.checkpoint)
        if path and not Path(path).is_file():
            raise ValueError(
                f"stages.{name}: the file '{path}' does not exist; give the path of a .npy of features or of a checkpoint"
            )


class GivenStage(Stage):
    """Publishes what a pretext (backbone) or an embed stage (features) would."""

    Config = GivenConfig

    def run(self) -> None:
        """Rank 0 checks and converts."""
        if self.context.world.rank == 0:
            if self.config.backbone is not None:
                self._publish_network()
            else:
                from dist_scan.data.feature_table import FeatureTable

                FeatureTable.from_npy(
                    self.config.features, self.context.out, self.config.num_shards
                )
        barrier()

    def _publish_network(self) -> None:
        """The backbone, and with cluster_head the whole cluster model; SCAN's heads read the features as they are."""
        c, config = self.context, self.config.backbone
        backbone = build_backbone(config)
        save_backbone(c.out, backbone, config)
        if self.config.cluster_head is None:
            return
        found = read_cluster_head(
            config.checkpoint,
            None if self.config.cluster_head == "best" else self.config.cluster_head,
        )
        if found.weight.shape[1] != backbone.num_features:
            raise ValueError(
                f"stages.{c.name}: the head of '{config.checkpoint}' reads {found.weight.shape[1]} features, "
                f"{config.name} makes {backbone.num_features}; give the backbone that it was trained on"
            )
        head = nn.Linear(*found.weight.shape[::-1])
        head.load_state_dict({"weight": found.weight, "bias": found.bias})
        save_cluster_model(
            c.out,
            ClusterModel(backbone, FeatureNorm("none", backbone.num_features), head, config),
            best_head=found.number,
            input=input_description(RecipeConfig(name="center"), c.run),
            provenance={"file": Path(config.checkpoint).name, "stage": c.name},
        )
        c.log(f"{c.name}: head {found.number} of {found.num_heads}, {len(found.bias)} clusters")
