"""SimCLR: two views of an image against all other views of the global batch (Chen et al., ICML 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from dist_scan.data.batch import Batch
from dist_scan.losses import at_least_fp32, nt_xent
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, Step
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.layers import Projector


class SimCLRConfig(NetworkConfig):
    """Defaults rebuild SCAN's pretext; `symmetric: true` is the SimCLR paper's loss."""

    kind: Literal["simclr"] = "simclr"
    temperature: float = Field(default=0.1, gt=0)
    projection_dim: int = Field(default=128, ge=1)
    symmetric: bool = False
    """Both views are anchors (paper); false: only the first (as SCAN's code was released)."""


class SimCLRMethod(Method):
    """Both views go through the network in one pass, interleaved, so batch norm sees them together."""

    Config = SimCLRConfig
    recipes = ("simclr", "simclr")
    needs = ("images",)

    def __init__(self, config: SimCLRConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.backbone = convert_batch_norm(inputs.backbone, config.bn_groups)
        self.projector = Projector(inputs.feature_dim, config.projection_dim)

    def forward(self, batch: Batch) -> Step:
        images = torch.stack(batch.views, 1).flatten(0, 1)
        z = F.normalize(at_least_fp32(self.projector(self.backbone(images))), dim=1)
        return Step(nt_xent(z[0::2], z[1::2], self.config.temperature, self.config.symmetric))

    def publish(self, out: Path) -> None:
        save_backbone(out, self.backbone, self.inputs.backbone_config, self.projector)
