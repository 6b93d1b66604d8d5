"""DeepCluster-v2: several prototype heads over projections remembered from the epoch before (Caron et al., NeurIPS 2020; FIDELITY.md 3b).

Shared with DeepCluster: the engine's moments, the bank, k-means. Different: no pass over the data to cluster, spherical k-means, the
centroids are the classifier, several views. Its released code drops the gradient of the prototypes for 300,000 iterations, which is
always: here they are not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dist_scan.data.assignments import Assignments, save_history
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.feature_table import FeatureTable
from dist_scan.losses import at_least_fp32
from dist_scan.methods.base import Embed, Method, MethodInputs, NetworkConfig, Step
from dist_scan.methods.deepcluster import SEED, emptied, seed_of
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.layers import Projector
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.search.agreement import assignment_nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.options import KMeansOptions
from dist_scan.world.collectives import barrier
from dist_scan.world.world import current

REMEMBERED = 2  # views whose projections the bank holds: the large crops
FACTS = ("nmi_previous", "empty_clusters", "split_clusters")


class DeepClusterV2Config(NetworkConfig):
    """Defaults: the released two-crop ImageNet run. Multi-crop: small_crops 4 and recipes of 160 and 96 px."""

    kind: Literal["deepcluster_v2"] = "deepcluster_v2"
    num_clusters: int = Field(default=3000, ge=2)
    num_heads: int = Field(default=3, ge=1)
    temperature: float = Field(default=0.1, gt=0)
    projection_dim: int = Field(default=128, ge=1)
    hidden_dim: int = Field(default=2048, ge=1)
    iterations: int = Field(default=10, ge=1)
    """Of spherical k-means, from random images."""
    small_crops: int = Field(default=0, ge=0)
    """Views beside the two that are remembered; they are trained on the same targets."""
    track: bool = False
    """Publish every clustering of the first head, not only the last one (4 bytes an image each), for evaluation."""


class DeepClusterV2Method(Method):
    """Banks: projections of two views [N, 2, D] and the heads' assignments [N, H]. Before the first epoch the bank is filled by one pass over
    centre crops (released: training crops in train mode). Rows that an epoch drops keep what they had (released: they sit out)."""

    Config = DeepClusterV2Config
    recipes = ("dcv2", "dcv2")
    needs = ("images",)
    publishes = ("backbone", "clusters")

    def __init__(self, config: DeepClusterV2Config, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.backbone = convert_batch_norm(inputs.backbone, config.bn_groups)
        self.projector = convert_batch_norm(
            Projector(
                inputs.feature_dim,
                config.projection_dim,
                hidden_dim=config.hidden_dim,
                batch_norm=True,
            ),
            config.bn_groups,
        )
        self.prototypes = nn.Parameter(
            torch.zeros(config.num_heads, config.num_clusters, config.projection_dim),
            requires_grad=False,
        )
        self.register_buffer("facts", torch.full((len(FACTS),), float("nan"), dtype=torch.float64))
        self.projections = MemoryBank(inputs.num_images, (REMEMBERED, config.projection_dim))
        self.assignment = MemoryBank(inputs.num_images, (config.num_heads,), torch.int32, fill=-1)
        self.history = (
            MemoryBank(inputs.num_images, (inputs.epochs,), torch.int32, fill=-1)
            if config.track
            else None
        )
        self.kept: Tensor | None = None
        self.targets = torch.full(
            (inputs.num_images, config.num_heads), -1
        )  # the whole bank, on every rank: read again after a resume

    @classmethod
    def recipes_for(cls, config: DeepClusterV2Config) -> tuple[str, ...]:
        """Two views, and the small ones."""
        return cls.recipes + cls.recipes[:1] * config.small_crops

    def memory_banks(self) -> dict[str, MemoryBank]:
        return {"projections": self.projections, "assignment": self.assignment} | (
            {"history": self.history} if self.history else {}
        )

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        """Cluster the bank once for each head; head h looks at view h mod 2."""
        if epoch == 0:
            self._first_fill(embed(Projected(self.backbone, self.projector)))
        before, table, found = self.assignment.whole().numpy(), self._as_table(), []
        for head in range(self.config.num_heads):
            found.append(
                kmeans(
                    table,
                    self.config.num_clusters,
                    KMeansOptions(
                        iterations=self.config.iterations,
                        init="random",
                        spherical=True,
                        view=head % REMEMBERED,
                        seed=seed_of(self.inputs.seed, SEED, epoch, head),
                    ),
                    stop=self.inputs.stop_requested,
                    progress=current().rank == 0,
                )
            )
        assignment = np.stack([f.assignment for f in found], 1)
        with torch.no_grad():
            self.prototypes.copy_(torch.from_numpy(np.stack([f.centroids for f in found])))
        self.assignment.fill(torch.from_numpy(assignment))
        if self.history is not None:
            self.history.fill(torch.from_numpy(assignment[:, 0]), epoch)
        nmi = (
            [assignment_nmi(a, b) for a, b in zip(before.T, assignment.T)]
            if epoch
            else [float("nan")]
        )
        self.facts.copy_(
            torch.tensor(
                [
                    np.mean(nmi),
                    sum(int((f.sizes == 0).sum()) for f in found),
                    sum(f.num_splits for f in found),
                ]
            )
        )
        return [self.prototypes]

    def _first_fill(self, table: FeatureTable) -> None:
        for s, mine in self.projections.shards.items():
            rows = torch.from_numpy(
                table.rows(
                    np.arange(int(self.projections.starts[s]), int(self.projections.starts[s + 1]))
                )
            ).to(mine)
            mine.copy_(F.normalize(rows, dim=1)[:, None].expand_as(mine))

    def _as_table(self) -> FeatureTable:
        """The bank on disk, where k-means reads it: shard s of one is shard s of the other."""
        out = emptied(self.inputs.work_dir)
        if current().rank == 0:
            FeatureTable.create(
                out,
                self.inputs.num_images,
                REMEMBERED,
                self.config.projection_dim,
                self.projections.num_shards,
            )
        barrier()
        table = FeatureTable.open(out)
        for s, rows in self.projections.shards.items():
            table.write_shard(s, rows.float().cpu().numpy())
        barrier()
        return FeatureTable.open(out)

    def epoch_rows(self, epoch: int, rows: np.ndarray) -> None:
        """Every row once, shuffled."""
        self.targets = self.assignment.whole().long()

    def forward(self, batch: Batch) -> Step:
        z = torch.cat(
            [
                F.normalize(at_least_fp32(self.projector(self.backbone(images))), dim=1)
                for images in by_size(batch.views)
            ]
        )
        targets = self.targets[batch.index].to(z.device).repeat(len(batch.views), 1)
        with torch.autocast(z.device.type, enabled=False):
            logits = (
                torch.einsum("bd,hkd->hbk", z, self.prototypes.to(z.dtype))
                / self.config.temperature
            )
            loss = torch.stack(
                [F.cross_entropy(head, target) for head, target in zip(logits, targets.T)]
            ).mean()
        b = len(batch.index)
        return Step(
            loss,
            {"pseudo_accuracy": (targets == logits.detach().argmax(2).T).double().mean()},
            {"projections": z.detach()[: REMEMBERED * b].view(REMEMBERED, b, -1).transpose(0, 1)},
        )

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        self.projections.write(batch.index, step.keep["projections"])

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        """What the clusterings of this epoch were like; NMI is the heads' mean."""
        return {name: value for name, value in zip(FACTS, self.facts.tolist()) if value == value}

    def prepare_publish(self) -> None:
        self.targets = self.assignment.whole().long()
        self.kept = self.history.whole() if self.history is not None else None

    def publish(self, out: Path) -> None:
        """The backbone and projector, and the first head's last assignment."""
        save_backbone(out, self.backbone, self.inputs.backbone_config, self.projector)
        Assignments(self.targets[:, 0].numpy(), self.config.num_clusters).save(out)
        if self.kept is not None:
            save_history(out, np.arange(self.kept.shape[1]), self.kept.numpy())


class Projected(nn.Module):
    """images -> projections [B, D], for embedding."""

    def __init__(self, backbone: nn.Module, projector: Projector) -> None:
        super().__init__()
        self.backbone, self.projector, self.num_features = (
            backbone,
            projector,
            projector[-1].out_features,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


def by_size(views: Sequence[Tensor]) -> Iterable[Tensor]:
    """Neighbouring views of one size together [n b, 3, S, S], in order: one pass through the network each, as released."""
    start = 0
    for v in range(1, len(views) + 1):
        if v == len(views) or views[v].shape != views[start].shape:
            yield torch.cat(list(views[start:v]))
            start = v
