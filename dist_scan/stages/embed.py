"""Backbone + images -> FeatureTable [N, V, D]: the bank of cached views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from dist_scan.config import DataConfig
from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.augment.recipes import RecipeConfig, resolution_warnings
from dist_scan.engine.precision import Precision
from dist_scan.models.backbone import BackboneConfig, build_backbone, load_embedder
from dist_scan.stages.base import Stage


class EmbedConfig(StageConfig):
    """V views of every image through a frozen backbone, in fp16."""

    kind: Literal["embed"] = "embed"
    images: Images = "train"
    backbone: Ref | None = None
    """A stage that published a backbone (a pretext, or `given`)."""
    pixels: bool = False
    """The normalised pixels themselves instead of a backbone: the baseline everything must beat."""
    projection: bool = False
    """Features after the pretext's MLP instead of before (SCAN mines its SimCLR neighbours there, FIDELITY.md 1.5)."""
    views: int = Field(default=1, ge=1)
    recipe: RecipeConfig = RecipeConfig(name="center")
    num_shards: int = Field(default=16, ge=1)
    """The unit of work and of resuming; part of the meaning, never derived from the number of ranks."""
    batch: int = Field(default=256, ge=1)
    precision: Precision = "fp32"

    def publishes(self) -> tuple[str, ...]:
        return ("features",)

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """Either a backbone or pixels; one centre crop is enough."""
        if self.pixels == (self.backbone is not None):
            raise ValueError(
                f"stages.{name}: give either backbone (a stage's name) or pixels: true"
            )
        if self.views > 1 and self.recipe.name == "center":
            raise ValueError(
                f"stages.{name}.views: {self.views} centre crops would be equal; allowed: 1. Give a random recipe, or views: 1"
            )

    def warnings(self, data: DataConfig) -> list[str]:
        return resolution_warnings((self.recipe,), data)


class EmbedStage(Stage):
    """Writes table.json and the shards."""

    Config = EmbedConfig

    def run(self) -> None:
        """Collective; goes on from the shards that are there."""
        from dist_scan.data.images import open_images
        from dist_scan.engine.embed import checked, embed_images
        from dist_scan.stages.beton import beton_path

        config, c = self.config, self.context
        if config.pixels:
            network = build_backbone(BackboneConfig(name="pixels"))
        else:
            network = checked(load_embedder(c.inputs["backbone"], config.projection))
        loader, recipes = open_images(
            beton_path(c.inputs["images"]),
            (config.recipe,) * config.views,
            config.batch,
            c.run,
            c.world,
        )
        sample = recipes[0](
            torch.zeros(1, recipes[0].crop.size, recipes[0].crop.size, 3, dtype=torch.uint8),
            [0],
            seed=0,
            epoch=0,
            view=0,
        )
        with torch.inference_mode():
            dim = network.eval()(sample).shape[1]
        c.say(
            f"{c.name}: {loader.num_images:,} images x {config.views} view{'s' * (config.views > 1)} x {dim} in float16: "
            f"{loader.num_images * config.views * dim * 2 / 2**30:.3g} GiB in {config.num_shards} shards"
        )
        embed_images(
            network,
            loader,
            recipes,
            c.out,
            dim,
            config.num_shards,
            c.run.seed,
            c.world,
            c.stop,
            config.precision,
            c.name,
        )
