"""A backbone or features that exist already, in the place of a pretext or an embedding of our own."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Mapping

from pydantic import Field

from dist_scan.config import RunConfig
from dist_scan.models.backbone import BackboneConfig, build_backbone, save_backbone
from dist_scan.stages.base import Images, Stage, StageConfig
from dist_scan.world.collectives import barrier


class GivenConfig(StageConfig):
    """Exactly one of `backbone` (with its checkpoint file) and `features` (a .npy, [N, D])."""

    kind: Literal["given"] = "given"
    backbone: BackboneConfig | None = None
    features: str | None = None
    images: Images | None = None
    """Which images the features are of; rows must be in their order."""
    num_shards: int = Field(default=16, ge=1)

    def check(self, name: str, run: RunConfig, earlier: Mapping[str, Any]) -> None:
        """One of the two, and the files exist."""
        if (self.backbone is None) == (self.features is None):
            raise ValueError(f"stages.{name}: give exactly one of backbone and features")
        path = self.features or (self.backbone and self.backbone.checkpoint)
        if path and not Path(path).is_file():
            raise ValueError(f"stages.{name}: the file '{path}' does not exist; give the path of a .npy of features or of a checkpoint")


class GivenStage(Stage):
    """Publishes what a pretext (backbone) or an embed stage (features) would."""

    Config = GivenConfig

    def run(self) -> None:
        """Rank 0 checks and converts."""
        if self.context.world.rank == 0:
            if self.config.backbone is not None:
                save_backbone(self.context.out, build_backbone(self.config.backbone), self.config.backbone)
            else:
                from dist_scan.data.tables import FeatureTable

                FeatureTable.from_npy(self.config.features, self.context.out, self.config.num_shards)
        barrier()
