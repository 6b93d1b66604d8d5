"""RotNet: predict by how many quarter turns an image was rotated.

Gidaris, Singh and Komodakis, Unsupervised Representation Learning by Predicting Image Rotations,
ICLR 2018: Sec. 2.1, Eq. 2 and 3 (loss over four rotations). A pretext task in SCAN, Table 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.losses import classification_loss
from dist_scan.methods.base import MethodInputs, NetworkConfig, NetworkMethod, StepResult

NUM_ROTATIONS = 4


class RotNetConfig(NetworkConfig):
    """No settings besides batch norm."""

    kind: Literal["rotnet"] = "rotnet"


class RotNetMethod(NetworkMethod):
    """The batch holds all four rotations of every image: 128 images are 512 network inputs."""

    Config = RotNetConfig
    recipes = ("standard",)

    def __init__(self, config: RotNetConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.head = nn.Linear(inputs.feature_dim, NUM_ROTATIONS)

    def forward(self, batch: Batch) -> StepResult:
        # Rotate every image four times.
        images, rotation = rotate_by_quarter_turns(batch.views[0])
        # Classify the rotation (Eq. 3).
        loss, accuracy = classification_loss(self.head(self.backbone(images)), rotation)
        return StepResult(loss, {"rotation_accuracy": accuracy})


def rotate_by_quarter_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [b, 3, S, S] rotated by 0, 90, 180 and 270 degrees counter-clockwise.

    Returns the images [4b, 3, S, S], the rotations of an image next to one another, and the number
    of quarter turns [4b] of each.
    """
    rotated = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(NUM_ROTATIONS)], 1)
    turns = torch.arange(NUM_ROTATIONS, device=images.device).repeat(len(images))
    return rotated.flatten(0, 1), turns
