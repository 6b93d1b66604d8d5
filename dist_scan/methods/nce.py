"""Instance discrimination: every image is a class of its own, against a memory of all others (Wu et al., CVPR 2018; SCAN's Table 2).

The paper's softmax over all N images (its Eq. 2), which the released code recommends for CIFAR-10 (no noise samples). It is exact for
ImageNet too: the memory is a bank, each rank scores the global batch against its own rows, and two numbers per image are exchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_scan.data.batch import Batch
from dist_scan.losses import at_least_fp32
from dist_scan.methods.base import Method, MethodInputs, NetworkConfig, Step
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.layers import Projector
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.world.collectives import all_max, all_rows, all_sum
from dist_scan.world.world import current


class NCEConfig(NetworkConfig):
    """Defaults: CIFAR-10. ImageNet: temperature 0.07."""

    kind: Literal["nce"] = "nce"
    temperature: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """A row of the memory becomes momentum * row + (1 - momentum) * projection, of unit length."""
    projection_dim: int = Field(default=128, ge=1)


class NCEMethod(Method):
    """The memory starts as random unit rows, a function of the seed."""

    Config = NCEConfig
    recipes = ("moco_v1",)
    needs = ("images",)

    def __init__(self, config: NCEConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.backbone = convert_batch_norm(inputs.backbone, config.bn_groups)
        self.projector = Projector(inputs.feature_dim, config.projection_dim, mlp=False)
        self.memory = MemoryBank(inputs.num_images, (config.projection_dim,))
        for s, rows in self.memory.shards.items():
            rows.copy_(
                F.normalize(
                    torch.randn(
                        rows.shape, generator=torch.Generator().manual_seed(inputs.seed * 4099 + s)
                    ),
                    dim=1,
                )
            )

    def memory_banks(self) -> dict[str, MemoryBank]:
        return {"memory": self.memory}

    def forward(self, batch: Batch) -> Step:
        z = F.normalize(at_least_fp32(self.projector(self.backbone(batch.views[0]))), dim=1)
        own = self.memory.read(batch.index).to(z)
        loss = instance_loss(z, own, self._mine(z), self.config.temperature)
        return Step(loss, keep={"projections": z.detach(), "rows": own})

    def _mine(self, like: Tensor) -> Tensor:
        """This rank's rows of the memory, on the device of the batch."""
        rows = list(self.memory.shards.values())
        return torch.cat(rows).to(like) if rows else like.new_zeros((0, like.shape[1]))

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        m = self.config.momentum
        self.memory.write(
            batch.index,
            F.normalize(m * step.keep["rows"] + (1 - m) * step.keep["projections"], dim=1),
        )

    def publish(self, out: Path) -> None:
        save_backbone(out, self.backbone, self.inputs.backbone_config, self.projector)


def instance_loss(z_BD: Tensor, own_BD: Tensor, memory_MD: Tensor, temperature: float) -> Tensor:
    """-log softmax(z . memory / T) at the own row, over the rows [M, D] of all ranks; this rank's mean over its B rows z. Collective.

    The gradient of log sum exp over all rows is the sum of the ranks', each with the share of the sum that its rows make.
    """
    everyone = all_rows(z_BD)
    scores = everyone @ memory_MD.T / temperature
    largest = all_max(
        scores.max(1).values if len(memory_MD) else everyone.new_full((len(everyone),), -torch.inf)
    )
    mine = torch.exp(scores - largest[:, None]).sum(1)
    total = all_sum(mine)
    b, start = len(z_BD), current().rank * len(z_BD)
    # value: this rank's mean of log total. Gradient: d log total / d z of every image through this rank's rows, summed over ranks by all_rows;
    # 1/b and not 1/(W b), as DDP divides by the number of ranks
    through = (mine / total).sum() / b
    value = (total.log() + largest)[start : start + b].mean()
    return through + (value - through).detach() - (z_BD * own_BD).sum(1).mean() / temperature
