"""DeepCluster-v2: several classifiers whose weights are centroids of stored projections.

Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS
2020 (the SwAV paper, which describes DeepCluster-v2 as a baseline) and its released
main_deepclusterv2.py. Changes since DeepCluster: no pass over the data to cluster, since the
projections are those of the previous epoch; spherical k-means, whose centroids are the classifier;
several views.

The released code drops the gradient of the classifier for 300,000 iterations, longer than any of
its runs; here it is not trained.
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

from dist_scan.data.assignments import Assignments
from dist_scan.data.batch import Batch
from dist_scan.data.feature_table import FeatureTable
from dist_scan.losses import on_unit_sphere
from dist_scan.methods._clustering import (
    KMEANS_STREAM,
    ClusteringMethod,
    empty_folder,
    hashed_seed,
)
from dist_scan.methods.base import (
    Embed,
    MethodConfig,
    MethodInputs,
    NetworkConfig,
    StepResult,
)
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.layers import Projector
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.search.agreement import assignment_nmi
from dist_scan.search.kmeans import KMeansResult, kmeans
from dist_scan.search.options import KMeansOptions
from dist_scan.world.collectives import barrier
from dist_scan.world.world import current

NUM_STORED_VIEWS = 2
"""Views whose projections are stored: the large crops."""


class DeepClusterV2Config(NetworkConfig):
    """The defaults are the released two-crop run on ImageNet.

    Multi-crop: small_crops 4, with recipes of 160 and 96 pixels.
    """

    kind: Literal["deepcluster_v2"] = "deepcluster_v2"
    num_clusters: int = Field(default=3000, ge=2)
    num_heads: int = Field(default=3, ge=1)
    temperature: float = Field(default=0.1, gt=0)
    projection_dim: int = Field(default=128, ge=1)
    hidden_dim: int = Field(default=2048, ge=1)
    iterations: int = Field(default=10, ge=1)
    """Iterations of spherical k-means, which starts from random images."""
    small_crops: int = Field(default=0, ge=0)
    """Number of views besides the two whose projections are stored, trained on the same targets."""
    track: bool = False
    """Publish every clustering of the first head, not only the last one (4 bytes per image each),
    for evaluation."""


class DeepClusterV2Method(ClusteringMethod):
    """Memory banks: projections of two views [N, 2, D], and assignments of H heads [N, H].

    Before the first epoch, one pass over centre crops fills the projections (released code: over
    training crops, in train mode). Images that an epoch drops keep their last projections (released
    code: they are ignored).
    """

    Config = DeepClusterV2Config
    recipes = ("dcv2", "dcv2")
    publishes = ("backbone", "clusters")
    statistic_names = ("nmi_previous", "empty_clusters", "split_clusters")
    config: DeepClusterV2Config
    projector: nn.Module

    def __init__(self, config: DeepClusterV2Config, inputs: MethodInputs) -> None:
        super().__init__(config, inputs, config.num_heads)
        projector = Projector(
            inputs.feature_dim, config.projection_dim, hidden_dim=config.hidden_dim, batch_norm=True
        )
        self.projector = convert_batch_norm(projector, config.bn_groups)
        self.prototypes = nn.Parameter(
            torch.zeros(config.num_heads, config.num_clusters, config.projection_dim),
            requires_grad=False,
        )
        self.projections = MemoryBank(inputs.num_images, (NUM_STORED_VIEWS, config.projection_dim))
        self.memory_banks["projections"] = self.projections
        if config.track:
            self.track_history()

    @classmethod
    def recipes_for(cls, config: MethodConfig) -> tuple[str, ...]:
        assert isinstance(config, DeepClusterV2Config)
        return cls.recipes + cls.recipes[:1] * config.small_crops

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        # Fill the bank once; later epochs use the projections of the previous epoch.
        if epoch == 0:
            dim = self.config.projection_dim
            self._store_projections(embed(ProjectionNetwork(self.backbone, self.projector, dim)))
        # Cluster the stored projections once per head.
        previous = self.assignment.whole().numpy()
        table = self._projection_table()
        results = [self._cluster(table, epoch, head) for head in range(self.config.num_heads)]
        assignment = np.stack([result.assignment for result in results], 1)
        # The centroids are the classifier, the clusters its targets.
        centroids = np.stack([result.centroids for result in results])
        with torch.no_grad():
            self.prototypes.copy_(torch.from_numpy(centroids))
        self.assignment.fill(torch.from_numpy(assignment))
        if self.history is not None:
            self.history.fill(torch.from_numpy(assignment[:, 0]), self.history.column(epoch))
        # Statistics to log: NMI is the mean over heads.
        nmi = [np.nan]
        if epoch > 0:
            nmi = [assignment_nmi(old, new) for old, new in zip(previous.T, assignment.T)]
        num_empty = sum(int((result.sizes == 0).sum()) for result in results)
        num_splits = sum(result.num_splits for result in results)
        self.last_statistics.copy_(torch.tensor([np.mean(nmi), num_empty, num_splits]))
        return [self.prototypes]

    def _cluster(self, table: FeatureTable, epoch: int, head: int) -> KMeansResult:
        """Spherical k-means for one head; head h clusters view h mod 2."""
        options = KMeansOptions(
            iterations=self.config.iterations,
            init="random",
            spherical=True,
            view=head % NUM_STORED_VIEWS,
            seed=hashed_seed(self.inputs.seed, KMEANS_STREAM, epoch, head),
        )
        return kmeans(
            table,
            self.config.num_clusters,
            options,
            stop_requested=self.inputs.stop_requested,
        )

    def _store_projections(self, table: FeatureTable) -> None:
        """Fill the bank: the projection of the centre crop stands for both views."""
        for shard, rows in self.projections.shards.items():
            start, stop = self.projections.starts[shard : shard + 2].tolist()
            projections = torch.from_numpy(table.rows(np.arange(start, stop))).to(rows)
            rows.copy_(F.normalize(projections, dim=1)[:, None].expand_as(rows))

    def _projection_table(self) -> FeatureTable:
        """The projections in files, for k-means. Shards of bank and table are the same rows."""
        folder = empty_folder(self.inputs.work_dir)
        if current().rank == 0:
            FeatureTable.create(
                folder,
                (self.inputs.num_images, NUM_STORED_VIEWS, self.config.projection_dim),
                self.projections.num_shards,
            )
        barrier()
        table = FeatureTable.open(folder)
        for shard, rows in self.projections.shards.items():
            table.write_shard(shard, rows.float().cpu().numpy())
        barrier()
        return FeatureTable.open(folder)

    def forward(self, batch: Batch) -> StepResult:
        # Project all views onto the unit sphere, views of one size in one pass.
        z = torch.cat(
            [
                on_unit_sphere(self.projector(self.backbone(images)))
                for images in concatenate_by_size(batch.views)
            ]
        )
        # All views of an image share its targets, one per head.
        targets = self.targets[batch.index].to(z.device).repeat(len(batch.views), 1)
        # Classify by the centroids of each head; the loss is the mean over heads.
        with torch.autocast(z.device.type, enabled=False):
            prototypes = self.prototypes.to(z.dtype)
            logits_HBC = torch.einsum("bd,hkd->hbk", z, prototypes) / self.config.temperature
            losses = [F.cross_entropy(logits, t) for logits, t in zip(logits_HBC, targets.T)]
            loss = torch.stack(losses).mean()
        accuracy = (targets == logits_HBC.detach().argmax(2).T).double().mean()
        # Store the projections of the large crops [b, 2, D].
        b = len(batch.index)
        large = z.detach()[: NUM_STORED_VIEWS * b].view(NUM_STORED_VIEWS, b, -1)
        return StepResult(
            loss, {"pseudo_accuracy": accuracy}, {"projections": large.transpose(0, 1)}
        )

    def end_step(self, batch: Batch, step: StepResult) -> None:
        self.projections.write(batch.index, step.for_end_step["projections"])

    def publish(self, out: Path) -> None:
        """Write backbone, projector and the last assignment of the first head."""
        super().publish(out)
        Assignments(self.targets[:, 0].numpy(), self.config.num_clusters).save(out)


class ProjectionNetwork(nn.Module):
    """Images -> projections [B, num_features], not normalised."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.num_features = dim

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


def concatenate_by_size(views: Sequence[Tensor]) -> Iterable[Tensor]:
    """Consecutive views of one size as one batch [n * b, 3, S, S], in order.

    As in the released code, each of these batches passes through the network at once, so batch norm
    sees its views together.
    """
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape != views[start].shape:
            yield torch.cat(list(views[start:end]))
            start = end
