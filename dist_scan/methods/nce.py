"""Instance discrimination: every image is its own class, against a memory of all images.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018:
Sec. 3.1: Eq. 2 (softmax over all images) and the memory bank. A pretext task in SCAN,
Table 2.

The paper samples negatives (noise-contrastive estimation, hence the name `nce`). Here the softmax
is over all images, as the released code recommends for CIFAR-10. It is exact for large sets too:
the memory is sharded, each rank scores the global batch against its own rows, and two numbers per
image are exchanged.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch
from dist_scan.losses import on_unit_sphere
from dist_scan.methods.base import MethodInputs, NetworkConfig, NetworkMethod, StepResult
from dist_scan.models.layers import Projector
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.world.collectives import all_max, all_rows, all_sum
from dist_scan.world.world import current


class NCEConfig(NetworkConfig):
    """The defaults are for CIFAR-10. For ImageNet: temperature 0.07."""

    kind: Literal["nce"] = "nce"
    temperature: float = Field(default=0.1, gt=0)
    memory_momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the memory: a row becomes momentum * row + (1 - momentum) * projection,
    normalised to unit length."""
    projection_dim: int = Field(default=128, ge=1)


class NCEMethod(NetworkMethod):
    """The memory starts with random rows of unit length that depend on the seed only."""

    Config = NCEConfig
    recipes = ("moco_v1",)
    config: NCEConfig
    projector: Projector

    def __init__(self, config: NCEConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.projector = Projector(inputs.feature_dim, config.projection_dim, mlp=False)
        self.memory = MemoryBank(inputs.num_images, (config.projection_dim,))
        self.memory_banks["memory"] = self.memory
        # A generator per shard, so that the rows do not depend on the number of ranks.
        for shard, rows in self.memory.shards.items():
            generator = torch.Generator().manual_seed(inputs.seed * 4099 + shard)
            rows.copy_(on_unit_sphere(torch.randn(rows.shape, generator=generator)))

    def forward(self, batch: Batch) -> StepResult:
        # Project the images onto the unit sphere.
        z = on_unit_sphere(self.projector(self.backbone(batch.views[0])))
        # Read each image's own row, and the shards of the memory that this rank holds.
        own_rows = self.memory.read(batch.index).to(z)
        # Eq. 2: softmax over all images.
        loss = instance_loss(z, own_rows, self._local_memory(z), self.config.temperature)
        return StepResult(loss, for_end_step={"projections": z.detach(), "rows": own_rows})

    def _local_memory(self, like: Tensor) -> Tensor:
        """Rows [M, D] of the memory that this rank holds, with the device and type of ``like``."""
        shards = list(self.memory.shards.values())
        return torch.cat(shards).to(like) if shards else like.new_zeros((0, like.shape[1]))

    def end_step(self, batch: Batch, step: StepResult) -> None:
        # Move the rows of the batch towards the new projections.
        m = self.config.memory_momentum
        rows, projections = step.for_end_step["rows"], step.for_end_step["projections"]
        self.memory.write(batch.index, on_unit_sphere(m * rows + (1 - m) * projections))


def instance_loss(z_BD: Tensor, own_BD: Tensor, memory_MD: Tensor, temperature: float) -> Tensor:
    """-log softmax(z . memory / T) of the own row, over the rows [M, D] of all ranks (Wu, Eq. 2).

    Mean over this rank's rows z [B, D]; ``own`` [B, D] are their rows of the memory. Collective.
    """
    # Scores of the global batch against the rows of this rank.
    all_z = all_rows(z_BD)
    scores = all_z @ memory_MD.T / temperature
    # Log-sum-exp over the rows of all ranks, stabilised by the largest score.
    no_score = all_z.new_full((len(all_z),), -torch.inf)
    largest = all_max(scores.max(1).values if len(memory_MD) else no_score)
    local_sum = torch.exp(scores - largest[:, None]).sum(1)
    total = all_sum(local_sum)
    b, start = len(z_BD), current().rank * len(z_BD)
    value = (total.log() + largest)[start : start + b].mean()
    # The gradient of log(total) is the sum over ranks of local_sum / total: all_rows adds the parts
    # up in its backward pass. It is divided by b, not W * b: DDP divides by the number of ranks.
    gradient = (local_sum / total).sum() / b
    log_total = gradient + (value - gradient).detach()
    return log_total - (z_BD * own_BD).sum(1).mean() / temperature
