"""SimCLR: two views of an image against all other views of the global batch.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020:
Sec. 2.1 and Eq. 1 (NT-Xent loss).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from dist_scan.data.batch import Batch
from dist_scan.losses import nt_xent, on_unit_sphere
from dist_scan.methods.base import MethodInputs, NetworkConfig, NetworkMethod, StepResult
from dist_scan.models.layers import Projector


class SimCLRConfig(NetworkConfig):
    """The defaults are SCAN's pretext task; ``symmetric: true`` is the SimCLR paper's loss."""

    kind: Literal["simclr"] = "simclr"
    temperature: float = Field(default=0.1, gt=0)
    projection_dim: int = Field(default=128, ge=1)
    symmetric: bool = False
    """Use both views as anchors (SimCLR, Eq. 1); false: only the first, as in SCAN's released
    code."""


class SimCLRMethod(NetworkMethod):
    """Both views pass through the network together, so batch norm sees both."""

    Config = SimCLRConfig
    recipes = ("simclr", "simclr")
    config: SimCLRConfig
    projector: Projector

    def __init__(self, config: SimCLRConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.projector = Projector(inputs.feature_dim, config.projection_dim)

    def forward(self, batch: Batch) -> StepResult:
        # Interleave the views: rows 2i and 2i + 1 show image i.
        images = torch.stack(batch.views, 1).flatten(0, 1)
        # Project onto the unit sphere.
        z = on_unit_sphere(self.projector(self.backbone(images)))
        # Eq. 1: the positive of a view is the other view of its image.
        first, second = z[0::2], z[1::2]
        return StepResult(nt_xent(first, second, self.config.temperature, self.config.symmetric))
