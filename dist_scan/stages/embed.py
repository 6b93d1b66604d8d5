"""Features of all images: V views of each by a frozen backbone, as a FeatureTable [N, V, D]."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from dist_scan.config import DataConfig
from dist_scan.config.stage import Images, Ref, StageConfig, Stages
from dist_scan.data.augment.recipes import Recipe, RecipeConfig, resolution_warnings
from dist_scan.engine.embed import EmbedOptions, embed_images, require_finite_weights
from dist_scan.engine.precision import Precision
from dist_scan.models.backbone import BackboneConfig, build_backbone, load_embedder
from dist_scan.stages.base import Stage


class EmbedConfig(StageConfig):
    """Settings of the features; they are stored as float16."""

    kind: Literal["embed"] = "embed"
    images: Images = "train"
    backbone: Ref | None = None
    """The backbone of this stage (kind train or pretrained)."""
    pixels: bool = False
    """Use the normalised pixels as features instead: the baseline for every backbone."""
    projection: bool = False
    """Features after the projection head of the pretext instead of before it; SCAN finds its
    neighbours there."""
    views: int = Field(default=1, ge=1)
    recipe: RecipeConfig = RecipeConfig(name="center")
    num_shards: int = Field(default=16, ge=1)
    """Unit of work and of resuming; the same for any number of ranks."""
    batch: int = Field(default=256, ge=1)
    precision: Precision = "fp32"

    def publishes(self) -> tuple[str, ...]:
        """A feature table."""
        return ("features",)

    def warnings(self, data: DataConfig) -> list[str]:
        """A warning if the recipe does not suit the size of the stored images."""
        return resolution_warnings([self.recipe], data)

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless there is one source of features, and views differ."""
        if self.pixels == (self.backbone is not None):
            raise ValueError(
                f"stages.{name}: give either backbone (a stage's name) or pixels: true"
            )
        if self.views > 1 and self.recipe.name == "center":
            raise ValueError(
                f"stages.{name}.views: {self.views} centre crops would be equal; allowed: 1. "
                "Give a random recipe, or views: 1"
            )


class EmbedStage(Stage[EmbedConfig]):
    """Writes table.json and the shards."""

    Config = EmbedConfig
    version = 2

    def run(self) -> None:
        """Compute the missing shards. Collective."""
        context, config = self.context, self.config
        if config.pixels:
            network = build_backbone(BackboneConfig(name="pixels"))
        else:
            network = load_embedder(context.inputs["backbone"], config.projection)
            require_finite_weights(network)
        loader, recipes = context.open_images((config.recipe,) * config.views, config.batch)
        dim = _feature_dim(network, recipes[0])
        gib = loader.num_images * config.views * dim * 2 / 2**30
        views = "view" if config.views == 1 else "views"
        context.log(
            f"{context.name}: {loader.num_images:,} images x {config.views} {views} x {dim} in "
            f"float16: {gib:.3g} GiB in {config.num_shards} shards"
        )
        options = EmbedOptions(
            dim, config.num_shards, context.run.seed, config.precision, context.name
        )
        embed_images(network, loader, recipes, context.out, options, context.stop)


@torch.inference_mode()
def _feature_dim(network: torch.nn.Module, recipe: Recipe) -> int:
    """Width of the network's features for images of this recipe."""
    size = recipe.crop.size
    black = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    image = recipe(black, np.zeros(1, np.int64), seed=0, epoch=0, view=0)
    return network.eval()(image).shape[1]
