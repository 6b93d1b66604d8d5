"""A backbone or features that already exist, instead of those of a train or embed stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import nn

from dist_scan.config.stage import Images, StageConfig, Stages
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.images import input_description
from dist_scan.models.backbone import BackboneConfig, build_backbone, save_backbone
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.import_weights import read_cluster_head
from dist_scan.models.layers import FeatureNorm
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import on_rank_0


class PretrainedConfig(StageConfig):
    """Exactly one of `backbone` (with its checkpoint) and `features` (a .npy file, [N, D])."""

    kind: Literal["pretrained"] = "pretrained"
    backbone: BackboneConfig | None = None
    cluster_head: Literal["best"] | int | None = None
    """Also publish this cluster head of the backbone's checkpoint, a file of SCAN's released code.

    A number selects a head; `best` selects the head that the file names as the best. Other stages
    (assign, selflabel) can then refer to this one as their `model:`.
    """
    features: str | None = None
    images: Images | None = None
    """The images whose features these are, in the same order."""
    num_shards: int = Field(default=16, ge=1)

    def publishes(self) -> tuple[str, ...]:
        """Features, or a backbone and perhaps a cluster model."""
        if self.features is not None:
            return ("features",)
        return ("backbone",) if self.cluster_head is None else ("backbone", "model")

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless exactly one of the two is given and its file exists."""
        if (self.backbone is None) == (self.features is None):
            raise ValueError(f"stages.{name}: give exactly one of backbone and features")
        checkpoint = None if self.backbone is None else self.backbone.checkpoint
        if self.cluster_head is not None and checkpoint is None:
            raise ValueError(
                f"stages.{name}.cluster_head: {self.cluster_head!r}, but there is no "
                "backbone.checkpoint with heads; give one, or remove cluster_head"
            )
        path = self.features or checkpoint
        if path and not Path(path).is_file():
            raise ValueError(
                f"stages.{name}: the file '{path}' does not exist; give the path of a .npy file of "
                "features or of a checkpoint"
            )


class PretrainedStage(Stage[PretrainedConfig]):
    """Publishes a backbone like a train stage, or features like an embed stage."""

    Config = PretrainedConfig

    def run(self) -> None:
        """Rank 0 checks and converts the files."""
        on_rank_0(self._publish)

    def _publish(self) -> None:
        context, config = self.context, self.config
        if config.features is not None:
            FeatureTable.from_npy(config.features, context.out, config.num_shards)
        else:
            assert config.backbone is not None
            backbone = build_backbone(config.backbone)
            save_backbone(context.out, backbone, config.backbone)
            if config.cluster_head is not None:
                self._publish_cluster_model(backbone, config.backbone)

    def _publish_cluster_model(self, backbone: nn.Module, config: BackboneConfig) -> None:
        """The backbone with a cluster head of its checkpoint; SCAN's heads read raw features."""
        context, number = self.context, self.config.cluster_head
        assert config.checkpoint is not None
        found = read_cluster_head(config.checkpoint, None if number == "best" else number)
        num_clusters, dim = found.weight.shape
        if dim != backbone.num_features:
            raise ValueError(
                f"stages.{context.name}: the head of '{config.checkpoint}' has {dim} inputs, but "
                f"{config.name} has {backbone.num_features} features; give the backbone that it "
                "was trained on"
            )
        head = nn.Linear(dim, num_clusters)
        head.load_state_dict({"weight": found.weight, "bias": found.bias})
        save_cluster_model(
            context.out,
            ClusterModel(backbone, FeatureNorm("none", dim), head, config),
            best_head=found.number,
            input=input_description(RecipeConfig(name="center"), context.run),
            provenance={"file": Path(config.checkpoint).name, "stage": context.name},
        )
        context.log(
            f"{context.name}: head {found.number} of {found.num_heads}, {num_clusters} clusters"
        )
