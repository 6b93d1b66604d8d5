"""The exact nearest neighbours of every image, as a NeighbourTable [N, K]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_scan.config.stage import Ref, StageConfig
from dist_scan.data.feature_table import FeatureTable
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import NeighbourOptions
from dist_scan.stages.base import Stage


class NeighboursConfig(StageConfig):
    """Settings of the neighbours (step 2 of SCAN)."""

    kind: Literal["neighbours"] = "neighbours"
    features: Ref
    num_neighbours: int = Field(default=20, ge=1)
    """Number K of neighbours; the image itself is not one of them."""
    metric: Literal["cosine", "inner_product", "l2"] = "cosine"

    def publishes(self) -> tuple[str, ...]:
        """A neighbour table."""
        return ("neighbours",)

    def check_size(self, name: str, num_images: int) -> None:
        """Raise ValueError unless there are more images than neighbours."""
        if self.num_neighbours >= num_images:
            raise ValueError(
                f"stages.{name}.num_neighbours: {self.num_neighbours} neighbours need more than "
                f"{num_images} images; allowed: at most {num_images - 1}. Lower it, or give more "
                "images"
            )


class NeighboursStage(Stage[NeighboursConfig]):
    """Writes the neighbour table, shard by shard."""

    Config = NeighboursConfig

    def run(self) -> None:
        """Compute the missing shards. Collective."""
        context, config = self.context, self.config
        search_neighbours(
            FeatureTable.open(context.inputs["features"]),
            context.out,
            config.num_neighbours,
            NeighbourOptions(metric=config.metric),
            stop_requested=lambda: context.stop.requested,
        )
