"""Trains any method: on images or features, with a network, neighbours and held-out rows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.data.batch import HeldOut
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
from dist_scan.data.images import input_description
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.data.order import split_held_out
from dist_scan.engine.embed import EmbedOptions, embed_images, weights_digest
from dist_scan.engine.precision import move_to_device, seed_step
from dist_scan.engine.train_state import TrainState
from dist_scan.heads.partition import HeadPartition, choose_partition
from dist_scan.methods.base import Method, MethodInputs
from dist_scan.models.backbone import build_backbone, load_backbone
from dist_scan.models.cluster_model import add_metadata
from dist_scan.monitoring.memory import free_memory
from dist_scan.stages._train_config import TrainConfig
from dist_scan.stages._training import train_in_stage
from dist_scan.stages.base import Context, Stage
from dist_scan.storage.artifacts import WORK, fingerprint
from dist_scan.storage.atomic import write_json, write_text
from dist_scan.world.collectives import barrier

EVAL_BATCH = 256
"""Images per batch where nothing is trained."""
MEMORY_NAMES = {"device": "GPU memory", "host": "host memory", "mapped": "the mapped files"}


class TrainInputs:
    """The inputs of a train stage. Raises ValueError if they do not fit each other."""

    def __init__(self, context: Context, config: TrainConfig) -> None:
        self.context = context
        self.config = config
        self.neighbours = self._open_neighbours("neighbours")
        self.features = self._open_features("features")
        if self.features is not None:
            self.num_images = self.features.num_rows
        else:
            # The loader reads the neighbours of a batch together with its anchors.
            rows_per_image = 1 if self.neighbours is None else 2
            batch = max(config.global_batch // context.world.world_size * rows_per_image, 1)
            self.loader, self.recipes = context.open_images(config.view_recipes(), batch)
            self.num_images = self.loader.num_images
        if self.neighbours is not None and self.neighbours.num_rows != self.num_images:
            raise ValueError(
                f"stages.{context.name}: {self.num_images} images but neighbours of "
                f"{self.neighbours.num_rows}; find the neighbours in the same split"
            )
        self.rows, self.held_out_rows = self._split_rows()
        self.partition = self._head_partition()

    def _open_neighbours(self, role: str) -> NeighbourTable | None:
        folder = self.context.inputs.get(role)
        return None if folder is None else NeighbourTable.open(folder)

    def _open_features(self, role: str) -> FeatureTable | None:
        folder = self.context.inputs.get(role)
        return None if folder is None else FeatureTable.open(folder)

    def _split_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows to train on, rows held out for the selection of heads)."""
        share, num_images = self.config.held_out_share, self.num_images
        if share == 0 or self.config.held_out_neighbours is not None:
            return np.arange(num_images), np.arange(0)
        rows, held_out_rows = split_held_out(num_images, share, self.context.run.seed)
        if len(held_out_rows) == 0:
            suggested = min(0.5, 100 / num_images)
            raise ValueError(
                f"stages.{self.context.name}.held_out_share: {share:g} of {num_images} images "
                f"holds out none; allowed: 0, or enough images of every cluster ({suggested:.2g} "
                f"holds out about {min(num_images // 2, 100)})"
            )
        return rows, held_out_rows

    def _head_partition(self) -> HeadPartition:
        """How the training is split over ranks; logged with the reason."""
        context, world_size = self.context, self.context.world.world_size
        if self.features is None:
            return "batch"
        partition, reason = choose_partition(
            world_size,
            self.config.method.partitionable_heads(),
            self.features.dim,
            self.config.global_batch,
            context.run.runtime.head_partition,
        )
        if world_size > 1:
            context.log(
                f"{context.name}: splitting the {partition} over {world_size} ranks ({reason})"
            )
        return partition

    def build_feed(self) -> ImageFeed | FeatureFeed:
        """The source of batches."""
        config, world = self.config, self.context.world
        # If heads or clusters are split over the ranks, every rank reads the whole batch.
        reader = world if self.partition == "batch" else replace(world, rank=0, world_size=1)
        sampler = None
        if self.neighbours is not None:
            sampler = NeighbourSampler(
                self.neighbours, config.num_neighbours, config.self_as_candidate
            )
        seed = self.context.run.seed
        plan = EpochPlan(
            self.rows, config.global_batch, seed, reader, config.steps_per_epoch, sampler
        )
        if self.features is not None:
            return FeatureFeed(self.features, plan, world.device, self._placement(self.features))
        return ImageFeed(self.loader, self.recipes, plan, world.device)

    def _placement(self, features: FeatureTable) -> Placement:
        """The memory from which features are read; logged with the reason.

        It may differ between ranks: the rows are the same.
        """
        context, world = self.context, self.context.world
        num_bytes = features.num_rows * features.num_views * features.dim * 2
        placement, reason = choose_placement(
            num_bytes,
            world.device.type == "cuda",
            free_memory(world.device),
            free_memory(torch.device("cpu")),
            world.local_world_size,
            context.run.runtime.feature_cache,
        )
        context.log(
            f"{context.name}: features of {features.num_rows:,} images x {features.num_views} "
            f"views x {features.dim} ({num_bytes / 2**30:.3f} GiB) are read from "
            f"{MEMORY_NAMES[placement]} ({reason})"
        )
        return placement

    def build_method(self) -> Method:
        """The method and its network on the device, with the same weights on every rank."""
        context, config, features = self.context, self.config, self.features
        backbone, backbone_config = None, config.network
        if config.network is not None:
            backbone = build_backbone(config.network)
        elif config.backbone is not None:
            backbone, backbone_config = load_backbone(context.inputs["backbone"])
        feature_dim: int = getattr(backbone, "num_features", 0)
        mean = std = None
        if features is not None:
            feature_dim = features.dim
            mean, std = features.mean_and_std()
        inputs = MethodInputs(
            num_images=self.num_images,
            global_batch=config.global_batch,
            seed=context.run.seed,
            on_features=features is not None,
            feature_dim=feature_dim,
            backbone=backbone,
            backbone_config=backbone_config,
            feature_mean=mean,
            feature_std=std,
            input_folders=context.inputs,
            head_partition=self.partition,
            epochs=config.epochs,
            work_dir=context.out / WORK / "clustering",
            stop_requested=lambda: context.stop.requested,
        )
        method = move_to_device(config.method_class(config.method, inputs), context.world.device)
        return method.double() if config.precision == "fp64" else method

    def build_held_out(self) -> HeldOut | None:
        """Held-out rows and their neighbours, as features or images; None if there are none."""
        context, config = self.context, self.config
        neighbours = self._open_neighbours("held_out_neighbours")
        if neighbours is not None:
            anchors = np.arange(neighbours.num_rows)
        else:
            neighbours, anchors = self.neighbours, self.held_out_rows
            if neighbours is None or len(anchors) == 0:
                return None
        ids = neighbours.rows(anchors)[0]
        features = self._open_features("held_out_features")
        if features is None and config.held_out_images is None:
            features = self.features
        if features is not None:
            return held_out_features(features, anchors, ids, context.world)
        role = "images" if config.held_out_images is None else "held_out_images"
        loader, recipes = context.open_images((RecipeConfig(name="center"),), EVAL_BATCH, role)
        return held_out_images(loader, recipes[0], anchors, ids, context.world)

    def embed(self, network: nn.Module, recipe: str | int = "center") -> FeatureTable:
        """Embed all images with a network in training; see `methods.base.Embed`. Collective.

        recipe: a name, or the number of one of the stage's recipes. Each call computes all
        features, except shards that an interrupted call has written with the same weights.
        """
        context, config = self.context, self.config
        if isinstance(recipe, str):
            recipe_config = RecipeConfig(name=recipe)
        else:
            recipe_config = config.view_recipes()[recipe]
        folder = context.out / WORK / "embed"
        if context.world.rank == 0:
            recipe_settings = recipe_config.model_dump(mode="json")
            content = fingerprint(recipe_settings, weights_digest(network))
            content_file = folder / "origin"
            if not content_file.exists() or content_file.read_text() != content:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_text(content_file, content)
        barrier()
        loader, recipes = context.open_images((recipe_config,), EVAL_BATCH)
        options = EmbedOptions(
            dim=cast(int, network.num_features),
            seed=context.run.seed,
            precision=config.precision,
            name=f"{context.name}: embed",
        )
        return embed_images(network, loader, recipes, folder, options, context.stop)


class TrainStage(Stage[TrainConfig]):
    """Writes what the method publishes: a backbone, a cluster model, heads, assignments."""

    Config = TrainConfig
    version = 2

    def run(self) -> None:
        """Train, from the newest checkpoint if there is one, and publish. Collective."""
        context, config = self.context, self.config
        seed_step(context.run.seed, 0, 0)
        inputs = TrainInputs(context, config)
        feed = inputs.build_feed()
        method = inputs.build_method()
        held_out = inputs.build_held_out()
        state = train_in_stage(context, config, method, feed, inputs.embed, held_out)
        if state.skipped or state.non_finite:
            context.log(
                f"{context.name}: {state.skipped} steps skipped (no image was confident), "
                f"{state.non_finite} updates skipped (not finite)"
            )
        self._publish(method, state)

    def _publish(self, method: Method, state: TrainState) -> None:
        context = self.context
        method.prepare_publish()
        if context.world.rank == 0:
            method.publish(context.out)
            if state.warnings:
                write_json(context.out / "warnings.json", [_summary(state.warnings)])
            add_metadata(
                context.out,
                input=input_description(RecipeConfig(name="center"), context.run),
                provenance={
                    "run": context.run.name,
                    "seed": context.run.seed,
                    "stage": context.name,
                    "fingerprint": context.out.name,
                    "method": self.config.method.kind,
                },
            )
        barrier()


def _summary(warnings: list[str]) -> str:
    """One line for the warnings of all epochs."""
    if len(warnings) == 1:
        return warnings[0]
    return f"in {len(warnings)} epochs; the last: {warnings[-1]}"
