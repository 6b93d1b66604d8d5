"""Linear probes: how well labels can be predicted from each layer of a frozen backbone.

An evaluation: it uses labels, and nothing that it trains is part of a clustering.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from dist_scan.config.stage import Images, Ref, Stages
from dist_scan.data.augment.recipes import RecipeConfig
from dist_scan.data.beton.format import read_labels
from dist_scan.data.feed import EpochPlan, ImageFeed, eval_batches
from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
from dist_scan.engine.precision import autocast, move_to_device, seed_step
from dist_scan.evaluate.linear_probe import LayerProbes, LayerProbesConfig, count_correct
from dist_scan.methods.base import MethodInputs
from dist_scan.models.backbone import load_backbone
from dist_scan.stages._training import TrainingStageConfig, train_in_stage
from dist_scan.stages.base import Stage
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import all_sum, barrier

TEST_BATCH = 128


class ProbeConfig(TrainingStageConfig):
    """Settings of linear probes; the defaults are DeepCluster's."""

    kind: Literal["probe"] = "probe"
    backbone: Ref
    images: Images = "train"
    test_images: Images = "val"
    layers: tuple[str, ...] = ("features",)
    """Names of modules of the network, or their unique endings (conv1 to conv5 of alexnet_bn,
    layer4 of a ResNet); features: its output."""
    most_features: int = Field(default=9600, ge=1)
    """Feature maps are averaged down to a square grid with at most this many values; 9600 gives
    DeepCluster's sizes."""
    recipe: RecipeConfig = RecipeConfig(name="crop")
    optimizer: OptimizerConfig = OptimizerConfig(
        kind="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    schedule: ScheduleConfig = ScheduleConfig(kind="inverse_sqrt", decay=1e-4)
    epochs: int = Field(default=90, ge=1)
    global_batch: int = Field(default=256, ge=1)
    ten_crop: bool = True
    """Test with the mean probability over the corners, the centre and their mirror images; false:
    with the centre."""

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless there are layers, each named once."""
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"stages.{name}.layers: {list(self.layers)}; allowed: one or more names, each once"
            )
        # Errors that do not depend on the number of ranks.
        self.check_ranks(name, 1)


class ProbeStage(Stage[ProbeConfig]):
    """Writes probe.json (top-1 accuracy per layer on test_images) and the classifiers."""

    Config = ProbeConfig
    version = 2
    user_files = ("probe.json",)

    def run(self) -> None:
        """Train, from the newest checkpoint if there is one, and test. Collective."""
        context = self.context
        seed_step(context.run.seed, 0, 0)
        labels, feed = self._open_images()
        probes = self._build_probes(labels, feed)
        train_in_stage(context, self.config, probes, feed)
        results = self._test(probes)
        if context.world.rank == 0:
            probes.publish(context.out)
            write_json(context.out / "probe.json", results)
            accuracies = [f"{layer} {value:.3f}" for layer, value in results["top1"].items()]
            context.log(f"{context.name}: {', '.join(accuracies)}")
        barrier()

    def _open_images(self) -> tuple[np.ndarray, ImageFeed]:
        """(labels [N] of all images, feed of those that have one)."""
        context, config = self.context, self.config
        labels = read_labels(context.beton())
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise ValueError(
                f"stages.{context.name}: no image of '{config.images}' has a label; a probe needs "
                "labels, remove the stage"
            )
        world = context.world
        batch = config.global_batch // world.world_size
        loader, recipes = context.open_images((config.recipe,), batch)
        plan = EpochPlan(rows, config.global_batch, context.run.seed, world, config.steps_per_epoch)
        return labels, ImageFeed(loader, recipes, plan, world.device)

    def _build_probes(self, labels: np.ndarray, feed: ImageFeed) -> LayerProbes:
        """New probes on the frozen network, on the device."""
        context, config = self.context, self.config
        backbone, backbone_config = load_backbone(context.inputs["backbone"])
        inputs = MethodInputs(
            num_images=len(labels),
            global_batch=config.global_batch,
            seed=context.run.seed,
            backbone=backbone,
            backbone_config=backbone_config,
            epochs=config.epochs,
        )
        size = feed.recipes[0].crop.size
        probes = LayerProbes(
            LayerProbesConfig(layers=config.layers, most_features=config.most_features),
            inputs,
            torch.from_numpy(labels),
            torch.zeros(2, 3, size, size),
        )
        return move_to_device(probes, context.world.device)

    def _test(self, probes: LayerProbes) -> dict[str, Any]:
        """Top-1 accuracy per layer over all labelled test images. Collective."""
        context, config, world = self.context, self.config, self.context.world
        labels = read_labels(context.beton("test_images"))
        rows = np.flatnonzero((labels >= 0) & (labels < probes.num_classes))
        local_rows = np.array_split(rows, world.world_size)[world.rank]
        size = context.run.data.size
        whole_size = round(size * 256 / 224) if size >= 160 else size
        whole = RecipeConfig(name="whole", size=whole_size)
        loader, recipes = context.open_images((whole,), TEST_BATCH, "test_images")
        correct = torch.zeros(len(config.layers), dtype=torch.int64)
        probes.eval()
        for batch in eval_batches(loader, recipes[0], local_rows, world.device):
            batch_labels = torch.from_numpy(labels)[batch.index].to(world.device)
            with autocast(config.precision, world.device):
                batch_correct = count_correct(
                    probes, batch.views[0], batch_labels, size, config.ten_crop
                )
            correct += batch_correct.cpu()
        top1 = (all_sum(correct).double() / max(len(rows), 1)).tolist()
        return {
            "top1": dict(zip(config.layers, top1)),
            "widths": {layer: head.in_features for layer, head in zip(config.layers, probes.heads)},
            "num_test": len(rows),
            "crops": 10 if config.ten_crop else 1,
        }
