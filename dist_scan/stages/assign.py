"""A published cluster model + images (or their features) -> a cluster, its probability and the top clusters of every image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_scan.config import DataConfig
from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.assignments import Assignments
from dist_scan.data.augment.recipes import RecipeConfig, resolution_warnings
from dist_scan.engine.precision import Precision, autocast, move_to_device
from dist_scan.engine.predict import NUM_TOP, top_clusters
from dist_scan.models.cluster_model import ClusterModel, load_cluster_model
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import barrier, gather_rows


class AssignConfig(StageConfig):
    """What evaluation, the report and the export read."""

    kind: Literal["assign"] = "assign"
    model: Ref
    """A stage that published a cluster model (SCAN heads, self-labelling)."""
    images: Images | None = None
    features: Ref | None = None
    """Use these cached features (view 0) instead of decoding the images again; right as long as the backbone is frozen."""
    recipe: RecipeConfig = RecipeConfig(name="center")
    batch: int = Field(default=256, ge=1)
    precision: Precision = "fp32"

    def publishes(self) -> tuple[str, ...]:
        return ("clusters",)

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """One source of rows."""
        if (self.images is None) == (self.features is None):
            raise ValueError(
                f"stages.{name}: give exactly one of images (train or val) and features (a stage's name)"
            )

    def warnings(self, data: DataConfig) -> list[str]:
        return resolution_warnings((self.recipe,), data) if self.images else []


class AssignStage(Stage):
    """Writes assignments.npz."""

    Config = AssignConfig

    @torch.inference_mode()
    def run(self) -> None:
        """Each rank takes a contiguous part of the rows; rank 0 writes."""
        c = self.context
        model = move_to_device(load_cluster_model(c.inputs["model"]), c.world.device).eval()
        parts = [top_clusters(logits.float()) for logits in self._logits(model)]
        width = min(NUM_TOP, model.num_clusters)
        probability = torch.cat([p for p, _ in parts]) if parts else torch.empty(0, width)
        top = (
            torch.cat([t for _, t in parts]) if parts else torch.empty(0, width, dtype=torch.int64)
        )
        probability, top = gather_rows(probability), gather_rows(top)
        if c.world.rank == 0:
            Assignments(
                top[:, 0].numpy(), model.num_clusters, probability[:, 0].numpy(), top.numpy()
            ).save(c.out)
        barrier()

    def _logits(self, model: ClusterModel) -> Iterator[Tensor]:
        c, config = self.context, self.config
        if config.features is not None:
            from dist_scan.data.feature_table import FeatureTable

            table = FeatureTable.open(c.inputs["features"])
            for rows in _chunks(table.num_rows, config.batch, c.world.rank, c.world.world_size):
                yield model.from_features(
                    torch.from_numpy(table.rows(rows, 0)).to(c.world.device).float()
                )
            return
        from dist_scan.data.feed import eval_batches
        from dist_scan.data.images import open_images
        from dist_scan.stages.beton import beton_path

        loader, recipes = open_images(
            beton_path(c.inputs["images"]), (config.recipe,), config.batch, c.run, c.world
        )
        blocks = _chunks(loader.num_images, config.batch, c.world.rank, c.world.world_size)
        rows = np.concatenate(blocks) if blocks else np.arange(0)
        for batch in eval_batches(loader, recipes[0], rows, c.world.device):
            with autocast(config.precision, c.world.device):
                yield model(batch.views[0])


def _chunks(num_rows: int, batch: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's contiguous run of whole batches: the same batches, hence the same bits, for any number of ranks."""
    blocks = [np.arange(s, min(s + batch, num_rows)) for s in range(0, num_rows, batch)]
    first, last = rank * len(blocks) // world_size, (rank + 1) * len(blocks) // world_size
    return blocks[first:last]
