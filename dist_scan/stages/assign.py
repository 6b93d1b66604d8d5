"""Cluster, probability and top clusters of every image, by a published cluster model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_scan.config import DataConfig
from dist_scan.config.stage import Images, Ref, StageConfig, Stages
from dist_scan.data.augment.recipes import RecipeConfig, resolution_warnings
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import eval_batches
from dist_scan.engine.precision import Precision, autocast, move_to_device
from dist_scan.models.cluster_model import ClusterModel, load_cluster_model
from dist_scan.stages._assignment import TopClusters, rank_batches
from dist_scan.stages.base import Stage


class AssignConfig(StageConfig):
    """Settings of the assignments, which evaluation, report and export read."""

    kind: Literal["assign"] = "assign"
    model: Ref
    """A stage that published a cluster model (SCAN heads, self-labelling)."""
    images: Images | None = None
    features: Ref | None = None
    """Use these cached features (view 0) instead of images. Correct for a frozen backbone."""
    recipe: RecipeConfig = RecipeConfig(name="center")
    batch: int = Field(default=256, ge=1)
    precision: Precision = "fp32"

    def publishes(self) -> tuple[str, ...]:
        """Assignments."""
        return ("clusters",)

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless exactly one of images and features is given."""
        if (self.images is None) == (self.features is None):
            raise ValueError(
                f"stages.{name}: give exactly one of images (train or val) and features "
                "(a stage's name)"
            )

    def warnings(self, data: DataConfig) -> list[str]:
        """A warning if the recipe does not suit the size of the stored images."""
        return resolution_warnings([self.recipe], data) if self.images else []


class AssignStage(Stage[AssignConfig]):
    """Writes assignments.npz."""

    Config = AssignConfig

    @torch.inference_mode()
    def run(self) -> None:
        """Each rank assigns a contiguous part of the rows. Collective."""
        context = self.context
        model = load_cluster_model(context.inputs["model"])
        model = move_to_device(model, context.world.device).eval()
        top = TopClusters(model.num_clusters)
        for logits in self._logits(model):
            top.add(logits.float().softmax(1))
        top.save(context.out, context.world)

    def _logits(self, model: ClusterModel) -> Iterator[Tensor]:
        """Logits [b, C] of this rank's batches."""
        context, config = self.context, self.config
        device = context.world.device
        if config.features is not None:
            table = FeatureTable.open(context.inputs["features"])
            for rows in rank_batches(table.num_rows, config.batch, context.world):
                features = torch.from_numpy(table.rows(rows, 0)).to(device).float()
                yield model.from_features(features)
            return
        loader, recipes = context.open_images((config.recipe,), config.batch)
        batches = rank_batches(loader.num_images, config.batch, context.world)
        rows = np.concatenate([np.arange(0), *batches])
        for batch in eval_batches(loader, recipes[0], rows, device):
            with autocast(config.precision, device):
                yield model(batch.views[0])
