"""What the train stage passes to the training loop: feed, method, held-out rows, and embedding."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import nn

from dist_scan.data.augment.recipes import Recipe, RecipeConfig
from dist_scan.data.batch import HeldOut
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feature_cache import Placement, choose_placement
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import (
    EpochPlan,
    FeatureFeed,
    ImageFeed,
    NeighbourSampler,
    held_out_features,
    held_out_images,
)
from dist_scan.data.images import open_images
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.data.order import split_held_out
from dist_scan.engine.embed import EmbedOptions, embed_images, weights_digest
from dist_scan.engine.precision import move_to_device
from dist_scan.heads.partition import HeadPartition, choose_partition
from dist_scan.methods.base import Method, MethodInputs
from dist_scan.models.backbone import build_backbone, load_backbone
from dist_scan.monitoring.memory import free_memory
from dist_scan.stages._train_config import TrainConfig
from dist_scan.stages.base import Context
from dist_scan.stages.beton import beton_path
from dist_scan.storage.artifacts import WORK, fingerprint
from dist_scan.storage.atomic import write_text
from dist_scan.world.collectives import barrier

CENTRE_CROP = RecipeConfig(name="center")
EVAL_BATCH = 256
"""Images per batch where nothing is trained."""
MEMORY_NAMES = {"device": "GPU memory", "host": "host memory", "mapped": "the mapped files"}


@dataclass(frozen=True)
class TrainingData:
    """Images or features of a training, and which of their rows are trained on."""

    num_images: int
    rows: np.ndarray
    """Rows to train on."""
    held_out_rows: np.ndarray
    """Rows for the selection of heads, held out of the same images."""
    features: FeatureTable | None
    loader: BetonLoader | None
    """Images, if there are no features."""
    recipes: tuple[Recipe, ...]
    """One per view of an image."""
    neighbours: NeighbourTable | None
    partition: HeadPartition
    """What is split over the ranks: the batch, the heads, or the clusters of every head."""


def open_training_data(context: Context, config: TrainConfig) -> TrainingData:
    """Open the inputs of a train stage. Raises ValueError if they do not fit each other."""
    run, world = context.run, context.world
    neighbours = features = loader = None
    recipes: tuple[Recipe, ...] = ()
    if config.neighbours is not None:
        neighbours = NeighbourTable.open(context.inputs["neighbours"])
    if config.features is not None:
        features = FeatureTable.open(context.inputs["features"])
        num_images = features.num_rows
    else:
        # The loader reads the neighbours of a batch together with its anchors.
        rows_per_image = 1 if neighbours is None else 2
        batch = max(config.global_batch // world.world_size * rows_per_image, 1)
        path = beton_path(context.inputs["images"])
        loader, recipes = open_images(path, config.view_recipes(), batch, run, world)
        num_images = loader.num_images
    if neighbours is not None and neighbours.num_rows != num_images:
        raise ValueError(
            f"stages.{context.name}: {num_images} images but neighbours of {neighbours.num_rows}; "
            "find the neighbours in the same split"
        )
    rows, held_out_rows = _split_rows(context, config, num_images)
    partition = _head_partition(context, config, features)
    return TrainingData(
        num_images, rows, held_out_rows, features, loader, recipes, neighbours, partition
    )


def _split_rows(
    context: Context, config: TrainConfig, num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, held-out rows)."""
    share = config.held_out_share
    if share == 0 or config.held_out_neighbours is not None:
        return np.arange(num_images), np.arange(0)
    rows, held_out_rows = split_held_out(num_images, share, context.run.seed)
    if len(held_out_rows) == 0:
        suggested = min(0.5, 100 / num_images)
        raise ValueError(
            f"stages.{context.name}.held_out_share: {share:g} of {num_images} images holds out "
            f"none; allowed: 0, or enough images of every cluster ({suggested:.2g} holds out "
            f"about {min(num_images // 2, 100)})"
        )
    return rows, held_out_rows


def _head_partition(
    context: Context, config: TrainConfig, features: FeatureTable | None
) -> HeadPartition:
    """How the training is split over ranks; logged with the reason."""
    if features is None:
        return "batch"
    world_size = context.world.world_size
    partition, reason = choose_partition(
        world_size,
        config.method.partitionable_heads(),
        features.dim,
        config.global_batch,
        context.run.runtime.heads,
    )
    if world_size > 1:
        context.log(f"{context.name}: {partition} split over {world_size} ranks ({reason})")
    return partition


def build_feed(
    context: Context, config: TrainConfig, data: TrainingData
) -> ImageFeed | FeatureFeed:
    """The source of batches."""
    world = context.world
    # If heads or clusters are split over the ranks, every rank reads the whole batch.
    reader = world if data.partition == "batch" else replace(world, rank=0, world_size=1)
    sampler = None
    if data.neighbours is not None:
        sampler = NeighbourSampler(data.neighbours, config.num_neighbours, config.self_as_candidate)
    plan = EpochPlan(
        data.rows, config.global_batch, context.run.seed, reader, config.steps_per_epoch, sampler
    )
    if data.features is not None:
        placement = _feature_placement(context, data.features)
        return FeatureFeed(data.features, plan, world.device, placement)
    assert data.loader is not None
    return ImageFeed(data.loader, data.recipes, plan, world.device)


def _feature_placement(context: Context, table: FeatureTable) -> Placement:
    """The memory from which features are read; logged with the reason.

    It may differ between ranks: the rows are the same.
    """
    world = context.world
    num_bytes = table.num_rows * table.num_views * table.dim * 2
    placement, reason = choose_placement(
        num_bytes,
        world.device.type == "cuda",
        free_memory(world.device),
        free_memory(torch.device("cpu")),
        world.local_world_size,
        context.run.runtime.bank,
    )
    context.log(
        f"{context.name}: features of {table.num_rows:,} images x {table.num_views} views x "
        f"{table.dim} ({num_bytes / 2**30:.3f} GiB) are read from {MEMORY_NAMES[placement]} "
        f"({reason})"
    )
    return placement


def build_method(context: Context, config: TrainConfig, data: TrainingData) -> Method:
    """The method and its network on the device, with the same weights on every rank."""
    backbone, backbone_config = None, config.network
    if config.network is not None:
        backbone = build_backbone(config.network)
    elif config.backbone is not None:
        backbone, backbone_config = load_backbone(context.inputs["backbone"])
    feature_dim: int = getattr(backbone, "num_features", 0)
    mean = std = None
    if data.features is not None:
        feature_dim = data.features.dim
        mean, std = data.features.mean_and_std()
    inputs = MethodInputs(
        num_images=data.num_images,
        global_batch=config.global_batch,
        seed=context.run.seed,
        on_features=data.features is not None,
        feature_dim=feature_dim,
        backbone=backbone,
        backbone_config=backbone_config,
        feature_mean=mean,
        feature_std=std,
        input_folders=context.inputs,
        head_partition=data.partition,
        epochs=config.epochs,
        work_dir=context.out / WORK / "moment",
        stop_requested=lambda: context.stop.requested,
    )
    method = move_to_device(config.method_class(config.method, inputs), context.world.device)
    return method.double() if config.precision == "fp64" else method


def build_held_out(context: Context, config: TrainConfig, data: TrainingData) -> HeldOut | None:
    """Held-out rows and their neighbours, as features or images; None if there are none."""
    if config.held_out_neighbours is not None:
        neighbours = NeighbourTable.open(context.inputs["held_out_neighbours"])
        anchors = np.arange(neighbours.num_rows)
    elif config.held_out_share and data.neighbours is not None:
        neighbours = data.neighbours
        anchors = data.held_out_rows
    else:
        return None
    ids = neighbours.rows(anchors)[0]
    features = data.features
    if config.held_out_features is not None:
        features = FeatureTable.open(context.inputs["held_out_features"])
    elif config.held_out_images is not None:
        features = None
    if features is not None:
        return held_out_features(features, anchors, ids, context.world)
    role = "images" if config.held_out_images is None else "held_out_images"
    loader, recipes = open_images(
        beton_path(context.inputs[role]), (CENTRE_CROP,), EVAL_BATCH, context.run, context.world
    )
    return held_out_images(loader, recipes[0], anchors, ids, context.world)


class ImageEmbedder:
    """Embeds all images of a train stage with a network in training (see `methods.base.Embed`).

    The features are computed anew in each call. Only shards that an interrupted call has written
    with the same weights are reused.
    """

    def __init__(self, context: Context, config: TrainConfig) -> None:
        self.context = context
        self.config = config

    def __call__(
        self,
        network: nn.Module,
        recipe: str | int = "center",
        num_shards: int = 16,
        name: str = "embed",
    ) -> FeatureTable:
        """recipe: a name, or the number of one of the stage's recipes. Collective."""
        context = self.context
        if isinstance(recipe, str):
            recipe_config = RecipeConfig(name=recipe)
        else:
            recipe_config = self.config.view_recipes()[recipe]
        folder = context.out / WORK / name
        if context.world.rank == 0:
            recipe_settings = recipe_config.model_dump(mode="json")
            origin = fingerprint(recipe_settings, num_shards, weights_digest(network))
            origin_file = folder / "made_of"
            if not origin_file.exists() or origin_file.read_text() != origin:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_text(origin_file, origin)
        barrier()
        loader, recipes = open_images(
            beton_path(context.inputs["images"]),
            (recipe_config,),
            EVAL_BATCH,
            context.run,
            context.world,
        )
        options = EmbedOptions(
            dim=cast(int, network.num_features),
            num_shards=num_shards,
            seed=context.run.seed,
            precision=self.config.precision,
            name=f"{context.name}: {name}",
        )
        return embed_images(network, loader, recipes, folder, options, context.stop)
