"""Trainings made slow on purpose, in one section at a time: the verdict names each. Real loader, loop, checkpoints and gloo ranks."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest

from dist_scan.monitoring.log import read_rows
from dist_scan.monitoring.step_timer import SECTIONS
from tests.support.betons import build, folder
from tests.support.ranks import run_ranks

NAP_S, STEPS, BATCH = 0.25, 8, 8
REDUCE_NAP_S = 0.04  # a step has a dozen of them (batch norm's, the gradient's, the loop's)


def slowed(function, nap_s: float = NAP_S):
    """The same function, later."""

    def late(*args, **kwargs):
        time.sleep(nap_s)
        return function(*args, **kwargs)

    return late


def make_slow(what: str, rank: int) -> None:
    """Slow one part of this process."""
    import torch.distributed as dist

    from dist_scan.data.augment.recipes import Recipe
    from dist_scan.data.beton.loader import BetonLoader
    from dist_scan.engine.checkpoint import CheckpointStore
    from dist_scan.methods.simclr import SimCLRMethod

    if what == "data_wait":
        BetonLoader._decode_part = slowed(BetonLoader._decode_part)
    elif what == "augmentation":
        Recipe.__call__ = slowed(Recipe.__call__)
    elif what == "all_reduce":
        dist.all_reduce = slowed(dist.all_reduce, REDUCE_NAP_S)
    elif what == "save" and rank == 0:
        CheckpointStore._write = slowed(CheckpointStore._write)
    elif what == "model" or (what == "rank" and rank == 1):
        SimCLRMethod.forward = slowed(SimCLRMethod.forward)
    elif what == "end_step":
        SimCLRMethod.end_step = slowed(SimCLRMethod.end_step)


def profiled_training(what: str, beton, out):
    """A profiled training; returns what was said."""
    from dist_scan.config import RuntimeConfig
    from dist_scan.data.augment.recipes import RecipeConfig, build_recipe
    from dist_scan.data.beton.loader import BetonLoader
    from dist_scan.data.feed import EpochPlan, ImageFeed
    from dist_scan.engine.optimizer import OptimizerConfig, ScheduleConfig
    from dist_scan.engine.training_loop import TrainJob, TrainSettings, train
    from dist_scan.methods.base import MethodInputs, method_class
    from dist_scan.models.backbone import BackboneConfig, build_backbone
    from dist_scan.monitoring import profile
    from dist_scan.monitoring.bottleneck import TrainingSetup
    from dist_scan.world.world import current

    world, said, profile.TRACED_STEPS = current(), [], 2
    make_slow(what, world.rank)
    recipes = tuple(
        build_recipe(RecipeConfig(name="standard"), 16, (0.5,) * 3, (0.5,) * 3) for _ in range(2)
    )
    loader = BetonLoader(
        beton,
        tuple(r.crop for r in recipes),
        seed=0,
        batch_size=BATCH // world.world_size,
        workers=1,
    )
    feed = ImageFeed(
        loader, recipes, EpochPlan(np.arange(loader.num_images), BATCH, 0, world), world.device
    )
    network = BackboneConfig(name="resnet_small", width=4)
    cls = method_class("simclr")
    method = cls(
        cls.Config(kind="simclr", projection_dim=8),
        MethodInputs(
            num_images=loader.num_images,
            global_batch=BATCH,
            seed=0,
            feature_dim=16,
            backbone=build_backbone(network),
            backbone_config=network,
        ),
    )
    train(
        TrainJob(
            method=method,
            feed=feed,
            settings=TrainSettings(
                OptimizerConfig(kind="sgd", lr=0.01),
                ScheduleConfig(),
                epochs=-(-(STEPS + 3) // feed.steps_per_epoch),
                seed=0,
            ),
            run_dir=out,
            out=out,
            setup=TrainingSetup(BATCH, world.world_size, stored="jpeg", resolution=40, size=16),
            name="pretext",
            runtime=RuntimeConfig(
                keep_checkpoints=1,
                checkpoint_s=0.001 if what == "save" else 1e9,
                profile=STEPS,
            ),
            log=said.append,
        )
    )
    return said


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("images")
    return build(folder(path / "in", 48), path / "images.beton")


@pytest.mark.parametrize(
    ("what", "ranks"),
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
def test_what_was_made_slow_is_what_the_verdict_names(beton, tmp_path: Path, what, ranks) -> None:
    said = run_ranks(profiled_training, ranks, what, beton, tmp_path)
    facts = json.loads((tmp_path / "timing.json").read_text())
    assert facts["waits_for"] == what, facts["verdict"]
    assert any(facts["verdict"] in text and f"profile of {STEPS} steps" in text for text in said[0])
    assert facts["verdict"].startswith("rank 1") == (what == "rank")
    whole = sum(sum(facts["seconds_by_rank"][name]) for name in SECTIONS) / ranks
    assert (
        whole >= 0.9 * STEPS * NAP_S
    )  # the sections hold the time there was; a loader ahead of its reader hides part of a nap
    rows = [
        r["timing"] for r in read_rows(tmp_path / "logs" / "pretext.metrics.jsonl") if "timing" in r
    ]
    assert rows and rows[0]["steps"] == STEPS and set(rows[0]["sections"]) <= set(SECTIONS)
    for rank in range(ranks):
        trace = json.loads(
            gzip.decompress(
                (tmp_path / "logs" / f"pretext.trace-rank{rank:05d}.json.gz").read_bytes()
            )
        )
        assert {"forward", "backward", "optimizer"} <= {
            event.get("name") for event in trace["traceEvents"]
        }
