"""Features of all images: each image becomes V rows of a feature table, computed in shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_scan.data.augment.recipes import Recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feature_table import FeatureTable
from dist_scan.engine.precision import Precision, autocast, in_precision, move_to_device
from dist_scan.engine.stop import StopFlag
from dist_scan.monitoring.progress import Progress
from dist_scan.world.collectives import any_rank, barrier, broadcast_object
from dist_scan.world.world import current

EMBEDDING_EPOCH = -1
"""Used instead of an epoch in random draws, so that no epoch of a training has the same views."""


@dataclass(frozen=True)
class EmbedOptions:
    """Options of `embed_images`."""

    dim: int
    """Width of the network's features."""
    num_shards: int = 16
    """Part of the table that is computed at once; a resumed stage skips complete shards."""
    seed: int = 0
    """Seed of recipes with random crops or colours."""
    precision: Precision = "fp32"
    name: str = "embed"
    """Name of the progress line."""


@torch.inference_mode()
def embed_images(
    network: nn.Module,
    loader: BetonLoader,
    recipes: tuple[Recipe, ...],
    folder: Path,
    options: EmbedOptions,
    stop: StopFlag,
) -> FeatureTable:
    """Features [N, V, D] of `network` (eval mode) for all images, one view per recipe. Collective.

    The table is written to `folder`; finished shards there are kept. One rank computes a shard, so
    its rows do not depend on the number of ranks. Raises StopRequested between shards.
    """
    world = current()
    if world.rank == 0 and not (folder / "table.json").exists():
        FeatureTable.create(
            folder, (loader.num_images, len(recipes), options.dim), options.num_shards
        )
    barrier()
    table = FeatureTable.open(folder)
    missing = broadcast_object(table.missing_shards())
    network = move_to_device(network, world.device).eval()
    num_done = options.num_shards - len(missing)
    progress = Progress(
        options.name, options.num_shards, "shards", done=num_done, enabled=world.rank == 0
    )
    with progress:
        for first in range(0, len(missing), world.world_size):
            stop.raise_if_requested()
            # One round: a shard for each rank.
            shards = missing[first : first + world.world_size]
            if world.rank < len(shards):
                shard = shards[world.rank]
                start, end = table.shard_range(shard)
                features = _embed_rows(network, loader, recipes, np.arange(start, end), options)
                table.write_shard(shard, features)
            progress.advance(len(shards))
    barrier()
    return FeatureTable.open(folder)


def _embed_rows(
    network: nn.Module,
    loader: BetonLoader,
    recipes: tuple[Recipe, ...],
    rows: np.ndarray,
    options: EmbedOptions,
) -> np.ndarray:
    """Features [n, V, D] float32 of the images `rows` [n]."""
    device = current().device
    batches = []
    for index, views in loader.batches(rows, EMBEDDING_EPOCH):
        images = tuple(
            recipe(
                view.to(device, non_blocking=True),
                index,
                seed=options.seed,
                epoch=EMBEDDING_EPOCH,
                view=v,
            )
            for v, (recipe, view) in enumerate(zip(recipes, views))
        )
        with autocast(options.precision, device):
            features = [network(view).float() for view in in_precision(options.precision, images)]
        batches.append(torch.stack(features, 1).cpu().numpy())
    return np.concatenate(batches)


def require_finite_weights(network: nn.Module) -> None:
    """Raise ValueError on all ranks if a weight is not finite. Collective.

    A diverged network would turn all images into NaN.
    """
    bad = [
        name
        for name, value in network.state_dict().items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if any_rank(bool(bad)):
        raise ValueError(
            f"the network has weights that are not finite ({', '.join(bad[:3])}); "
            "train it again with a lower learning rate"
        )


def weights_digest(network: nn.Module) -> str:
    """sha256 over a network's weights and statistics: networks with equal digests embed equally."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.dim():
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        else:
            digest.update(str(value.item()).encode())
    return digest.hexdigest()
