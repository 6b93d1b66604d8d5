"""Opening a .beton for a set of recipes: the one place where settings become a loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_scan.config import RunConfig
from dist_scan.data.augment.recipes import Recipe, RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.world.world import World, cores_per_rank


def open_images(
    path: Path, recipes: tuple[RecipeConfig, ...], batch: int, run: RunConfig, world: World
) -> tuple[BetonLoader, tuple[Recipe, ...]]:
    """A loader whose batches hold one view per recipe, and the recipes that colour them."""
    built = tuple(build_recipe(r, run.data.size, run.data.mean, run.data.std) for r in recipes)
    most = cores_per_rank(world)
    loader = BetonLoader(
        path,
        tuple(r.crop for r in built),
        seed=run.seed,
        batch_size=batch,
        workers=min(run.runtime.workers or most, most),
    )
    return loader, built


def input_description(recipe: RecipeConfig, run: RunConfig) -> dict[str, Any]:
    """How an image file becomes what the network sees, in words a stranger can follow (JSON): for whoever loads a model elsewhere."""
    crop = build_recipe(recipe, run.data.size, run.data.mean, run.data.std).crop
    data = run.data
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
