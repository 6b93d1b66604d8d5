"""Open a .beton with the recipes and settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_scan.config.run import RunConfig
from dist_scan.data.augment.recipes import Recipe, RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.world.world import World, cores_per_rank


def open_images(
    path: Path, recipes: tuple[RecipeConfig, ...], batch: int, run: RunConfig, world: World
) -> tuple[BetonLoader, tuple[Recipe, ...]]:
    """(loader, recipes): batches of the loader have one crop per recipe, for it to augment."""
    built = tuple(build_recipe(r, run.data.size, run.data.mean, run.data.std) for r in recipes)
    cores = cores_per_rank(world)
    loader = BetonLoader(
        path,
        tuple(recipe.crop for recipe in built),
        seed=run.seed,
        batch_size=batch,
        num_threads=min(run.runtime.loader_threads or cores, cores),
    )
    return loader, built


def input_description(recipe: RecipeConfig, run: RunConfig) -> dict[str, Any]:
    """How an image file becomes the network's input, as JSON for users of an exported model."""
    data = run.data
    crop = build_recipe(recipe, data.size, data.mean, data.std).crop
    stored = {
        "raw": "pixels as resized",
        "jpeg": f"JPEG of quality {data.quality}",
        "original": "the file's own JPEG where it is RGB",
    }
    return {
        "size": data.size,
        "mean": list(data.mean),
        "std": list(data.std),
        "range": "RGB / 255, then (x - mean) / std",
        "recipe": recipe.name,
        "resize_shorter_side": None if data.stored == "original" else data.resolution,
        "max_side": data.max_side,
        "interpolation": "bilinear, antialiased (Pillow)",
        "stored": stored[data.stored],
        "crop": crop.kind,
        "crop_of_shorter_side": crop.resize,
    }
