"""Assignments by the consensus of all heads of a stage, or by one head, from cached features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_scan.config.stage import Ref, StageConfig, Stages
from dist_scan.data.feature_table import FeatureTable
from dist_scan.heads.linear import head_sizes
from dist_scan.heads.selection import PublishedHeads
from dist_scan.methods.scan import ScanConfig
from dist_scan.methods.temi import TemiConfig
from dist_scan.models.cluster_model import load_cluster_model
from dist_scan.stages._assignment import TopClusters, gather_batches, rank_batches
from dist_scan.stages._train_config import TrainConfig
from dist_scan.stages.base import Stage
from dist_scan.storage.arrays import write_npz
from dist_scan.world.collectives import barrier


class ConsensusConfig(StageConfig):
    """Settings of assignments to compare with those of the selected head."""

    kind: Literal["consensus"] = "consensus"
    model: Ref
    """A stage that trained heads (scan, temi) on a frozen backbone and selected one of them."""
    features: Ref
    """View 0 of this embed stage, computed by the same backbone."""
    num_clusters: int | None = Field(default=None, ge=2)
    """Use the heads with this number of clusters (default: that of the first head)."""
    head: int | None = Field(default=None, ge=0)
    """Use the head of this number in the report's table instead of the consensus."""
    batch: int = Field(default=4096, ge=1)

    def publishes(self) -> tuple[str, ...]:
        """Assignments."""
        return ("clusters",)

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless the stage trained such heads on a frozen backbone."""
        source = earlier[self.model]
        method = source.method if isinstance(source, TrainConfig) else None
        if not isinstance(source, TrainConfig) or not isinstance(method, ScanConfig | TemiConfig):
            raise ValueError(
                f"stages.{name}.model: '{self.model}' trains no heads; "
                "name a stage whose method is scan or temi"
            )
        trains_backbone = isinstance(method, ScanConfig) and method.train_backbone
        if source.images is not None and trains_backbone:
            raise ValueError(
                f"stages.{name}.model: '{self.model}' trains its network too, so cached features "
                "are not those of its heads; use an assign stage"
            )
        sizes = head_sizes(method.num_clusters, method.num_heads)
        if self.num_clusters is not None and self.num_clusters not in sizes:
            allowed = ", ".join(map(str, dict.fromkeys(sizes)))
            raise ValueError(f"stages.{name}.num_clusters: {self.num_clusters}; allowed: {allowed}")
        if self.head is not None and self.head >= len(sizes):
            raise ValueError(f"stages.{name}.head: {self.head}; allowed: 0 to {len(sizes) - 1}")


class ConsensusStage(Stage[ConsensusConfig]):
    """Writes assignments.npz, and heads.npz with the clusters of every head.

    heads.npz: ``cluster`` [H, N] int32, ``sizes`` [H] (number of clusters of each head).
    """

    Config = ConsensusConfig

    @torch.inference_mode()
    def run(self) -> None:
        """Each rank assigns a contiguous part of the rows. Collective."""
        context, config = self.context, self.config
        heads = PublishedHeads(context.inputs["model"], context.world.device)
        num_heads = len(heads.sizes)
        num_clusters = config.num_clusters or heads.sizes[0]
        if config.head is not None:
            num_clusters = heads.sizes[config.head]
        top = TopClusters(num_clusters)
        clusters_by_head = []
        for features in self._features():
            logits = [heads.logits(head, features) for head in range(num_heads)]
            clusters_by_head.append(torch.stack([x.argmax(1) for x in logits], 1).cpu())
            if config.head is None:
                top.add(heads.consensus(num_clusters, features))
            else:
                top.add(logits[config.head].softmax(1))
        clusters = gather_batches(clusters_by_head, num_heads, torch.int64)
        top.save(context.out, context.world)
        if context.world.rank == 0:
            arrays = {
                "cluster": clusters.T.numpy().astype(np.int32),
                "sizes": np.array(heads.sizes),
            }
            write_npz(context.out / "heads.npz", arrays)
        barrier()

    def _features(self) -> Iterator[Tensor]:
        """Normalised features [b, D] of this rank's batches."""
        context, world = self.context, self.context.world
        table = FeatureTable.open(context.inputs["features"])
        normalise = load_cluster_model(context.inputs["model"]).norm.to(world.device)
        for rows in rank_batches(table.num_rows, self.config.batch, world):
            features = torch.from_numpy(table.rows(rows, 0))
            yield normalise(features.to(world.device).float())
