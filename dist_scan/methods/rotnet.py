"""RotNet: tell by how many quarter turns an image was rotated (Gidaris, Singh and Komodakis, ICLR 2018; SCAN's Table 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.losses import classification_loss
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, Step
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm

TURNS = 4


class RotNetConfig(NetworkConfig):
    """There is nothing to choose but batch norm."""

    kind: Literal["rotnet"] = "rotnet"


class RotNetMethod(Method):
    """All four turns of every image are in the batch: 128 images are 512 inputs."""

    Config = RotNetConfig
    recipes = ("standard",)
    needs = ("images",)

    def __init__(self, config: RotNetConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.backbone = convert_batch_norm(inputs.backbone, config.bn_groups)
        self.head = nn.Linear(inputs.feature_dim, TURNS)

    def forward(self, batch: Batch) -> Step:
        images, turns = quarter_turns(batch.views[0])
        loss, accuracy = classification_loss(self.head(self.backbone(images)), turns)
        return Step(loss, {"rotation_accuracy": accuracy})

    def publish(self, out: Path) -> None:
        save_backbone(out, self.backbone, self.inputs.backbone_config)


def quarter_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """([4 b, 3, S, S], [4 b]): each image by 0, 90, 180, 270 degrees counter-clockwise, an image's turns side by side; and how many."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(TURNS)], 1).flatten(0, 1)
    return turned, torch.arange(TURNS, device=images.device).repeat(len(images))
