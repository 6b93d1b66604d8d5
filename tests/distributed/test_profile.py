"""Trainings slowed down in one section at a time: the profile names that section.

With the real loader, training loop, checkpoints and gloo ranks.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from dist_scan.config import RuntimeConfig
from dist_scan.data.augment.recipes import Recipe, RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feed import EpochPlan, ImageFeed
from dist_scan.engine.checkpoint import CheckpointStore
from dist_scan.engine.optimizer import OptimizerConfig
from dist_scan.engine.training_loop import TrainingLoopConfig, TrainJob, train
from dist_scan.methods.base import Method, MethodInputs, method_class
from dist_scan.methods.simclr import SimCLRMethod
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.monitoring import profile
from dist_scan.monitoring.bottleneck import TrainingSetup
from dist_scan.monitoring.log import read_rows
from dist_scan.monitoring.step_timer import SECTIONS
from dist_scan.world.world import current
from tests.support.images import build_beton, write_image_folder
from tests.support.ranks import run_ranks

STEPS = 8
BATCH = 8
DELAY_S = 0.25
ALL_REDUCE_DELAY_S = 0.04  # a step calls it a dozen times (batch norm, gradient, training loop)


def delayed(function: Callable, delay_s: float = DELAY_S) -> Callable:
    """The function, called after a delay."""

    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(delay_s)
        return function(*args, **kwargs)

    return call


def slow_down(part: str, rank: int) -> None:
    """Slow down one part of this process."""
    if part == "data_wait":
        BetonLoader._decode_part = delayed(BetonLoader._decode_part)
    elif part == "augmentation":
        Recipe.__call__ = delayed(Recipe.__call__)
    elif part == "all_reduce":
        dist.all_reduce = delayed(dist.all_reduce, ALL_REDUCE_DELAY_S)
    elif part == "save" and rank == 0:
        CheckpointStore._write = delayed(CheckpointStore._write)
    elif part == "model" or (part == "rank" and rank == 1):
        SimCLRMethod.forward = delayed(SimCLRMethod.forward)
    elif part == "end_step":
        SimCLRMethod.end_step = delayed(SimCLRMethod.end_step)


def build_feed(beton: Path) -> ImageFeed:
    """Two augmented views of every image."""
    world = current()
    config = RecipeConfig(name="standard")
    recipes = tuple(build_recipe(config, 16, (0.5,) * 3, (0.5,) * 3) for _ in range(2))
    loader = BetonLoader(
        beton,
        tuple(recipe.crop for recipe in recipes),
        seed=0,
        batch_size=BATCH // world.world_size,
        num_threads=1,
    )
    plan = EpochPlan(np.arange(loader.num_images), BATCH, 0, world)
    return ImageFeed(loader, recipes, plan, world.device)


def build_method(num_images: int) -> Method:
    """SimCLR on a small backbone."""
    network = BackboneConfig(name="resnet_small", width=4)
    inputs = MethodInputs(
        num_images=num_images,
        global_batch=BATCH,
        seed=0,
        feature_dim=16,
        backbone=build_backbone(network),
        backbone_config=network,
    )
    method = method_class("simclr")
    return method(method.Config(kind="simclr", projection_dim=8), inputs)


def train_profiled(slow_part: str, beton: Path, out: Path) -> list[str]:
    """Run a profiled training; returns its messages."""
    messages: list[str] = []
    profile.TRACED_STEPS = 2
    slow_down(slow_part, current().rank)
    feed = build_feed(beton)
    epochs = -(-(STEPS + 3) // feed.steps_per_epoch)
    checkpoint_s = 0.001 if slow_part == "save" else 1e9
    train(
        TrainJob(
            method=build_method(feed.loader.num_images),
            feed=feed,
            settings=TrainingLoopConfig(
                optimizer=OptimizerConfig(kind="sgd", lr=0.01), epochs=epochs
            ),
            run_dir=out,
            out=out,
            setup=TrainingSetup(BATCH, current().world_size, stored="jpeg", resolution=40, size=16),
            name="pretext",
            runtime=RuntimeConfig(keep_checkpoints=1, checkpoint_s=checkpoint_s, profile=STEPS),
            log=messages.append,
        )
    )
    return messages


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    return build_beton(write_image_folder(path / "in", 48), path / "images.beton")


@pytest.mark.parametrize(
    ("slow_part", "world_size"),
    [
        ("data_wait", 1),
        ("augmentation", 1),
        ("end_step", 1),
        ("model", 1),
        ("all_reduce", 2),
        ("rank", 2),
        ("save", 1),
    ],
)
def test_the_slow_part_is_named_as_the_bottleneck(
    beton: Path, tmp_path: Path, slow_part: str, world_size: int
) -> None:
    messages = run_ranks(train_profiled, world_size, slow_part, beton, tmp_path)[0]
    timing = json.loads((tmp_path / "timing.json").read_text())
    text = timing["bottleneck"]
    assert timing["waits_for"] == slow_part, text
    assert text.startswith("rank 1") == (slow_part == "rank")
    assert any(f"profile of {STEPS} steps: {text}" in message for message in messages)

    # The sections contain the delays; a loader that is ahead hides a part of one.
    total_s = sum(sum(timing["seconds_by_rank"][name]) for name in SECTIONS) / world_size
    assert total_s >= 0.9 * STEPS * DELAY_S
    rows = read_rows(tmp_path / "logs" / "pretext.metrics.jsonl")
    first = next(row["timing"] for row in rows if "timing" in row)
    assert first["steps"] == STEPS
    assert set(first["sections"]) <= set(SECTIONS)

    for rank in range(world_size):
        path = tmp_path / "logs" / f"pretext.trace-rank{rank:05d}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert {"forward", "backward", "optimizer"} <= {event.get("name") for event in events}
