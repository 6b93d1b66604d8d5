"""FeatureTable -> NeighbourTable [N, K]: the exact nearest others of every image, itself removed by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from dist_scan.config.stage import Ref, StageConfig
from dist_scan.stages.base import Stage


class NeighboursConfig(StageConfig):
    """SCAN step 2: mined once, never again."""

    kind: Literal["neighbours"] = "neighbours"
    features: Ref
    num_neighbours: int = Field(default=20, ge=1)
    metric: Literal["cosine", "inner_product", "l2"] = "cosine"

    def publishes(self) -> tuple[str, ...]:
        return ("neighbours",)

    def check_size(self, name: str, num_images: int, stages: Mapping[str, StageConfig]) -> None:
        """K must leave room: an image is not its own neighbour."""
        if self.num_neighbours >= num_images:
            raise ValueError(
                f"stages.{name}.num_neighbours: {self.num_neighbours} neighbours need more than {num_images} images; "
                f"allowed: at most {num_images - 1}. Lower it, or give more images"
            )


class NeighboursStage(Stage):
    """Writes the neighbour table, shard by shard."""

    Config = NeighboursConfig

    def run(self) -> None:
        """Collective; goes on from the shards that are there."""
        from dist_scan.data.feature_table import FeatureTable
        from dist_scan.search.neighbours import mine_neighbours
        from dist_scan.search.options import NeighbourOptions

        c = self.context
        mine_neighbours(
            FeatureTable.open(c.inputs["features"]),
            c.out,
            self.config.num_neighbours,
            NeighbourOptions(metric=self.config.metric),
            stop_requested=lambda: c.stop.requested,
            show_progress=c.world.rank == 0,
        )
