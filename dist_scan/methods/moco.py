"""MoCo v1 and v2: one view against the other's key from a slow copy and a queue of older keys (He et al., CVPR 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dist_scan.data.batch import Batch
from dist_scan.losses import at_least_fp32, info_nce
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, Step
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.layers import MomentumCopy, Projector
from dist_scan.models.memory_bank import Queue, check_queue
from dist_scan.world.collectives import all_rows
from dist_scan.world.world import current


class MoCoConfig(NetworkConfig):
    """Defaults are v2's. v1: temperature 0.07, mlp false, recipes moco_v1."""

    kind: Literal["moco"] = "moco"
    temperature: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.999, ge=0, lt=1)
    queue_size: int = Field(default=65536, ge=1)
    """A multiple of global_batch."""
    projection_dim: int = Field(default=128, ge=1)
    mlp: bool = True
    symmetric: bool = False
    """Each view is query and key in turn (of the CIFAR demo); the paper has one direction."""
    bn_groups: int = Field(default=8, ge=1)
    """Parts of the global batch for batch norm. Keys are shuffled over the parts, or the network reads off which rows were
    normalised together; with one part the shuffle does nothing and costs accuracy (4 points on CIFAR-10)."""

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Batch norm's groups, the ranks and the batch must fit; the queue holds whole batches."""
        super().check_batch(global_batch, world_size)
        check_queue(self.queue_size, global_batch * (1 + self.symmetric))


class MoCoMethod(Method):
    """Queue and key network are buffers. The permutation is a function of (seed, step): nothing is broadcast."""

    Config = MoCoConfig
    recipes = ("moco_v2", "moco_v2")
    needs = ("images",)

    def __init__(self, config: MoCoConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.backbone = convert_batch_norm(inputs.backbone, config.bn_groups)
        self.projector = Projector(inputs.feature_dim, config.projection_dim, config.mlp)
        self.key = MomentumCopy(nn.Sequential(self.backbone, self.projector), config.momentum)
        self.queue = Queue(
            config.queue_size,
            config.projection_dim,
            inputs.global_batch * (1 + config.symmetric),
            inputs.seed,
        )

    def forward(self, batch: Batch) -> Step:
        first, second = batch.views
        loss, keys = self._one_way(first, second, batch.step, 0)
        if self.config.symmetric:
            other, more = self._one_way(second, first, batch.step, 1)
            loss, keys = (loss + other) / 2, torch.stack([keys, more], 1).flatten(0, 1)
        return Step(loss, keep={"keys": keys})

    def _one_way(
        self, query_view: Tensor, key_view: Tensor, step: int, way: int
    ) -> tuple[Tensor, Tensor]:
        queries = F.normalize(at_least_fp32(self.projector(self.backbone(query_view))), dim=1)
        keys = self._keys(key_view, step, way)
        return info_nce(queries, keys, self.queue.rows, self.config.temperature), keys

    @torch.no_grad()
    def _keys(self, images: Tensor, step: int, way: int) -> Tensor:
        """Keys [b, d] of this rank's images, normalised among a random part of the global batch."""
        if self.config.bn_groups == 1:
            return F.normalize(at_least_fp32(self.key(images)), dim=1)
        b, start = len(images), current().rank * len(images)
        order = shuffled(b * current().world_size, self.inputs.seed, 2 * step + way).to(
            images.device
        )
        keys = F.normalize(
            at_least_fp32(self.key(all_rows(images)[order[start : start + b]])), dim=1
        )
        return all_rows(keys)[order.argsort()[start : start + b]]

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        self.key.update(nn.ModuleList([self.backbone, self.projector]))
        self.queue.enqueue(step.keep["keys"])

    def publish(self, out: Path) -> None:
        save_backbone(out, self.backbone, self.inputs.backbone_config, self.projector)


def shuffled(num_rows: int, seed: int, step: int) -> Tensor:
    """A permutation of the global batch, the same on all ranks."""
    return torch.randperm(
        num_rows, generator=torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    )
