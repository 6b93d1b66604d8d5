"""What a stage's fingerprint covers: every setting either decides results, or does not count."""

from __future__ import annotations

import pytest

from dist_scan.preflight import all_stages, fingerprints
from dist_scan.run_config import CompleteRunConfig, load_config
from tests.support.launches import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
DECIDE_RESULTS = {"seed", "data", "stages"}
DO_NOT_COUNT = {"name", "runtime", "slurm"}


def stage_fingerprints(*overrides: str, data: str = "data") -> dict[str, str]:
    """The fingerprints of the quickstart's stages."""
    return fingerprints(load_config(QUICKSTART, overrides), {"beton_train": data})


def changed_stages(*overrides: str) -> set[str]:
    """The stages whose fingerprints these overrides change."""
    before, after = stage_fingerprints(), stage_fingerprints(*overrides)
    return {name for name in before if before[name] != after[name]}


def test_every_top_level_setting_is_known_here() -> None:
    assert set(CompleteRunConfig.model_fields) == DECIDE_RESULTS | DO_NOT_COUNT


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "runtime.loader_threads=3",
        "runtime.run_dir=elsewhere",
        "runtime.checkpoint_s=5",
        "runtime.device=cpu",
        "runtime.timeout_s=3",
        "slurm.partition=gpu",
        "runtime.log_every=2",
        "runtime.feature_cache=mapped",
        "runtime.head_partition=clusters",
        "runtime.cache_dir=c",
        "data.train.source=moved/folder",
        "data.train.format=folder",
    ],
)
def test_how_and_where_a_run_is_started_does_not_count(override: str) -> None:
    assert changed_stages(override) == set()


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
def test_a_setting_changes_its_stage_and_those_that_depend_on_it(override: str, first: str) -> None:
    changed = changed_stages(override)
    assert {first, "report"} <= changed
    order = list(all_stages(load_config(QUICKSTART)))
    assert all(order.index(name) >= order.index(first) for name in changed)


def test_other_images_change_every_stage() -> None:
    one, other = stage_fingerprints(data="one"), stage_fingerprints(data="other")
    assert all(one[name] != other[name] for name in one)
