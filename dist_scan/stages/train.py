"""Any method, trained: the stage gives it images or features, a network, neighbours and held-out rows, and lets the loop run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from dist_scan import methods
from dist_scan.config import DataConfig
from dist_scan.config.kinds import AnyKind
from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.data.augment.recipes import RecipeConfig, resolution_warnings
from dist_scan.data.feature_cache import Placement, choose_placement
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.data.order import batch_per_rank, split_held_out
from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
from dist_scan.engine.precision import Precision, memory_format, seed_step
from dist_scan.heads.partition import HeadPartition, choose_partition
from dist_scan.methods.base import HeldOut, Method, MethodConfig, MethodInputs, method_class
from dist_scan.models.backbone import BackboneConfig, build_backbone, load_backbone
from dist_scan.models.cluster_model import add_facts
from dist_scan.monitoring.memory import free_memory
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import barrier


class TrainConfig(StageConfig):
    """One method's training."""

    kind: Literal["train"] = "train"
    method: Annotated[MethodConfig, AnyKind(methods)]
    images: Images | None = None
    """Train on decoded images of this split..."""
    features: Ref | None = None
    """...or on the cached views of this embed stage."""
    network: BackboneConfig | None = None
    """A fresh backbone (a pretext)."""
    backbone: Ref | None = None
    """A backbone that a stage published (with features: the one that made them, published along with the heads)."""
    model: Ref | None = None
    """A cluster model that a stage published (self-labelling starts from it)."""
    neighbours: Ref | None = None
    num_neighbours: int | None = Field(default=None, ge=0)
    """Use only so many of the table's neighbours; 0 pairs each image with another view of itself (the papers' K = 0)."""
    self_as_candidate: bool = False
    """The released SCAN code draws the image itself with probability 1/(K+1); the paper does not."""
    recipes: tuple[RecipeConfig, ...] = ()
    """One per view; left out: the method's own."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    """Over all ranks; the batch per rank is derived."""
    steps_per_epoch: int | None = Field(default=None, ge=1)
    """Cut an epoch short (a trial run)."""
    precision: Precision = "fp32"
    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows kept from training, for choosing heads."""
    held_out_features: Ref | None = None
    """Choose on these features instead (rows of train if no held_out_neighbours; else a set of their own, as published)."""
    held_out_neighbours: Ref | None = None
    held_out_images: Images | None = None
    """Choose on centre crops of this split (a network trained on images); with held_out_neighbours mined inside it."""

    def publishes(self) -> tuple[str, ...]:
        return method_class(self.method.kind).publishes

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """The method gets what it needs, once."""
        where, method = f"stages.{name}", method_class(self.method.kind)
        if (self.images is None) == (self.features is None):
            raise ValueError(
                f"{where}: give exactly one of images (train or val) and features (a stage's name)"
            )
        if sum(x is not None for x in (self.network, self.backbone, self.model)) != 1:
            raise ValueError(
                f"{where}: give exactly one of network (fresh), backbone and model (a stage's name)"
            )
        if self.features is not None and self.recipes:
            raise ValueError(
                f"{where}.recipes: cached features are not augmented; set the recipe in the embed stage '{self.features}', or give images"
            )
        if self.images is not None and self.held_out_features is not None:
            raise ValueError(
                f"{where}.held_out_features: a method that trains on images chooses on images too; give held_out_images, or held_out_share alone"
            )
        missing = [need for need in method.needs if getattr(self, need) is None]
        if missing or (self.model is not None and "model" not in method.needs):
            raise ValueError(
                f"{where}: method '{self.method.kind}' "
                + (
                    f"needs {' and '.join(f'`{m}:`' for m in missing)}"
                    if missing
                    else "starts from no cluster model; give `network:` or `backbone:` instead of `model:`"
                )
            )
        if method.uses_neighbours and self.neighbours is None:
            raise ValueError(
                f"{where}.neighbours: method '{self.method.kind}' needs neighbours; give the name of a neighbours stage"
            )
        wanted = method.recipes_for(self.method)
        if self.recipes and len(self.recipes) != len(wanted):
            raise ValueError(
                f"{where}.recipes: {len(self.recipes)} given, method '{self.method.kind}' wants {len(wanted)}, in the place of {', '.join(wanted)}"
            )
        self.check_ranks(name, 1)
        mined = getattr(earlier.get(self.neighbours), "num_neighbours", None)
        if mined is not None and self.num_neighbours is not None and self.num_neighbours > mined:
            raise ValueError(
                f"{where}.num_neighbours: {self.num_neighbours}, but stage '{self.neighbours}' mines {mined}; lower it"
            )

    def recipes_seen(self) -> tuple[RecipeConfig, ...]:
        """The stage's, else the method's own; none on features."""
        names = method_class(self.method.kind).recipes_for(self.method)
        return (
            ()
            if self.images is None
            else self.recipes or tuple(RecipeConfig(name=n) for n in names)
        )

    def warnings(self, data: DataConfig) -> list[str]:
        return resolution_warnings(self.recipes_seen(), data)

    def check_ranks(self, name: str, world_size: int) -> None:
        """Batches divide over the ranks, and the method can train on what a rank gets."""
        try:
            batch_per_rank(self.global_batch, world_size)
            self.method.check_batch(self.global_batch, world_size)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None

    def check_size(self, name: str, num_images: int, stages: Mapping[str, StageConfig]) -> None:
        """A batch must fit into the data, and clusters into the images."""
        if self.global_batch > num_images * (1 - self.held_out_share):
            allowed = int(num_images * (1 - self.held_out_share))
            raise ValueError(
                f"stages.{name}.global_batch: {self.global_batch} is larger than the data ({num_images} images"
                f"{f', {self.held_out_share:.0%} held out' if self.held_out_share else ''}); allowed: at most {allowed}, less the images that cannot be read. Lower it"
            )
        numbers = getattr(self.method, "num_clusters", 0)
        clusters = numbers if isinstance(numbers, int) else max(numbers)
        if clusters > num_images:
            raise ValueError(
                f"stages.{name}.method.num_clusters: {clusters} clusters of {num_images} images; allowed: at most {num_images}. Lower it"
            )


class TrainStage(Stage):
    """Publishes whatever the method publishes."""

    Config = TrainConfig

    def run(self) -> None:
        """Collective; goes on from the newest good checkpoint."""
        from dist_scan.data.images import input_description
        from dist_scan.engine.checkpoint import CheckpointStore
        from dist_scan.engine.train_state import Checkpointer
        from dist_scan.engine.training_loop import Trainer, TrainSettings
        from dist_scan.monitoring.log import StageLog
        from dist_scan.monitoring.profile import TrainingProfile, training_setup
        from dist_scan.storage.artifacts import WORK
        from dist_scan.storage.atomic import write_json

        c, config = self.context, self.config
        seed_step(c.run.seed, 0, 0)
        self._open()
        method = self._method()
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
            training_setup(c.run, c.world, config.global_batch, self.table is not None),
            c.run.runtime.profile,
            c.say,
        )
        try:
            at = Trainer(
                method,
                self.feed,
                schooling,
                self._embed,
                saver,
                c.stop,
                log,
                timing,
                self._held_out(),
                c.name,
                c.say,
            ).run()
        finally:
            log.close()
        if at.skipped or at.refused:
            c.say(
                f"{c.name}: {at.skipped} steps skipped (nobody was confident), {at.refused} updates refused (not a number)"
            )
        method.prepare_publish()
        if c.world.rank == 0:
            method.publish(c.out)
            if at.warnings:
                write_json(
                    c.out / "warnings.json",
                    at.warnings[-1:]
                    if len(at.warnings) == 1
                    else [f"in {len(at.warnings)} epochs; the last: {at.warnings[-1]}"],
                )
            add_facts(
                c.out,
                input=input_description(RecipeConfig(name="center"), c.run),
                provenance={
                    "run": c.run.name,
                    "seed": c.run.seed,
                    "stage": c.name,
                    "fingerprint": c.out.name,
                    "method": config.method.kind,
                },
            )
        barrier()

    def _open(self) -> None:
        """The feed: which rows, from where."""
        from dist_scan.data.feed import EpochPlan, FeatureFeed, ImageFeed, NeighbourSampler
        from dist_scan.data.images import open_images
        from dist_scan.stages.beton import beton_path

        c, config = self.context, self.config
        self.neighbours = NeighbourTable.open(c.inputs["neighbours"]) if config.neighbours else None
        self.table = FeatureTable.open(c.inputs["features"]) if config.features else None
        recipes = config.recipes_seen()
        if self.table is None:
            per_rank = config.global_batch // c.world.world_size * (2 if self.neighbours else 1)
            loader, built = open_images(
                beton_path(c.inputs["images"]), recipes, max(per_rank, 1), c.run, c.world
            )
        self.num_images = self.table.num_rows if self.table else loader.num_images
        if self.neighbours is not None and self.neighbours.num_rows != self.num_images:
            raise ValueError(
                f"stages.{c.name}: {self.num_images} images but the neighbours of {self.neighbours.num_rows}; mine them on the same split"
            )
        rows = np.arange(self.num_images)
        if config.held_out_share and config.held_out_neighbours is None:
            rows, self.held_rows = split_held_out(
                self.num_images, config.held_out_share, c.run.seed
            )
            if not len(self.held_rows):
                raise ValueError(
                    f"stages.{c.name}.held_out_share: {config.held_out_share:g} of {self.num_images} images holds out none; "
                    f"allowed: 0, or enough for every cluster to be met ({min(0.5, 100 / self.num_images):.2g} holds out about "
                    f"{min(self.num_images // 2, 100)})"
                )
        self.head_partition = self._share()
        readers = (
            c.world if self.head_partition == "batch" else replace(c.world, rank=0, world_size=1)
        )  # else every rank reads the whole batch
        sampler = None
        if self.neighbours is not None:
            sampler = NeighbourSampler(
                self.neighbours, config.num_neighbours, config.self_as_candidate
            )
        plan = EpochPlan(
            rows,
            config.global_batch,
            c.run.seed,
            readers,
            config.steps_per_epoch,
            sampler,
        )
        self.feed = (
            FeatureFeed(self.table, plan, c.world.device, self._place(self.table))
            if self.table
            else ImageFeed(loader, built, plan, c.world.device)
        )

    def _share(self) -> HeadPartition:
        """What ranks share; on features said once, with the reason."""
        c, config = self.context, self.config
        if self.table is None:
            return "batch"
        share, why = choose_partition(
            c.world.world_size,
            config.method.partitionable_heads(),
            self.table.dim,
            config.global_batch,
            c.run.runtime.heads,
        )
        if c.world.world_size > 1:
            c.say(f"{c.name}: {c.world.world_size} ranks share the {share} ({why})")
        return share

    def _place(self, table: FeatureTable) -> Placement:
        """Where the bank is read from; said once, with the bytes and the reason. Ranks may differ: the rows are the same."""
        c, size = self.context, table.num_rows * table.num_views * table.dim * 2
        place, why = choose_placement(
            size,
            c.world.device.type == "cuda",
            free_memory(c.world.device),
            free_memory(torch.device("cpu")),
            c.world.local_world_size,
            c.run.runtime.bank,
        )
        c.say(
            f"{c.name}: bank of {table.num_rows:,} images x {table.num_views} views x {table.dim} ({size / 2**30:.3f} GiB) read from "
            f"{dict(device='GPU memory', host='host memory', mapped='the mapped files')[place]} ({why})"
        )
        return place

    def _method(self) -> Method:
        """The method with its network, the same on every rank."""
        from dist_scan.storage.artifacts import WORK

        c, config = self.context, self.config
        backbone, backbone_config = None, config.network
        if config.network is not None:
            backbone = build_backbone(config.network)
        elif config.backbone is not None:
            backbone, backbone_config = load_backbone(c.inputs["backbone"])
        mean, std = self.table.mean_and_std() if self.table else (None, None)
        inputs = MethodInputs(
            num_images=self.num_images,
            global_batch=config.global_batch,
            seed=c.run.seed,
            on_features=self.table is not None,
            feature_dim=self.table.dim if self.table else getattr(backbone, "num_features", 0),
            backbone=backbone,
            backbone_config=backbone_config,
            feature_mean=mean,
            feature_std=std,
            input_folders=c.inputs,
            head_partition=self.head_partition,
            epochs=config.epochs,
            work_dir=c.out / WORK / "moment",
            stop_requested=lambda: c.stop.requested,
        )
        method = method_class(config.method.kind)(config.method, inputs)
        method = memory_format(method, c.world.device)
        return method.double() if config.precision == "fp64" else method

    def _held_out(self) -> HeldOut | None:
        """Rows for choosing, from features or images; None when the config asks for none."""
        from dist_scan.data.feed import held_out_features, held_out_images
        from dist_scan.data.images import open_images
        from dist_scan.stages.beton import beton_path

        c, config = self.context, self.config
        if not config.held_out_share and config.held_out_neighbours is None:
            return None
        table = (
            NeighbourTable.open(c.inputs["held_out_neighbours"])
            if config.held_out_neighbours
            else self.neighbours
        )
        if table is None:
            return None
        anchors = np.arange(table.num_rows) if config.held_out_neighbours else self.held_rows
        ids = table.rows(anchors)[0]
        if config.held_out_features or (self.table is not None and not config.held_out_images):
            features = (
                FeatureTable.open(c.inputs["held_out_features"])
                if config.held_out_features
                else self.table
            )
            return held_out_features(features, anchors, ids, c.world)
        path = beton_path(
            c.inputs["held_out_images"] if config.held_out_images else c.inputs["images"]
        )
        loader, recipes = open_images(path, (RecipeConfig(name="center"),), 256, c.run, c.world)
        return held_out_images(loader, recipes[0], anchors, ids, c.world)

    def _embed(
        self,
        network: torch.nn.Module,
        recipe: str | int = "center",
        num_shards: int = 16,
        name: str = "embed",
    ) -> FeatureTable:
        """For methods whose whole-set moment needs features of every image: made afresh at each call, but for the shards that a start
        which was asked to leave has made of the same weights. recipe: a name, or which of the stage's own."""
        import shutil

        from dist_scan.data.images import open_images
        from dist_scan.engine.embed import digest, embed_images
        from dist_scan.stages.beton import beton_path
        from dist_scan.storage.artifacts import WORK, fingerprint
        from dist_scan.storage.atomic import write_text

        c = self.context
        chosen = (
            RecipeConfig(name=recipe)
            if isinstance(recipe, str)
            else self.config.recipes_seen()[recipe]
        )
        folder = c.out / WORK / name
        if c.world.rank == 0:
            mark, made_of = (
                fingerprint(chosen.model_dump(mode="json"), num_shards, digest(network)),
                folder / "made_of",
            )
            if not made_of.exists() or made_of.read_text() != mark:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_text(made_of, mark)
        barrier()
        loader, recipes = open_images(
            beton_path(c.inputs["images"]), (chosen,), 256, c.run, c.world
        )
        return embed_images(
            network,
            loader,
            recipes,
            folder,
            network.num_features,
            num_shards,
            c.run.seed,
            c.world,
            c.stop,
            self.config.precision,
            f"{c.name}: {name}",
        )
