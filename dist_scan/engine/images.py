"""Opening a .beton for a set of recipes: the one place where settings become a loader."""
from __future__ import annotations

import os
from pathlib import Path

from dist_scan.config import RunConfig
from dist_scan.data.augment import Recipe, RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.world.world import World


def open_images(path: Path, recipes: tuple[RecipeConfig, ...], batch: int, run: RunConfig, world: World) -> tuple[BetonLoader, tuple[Recipe, ...]]:
    """A loader whose batches hold one view per recipe, and the recipes that colour them."""
    built = tuple(build_recipe(r, run.data.size, run.data.mean, run.data.std) for r in recipes)
    cores = max(1, len(os.sched_getaffinity(0)) // world.local_world_size)
    loader = BetonLoader(path, tuple(r.crop for r in built), seed=run.seed, batch_size=batch, workers=min(run.runtime.workers or cores, cores))
    return loader, built
