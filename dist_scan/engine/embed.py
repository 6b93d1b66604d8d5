"""Embedding a set of images: every image becomes V rows of a feature table, shard by shard, by all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_scan.data.augment.recipes import Recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feature_table import FeatureTable
from dist_scan.engine.precision import Precision, autocast, in_precision, memory_format
from dist_scan.engine.stop import StopFlag
from dist_scan.monitoring.progress import Progress
from dist_scan.world.collectives import any_rank, barrier, broadcast_object
from dist_scan.world.world import World


@torch.inference_mode()
def embed_images(
    network: nn.Module,
    loader: BetonLoader,
    recipes: tuple[Recipe, ...],
    folder: Path,
    dim: int,
    num_shards: int,
    seed: int,
    world: World,
    stop: StopFlag,
    precision: Precision = "fp32",
    name: str = "embed",
) -> FeatureTable:
    """The table [N, V, D] of `network` (eval mode) on every image, one view per recipe. Collective; finished shards are kept.

    Shard s is made by rank s mod W, so its rows do not depend on the number of ranks. Raises Stopped between shards.
    """
    if world.rank == 0 and not (folder / "table.json").exists():
        FeatureTable.create(folder, loader.num_images, len(recipes), dim, num_shards)
    barrier()
    table = FeatureTable.open(folder)
    missing = broadcast_object(table.missing_shards())
    network = memory_format(network, world.device).eval()
    done = num_shards - len(missing)
    with Progress(name, num_shards, "shards", done=done, enabled=world.rank == 0) as progress:
        for turn in range(0, len(missing), world.world_size):
            stop.raise_if_requested()
            mine = missing[turn : turn + world.world_size]
            if world.rank < len(mine):
                table.write_shard(
                    mine[world.rank],
                    _rows(
                        network,
                        loader,
                        recipes,
                        table.shard_range(mine[world.rank]),
                        seed,
                        world,
                        precision,
                    ),
                )
            progress.advance(len(mine))
    barrier()
    return FeatureTable.open(folder)


def _rows(
    network: Callable,
    loader: BetonLoader,
    recipes: tuple[Recipe, ...],
    span: tuple[int, int],
    seed: int,
    world: World,
    precision: Precision,
) -> np.ndarray:
    parts = []
    for index, views in loader.batches(np.arange(*span), 0):
        images = [
            recipe(view.to(world.device, non_blocking=True), index, seed=seed, epoch=0, view=v)
            for v, (recipe, view) in enumerate(zip(recipes, views))
        ]
        with autocast(precision, world.device):
            features = [network(view).float() for view in in_precision(precision, tuple(images))]
        parts.append(torch.stack(features, 1).cpu().numpy())
    return np.concatenate(parts)


def checked(network: nn.Module) -> nn.Module:
    """The network, unless a weight is no number (a diverged checkpoint would embed everything to NaN)."""
    bad = [
        name
        for name, p in network.state_dict().items()
        if p.is_floating_point() and not torch.isfinite(p).all()
    ]
    if any_rank(bool(bad)):
        raise ValueError(
            f"the backbone has weights that are no numbers ({', '.join(bad[:3])}); train it again with a lower learning rate"
        )
    return network


def digest(network: nn.Module) -> str:
    """sha256 over a network's weights and statistics: two with the same embed the same."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy()
            if value.dim()
            else str(value.item()).encode()
        )
    return found.hexdigest()
