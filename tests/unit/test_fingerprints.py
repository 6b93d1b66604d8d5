"""What a stage's fingerprint covers: every setting is on one side or the other, and a test says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_scan.preflight import all_stages, fingerprints
from dist_scan.run_config import CompleteRunConfig, load_config

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
MEANING = {"seed", "data", "stages"}
RUNTIME = {"name", "runtime", "slurm"}


def marks(*overrides):
    return fingerprints(load_config(QUICK, list(overrides)), {"beton_train": "data"})


def changed(*overrides):
    before, after = marks(), marks(*overrides)
    return {name for name in before if before[name] != after[name]}


def test_every_top_level_setting_is_on_one_side() -> None:
    assert set(CompleteRunConfig.model_fields) == MEANING | RUNTIME


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "runtime.workers=3",
        "runtime.run_dir=elsewhere",
        "runtime.checkpoint_s=5",
        "runtime.device=cpu",
        "runtime.timeout_s=3",
        "slurm.partition=gpu",
        "runtime.log_every=2",
        "runtime.bank=mapped",
        "runtime.heads=clusters",
        "runtime.cache_dir=c",
        "data.train.source=moved/folder",
        "data.train.format=folder",
    ],
)
def test_where_and_how_it_runs_is_no_part_of_the_meaning(override) -> None:
    assert changed(override) == set()


@pytest.mark.parametrize(
    "override, first",
    [
        ("seed=1", "pretext"),
        ("stages.pretext.epochs=3", "pretext"),
        ("stages.heads.method.num_heads=3", "heads"),
        ("stages.neighbours.num_neighbours=21", "neighbours"),
        ("stages.report.seed_images=1", "report"),
        ("data.quality=50", "beton_train"),
        ("data.mean=[0.1,0.1,0.1]", "pretext"),
    ],
)
def test_a_meaning_changes_its_stage_and_what_stands_on_it(override, first) -> None:
    names = changed(override)
    assert first in names
    order = list(all_stages(load_config(QUICK)))
    assert all(order.index(n) >= order.index(first) for n in names)
    assert "report" in names


def test_the_data_is_part_of_the_meaning() -> None:
    run = load_config(QUICK)
    assert all(
        fingerprints(run, {"beton_train": "a"})[n] != fingerprints(run, {"beton_train": "b"})[n]
        for n in all_stages(run)
        if n != "x"
    )
