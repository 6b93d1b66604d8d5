"""A published backbone, frozen + labels -> how well each layer's features can be told apart by a line: an evaluation, like `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from dist_scan.config import DataConfig
from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.augment.recipes import RecipeConfig, resolution_warnings
from dist_scan.data.order import batch_per_rank
from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
from dist_scan.engine.precision import Precision, autocast, memory_format, seed_step
from dist_scan.stages.base import Stage
from dist_scan.storage.artifacts import WORK
from dist_scan.storage.atomic import write_json
from dist_scan.world.collectives import all_sum, barrier


class ProbeConfig(StageConfig):
    """Defaults are DeepCluster's: 90 epochs of SGD at 0.01, lr / sqrt(1 + lr * weight_decay * step), random crops, ten crops at the end."""

    kind: Literal["probe"] = "probe"
    backbone: Ref
    images: Images = "train"
    test_images: Images = "val"
    layers: tuple[str, ...] = ("features",)
    """Names of modules of the network, or their unique endings (conv1 ... conv5 of alexnet_bn, layer4 of a ResNet); features: its output."""
    most_features: int = Field(default=9600, ge=1)
    """Maps are averaged down to a square grid with at most so many numbers: 9600 gives DeepCluster's sizes."""
    recipe: RecipeConfig = RecipeConfig(name="crop")
    optimizer: OptimizerConfig = OptimizerConfig(
        kind="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    schedule: ScheduleConfig = ScheduleConfig(kind="inverse_sqrt", decay=1e-4)
    epochs: int = Field(default=90, ge=1)
    steps_per_epoch: int | None = Field(default=None, ge=1)
    """Cut an epoch short (a trial run)."""
    global_batch: int = Field(default=256, ge=1)
    ten_crop: bool = True
    """Mean probability over corners, centre and their mirror images; false: the centre."""
    precision: Precision = "fp32"

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """Layers are there and differ."""
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"stages.{name}.layers: {list(self.layers)}; allowed: one or more names, each once"
            )
        self.check_ranks(name, 1)

    def check_ranks(self, name: str, world_size: int) -> None:
        """Batches divide over the ranks."""
        try:
            batch_per_rank(self.global_batch, world_size)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None

    def warnings(self, data: DataConfig) -> list[str]:
        return resolution_warnings((self.recipe,), data)


class ProbeStage(Stage):
    """Writes probe.json (top-1 per layer, on test_images) and the classifiers."""

    Config = ProbeConfig
    for_people = ("probe.json",)

    def run(self) -> None:
        """Collective; goes on from the newest good checkpoint."""
        from dist_scan.engine.checkpoint import CheckpointStore
        from dist_scan.engine.train_state import Checkpointer
        from dist_scan.engine.training_loop import Trainer, TrainSettings
        from dist_scan.monitoring.log import StageLog
        from dist_scan.monitoring.profile import TrainingProfile, training_setup

        c, config = self.context, self.config
        seed_step(c.run.seed, 0, 0)
        feed, probes = self._opened()
        schooling = TrainSettings(
            config.optimizer,
            config.schedule,
            config.epochs,
            c.run.seed,
            config.precision,
            c.run.runtime.log_every,
        )
        saver = Checkpointer(
            CheckpointStore(c.out / WORK / "checkpoints", c.run.runtime.keep_checkpoints, c.say),
            c.run.runtime.checkpoint_s,
        )
        log = StageLog(c.run.run_dir, c.name)
        timing = TrainingProfile(
            log,
            c.out,
            training_setup(c.run, c.world, config.global_batch, False),
            c.run.runtime.profile,
            c.say,
        )
        try:
            Trainer(
                probes, feed, schooling, lambda *_: None, saver, c.stop, log, timing, name=c.name
            ).run()
        finally:
            log.close()
        facts = self._tested(probes)
        if c.world.rank == 0:
            probes.publish(c.out)
            write_json(c.out / "probe.json", facts)
            c.say(
                f"{c.name}: "
                + ", ".join(f"{name} {value:.3f}" for name, value in facts["top1"].items())
            )
        barrier()

    def _opened(self):
        """The feed of labelled images, and fresh probes on the frozen network."""
        from dist_scan.data.beton.format import read_labels
        from dist_scan.data.feed import EpochPlan, ImageFeed
        from dist_scan.data.images import open_images
        from dist_scan.evaluate.linear_probe import LayerProbes, ProbesConfig
        from dist_scan.methods.base import MethodInputs
        from dist_scan.models.backbone import load_backbone
        from dist_scan.stages.beton import beton_path

        c, config = self.context, self.config
        path = beton_path(c.inputs["images"])
        labels = read_labels(path)
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise ValueError(
                f"stages.{c.name}: no image of '{config.images}' has a label; a probe needs labels, remove the stage"
            )
        loader, recipes = open_images(
            path, (config.recipe,), config.global_batch // c.world.world_size, c.run, c.world
        )
        feed = ImageFeed(
            loader,
            recipes,
            EpochPlan(rows, config.global_batch, c.run.seed, c.world, config.steps_per_epoch),
            c.world.device,
        )
        backbone, backbone_config = load_backbone(c.inputs["backbone"])
        inputs = MethodInputs(
            len(labels),
            config.global_batch,
            c.run.seed,
            backbone=backbone,
            backbone_config=backbone_config,
            epochs=config.epochs,
        )
        sample = torch.zeros(2, 3, recipes[0].crop.size, recipes[0].crop.size)
        wanted = ProbesConfig(layers=config.layers, most_features=config.most_features)
        return feed, memory_format(
            LayerProbes(wanted, inputs, torch.from_numpy(labels.astype(np.int64)), sample),
            c.world.device,
        )

    def _tested(self, probes) -> dict[str, Any]:
        """Top-1 per layer over all labelled test images; each rank takes a part."""
        from dist_scan.data.beton.format import read_labels
        from dist_scan.data.feed import eval_batches
        from dist_scan.data.images import open_images
        from dist_scan.evaluate.linear_probe import count_correct
        from dist_scan.stages.beton import beton_path

        c, config, size = self.context, self.config, self.context.run.data.size
        path = beton_path(c.inputs["test_images"])
        labels = read_labels(path).astype(np.int64)
        rows = np.flatnonzero((labels >= 0) & (labels < probes.num_classes))
        whole = RecipeConfig(name="whole", size=round(size * 256 / 224) if size >= 160 else size)
        loader, recipes = open_images(path, (whole,), 128, c.run, c.world)
        hits, probes = torch.zeros(len(config.layers), dtype=torch.int64), probes.eval()
        for batch in eval_batches(
            loader,
            recipes[0],
            np.array_split(rows, c.world.world_size)[c.world.rank],
            c.world.device,
        ):
            with autocast(config.precision, c.world.device):
                hits += count_correct(
                    probes,
                    batch.views[0],
                    torch.from_numpy(labels)[batch.index].to(c.world.device),
                    size,
                    config.ten_crop,
                ).cpu()
        top1 = (all_sum(hits).double() / max(len(rows), 1)).tolist()
        return {
            "top1": dict(zip(config.layers, top1)),
            "widths": {n: h.in_features for n, h in zip(config.layers, probes.heads)},
            "num_test": len(rows),
            "crops": 10 if config.ten_crop else 1,
        }
