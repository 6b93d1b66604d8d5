"""MoCo v1 and v2: a query against the key of the other view and a queue of older keys.

He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020: Sec. 3.1
and Eq. 1 (loss), Eq. 2 (key encoder), Sec. 3.3 (shuffled batch norm), Alg. 1 (order of a step).
Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020: the defaults (v2).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.losses import info_nce, on_unit_sphere
from dist_scan.methods.base import MethodInputs, NetworkConfig, NetworkMethod, StepResult
from dist_scan.models.layers import MomentumCopy, Projector
from dist_scan.models.memory_bank import Queue, check_queue
from dist_scan.world.collectives import all_rows
from dist_scan.world.world import current


class MoCoConfig(NetworkConfig):
    """The defaults are MoCo v2. For v1: temperature 0.07, mlp false, recipes moco_v1."""

    kind: Literal["moco"] = "moco"
    temperature: float = Field(default=0.2, gt=0)
    key_momentum: float = Field(default=0.999, ge=0, lt=1)
    """Momentum m of the key encoder (MoCo, Eq. 2)."""
    queue_size: int = Field(default=65536, ge=1)
    """Number of keys in the queue, a multiple of global_batch."""
    projection_dim: int = Field(default=128, ge=1)
    mlp: bool = True
    """Project by two layers (v2); false: by one (v1)."""
    symmetric: bool = False
    """Use each view as query and as key, as in the CIFAR demo of MoCo; the paper has one
    direction."""
    bn_groups: int = Field(default=8, ge=1)
    """Number of parts of the global batch that batch norm normalises separately. Keys are shuffled
    over the parts, or the network could tell which rows were normalised together. With one part
    the shuffle has no effect, which costs accuracy (4 points on CIFAR-10)."""

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Raise ValueError unless the queue holds whole batches and the groups divide."""
        super().check_batch(global_batch, world_size)
        check_queue(self.queue_size, 2 * global_batch if self.symmetric else global_batch)


class MoCoMethod(NetworkMethod):
    """The queue and the key encoder are buffers, equal on all ranks."""

    Config = MoCoConfig
    recipes = ("moco_v2", "moco_v2")
    config: MoCoConfig
    projector: Projector

    def __init__(self, config: MoCoConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.projector = Projector(inputs.feature_dim, config.projection_dim, config.mlp)
        self.key_encoder = MomentumCopy(
            nn.Sequential(self.backbone, self.projector), config.key_momentum
        )
        self.queue = Queue(config.queue_size, config.projection_dim, inputs.seed)

    def forward(self, batch: Batch) -> StepResult:
        first, second = batch.views
        loss, keys = self._query_against_keys(first, second, 2 * batch.step)
        if self.config.symmetric:
            # The other direction. Keys are interleaved, so that ranks enqueue in image order.
            other_loss, other_keys = self._query_against_keys(second, first, 2 * batch.step + 1)
            loss = (loss + other_loss) / 2
            keys = torch.stack([keys, other_keys], 1).flatten(0, 1)
        return StepResult(loss, for_end_step={"keys": keys})

    def _query_against_keys(
        self, query_view: Tensor, key_view: Tensor, permutation_number: int
    ) -> tuple[Tensor, Tensor]:
        """Loss of one direction and this rank's keys [b, d]; the number selects a permutation."""
        # Queries from the trained encoder.
        queries = on_unit_sphere(self.projector(self.backbone(query_view)))
        # Keys from the key encoder, without gradient.
        keys = self._encode_keys(key_view, permutation_number)
        # Eq. 1: the own key is the positive, the queue holds the negatives.
        return info_nce(queries, keys, self.queue.rows, self.config.temperature), keys

    @torch.no_grad()
    def _encode_keys(self, images: Tensor, permutation_number: int) -> Tensor:
        """Keys [b, d] of this rank's images, with shuffled batch norm (Sec. 3.3)."""
        if self.config.bn_groups == 1:
            return on_unit_sphere(self.key_encoder(images))
        b = len(images)
        start = current().rank * b
        # Shuffle: this rank encodes a random part of the global batch.
        num_rows = b * current().world_size
        order = permutation(num_rows, self.inputs.seed, permutation_number).to(images.device)
        shuffled_images = all_rows(images)[order[start : start + b]]
        shuffled_keys = on_unit_sphere(self.key_encoder(shuffled_images))
        # Undo the shuffle: every key returns to the rank of its image.
        return all_rows(shuffled_keys)[order.argsort()[start : start + b]]

    def end_step(self, batch: Batch, step: StepResult) -> None:
        # Eq. 2: key = m * key + (1 - m) * query, parameters only.
        self.key_encoder.update(nn.ModuleList([self.backbone, self.projector]))
        # Alg. 1: the keys replace the oldest ones after the update.
        self.queue.enqueue(step.for_end_step["keys"])


def permutation(num_rows: int, seed: int, number: int) -> Tensor:
    """Permutation of the global batch, a function of its arguments: nothing is broadcast."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.randperm(num_rows, generator=generator)
