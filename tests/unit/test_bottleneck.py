"""The bottleneck of a training: its figure is right, and the settings it names exist."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from dist_scan.config import RuntimeConfig, SlurmConfig
from dist_scan.monitoring.bottleneck import (
    REMEDIES,
    TrainingSetup,
    find_bottleneck,
    section_fractions,
    section_table,
)
from dist_scan.monitoring.step_timer import SECTIONS

SETUP = TrainingSetup(
    global_batch=256,
    world_size=2,
    device="cuda",
    cores=12,
    loader_threads=12,
    stored="original",
    resolution=512,
    size=224,
    hosts=("n1", "n2"),
)
OTHER_THAN_MODEL = [name for name in SECTIONS if name not in ("forward", "backward")]


def seconds(*ranks: dict[str, float]) -> np.ndarray:
    """Seconds [W, len(SECTIONS)] from those of each rank by section."""
    return np.array([[rank.get(name, 0.0) for name in SECTIONS] for rank in ranks])


def test_data_wait_is_shown_with_both_rates_and_the_missing_cores() -> None:
    rank = {"data_wait": 4.1, "forward": 3.0, "backward": 2.9}
    found = find_bottleneck(seconds(rank, rank), 100, SETUP)
    assert found.waits_for == "data_wait"
    assert found.fraction == pytest.approx(0.41)
    assert "data wait is 41% of a step of 100 ms on 12 cores" in found.text
    assert "the loader gives 2,560 images/s, the model could take 4,339" in found.text
    assert "store 256 px" in found.text
    assert "add 9 cores" in found.text  # 12 / (1 - 0.41) = 20.3


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"loader_threads": 2}, "raise runtime.loader_threads from 2 to 12"),
        ({"stored": "jpeg", "resolution": 256}, "data.stored: raw"),
        ({"stored": ""}, "cached features"),
    ],
)
def test_the_advice_on_data_wait_depends_on_the_setup(change: dict[str, Any], advice: str) -> None:
    setup = dataclasses.replace(SETUP, **change)
    found = find_bottleneck(seconds({"data_wait": 1, "forward": 1}), 1, setup)
    assert advice in found.text


def test_a_slow_rank_is_named_with_its_host_and_section() -> None:
    fast = {"forward": 1.0, "backward": 1.0, "all_reduce": 1.1}
    slow = {"forward": 1.0, "backward": 1.0, "data_wait": 1.0, "all_reduce": 0.1}
    setup = dataclasses.replace(SETUP, hosts=("a", "b", "c"))
    found = find_bottleneck(seconds(fast, fast, slow), 10, setup)
    assert found.waits_for == "rank"
    assert "rank 2 on c takes 100 ms longer" in found.text
    assert "data wait" in found.text


def test_all_reduce_that_even_the_last_rank_waits_for_is_the_network() -> None:
    first = {"forward": 1.0, "all_reduce": 1.05}
    last = {"forward": 1.05, "all_reduce": 1.0}
    found = find_bottleneck(seconds(first, last), 10, SETUP)
    assert found.waits_for == "all_reduce"
    assert found.fraction == pytest.approx(1.0 / 2.05)


@pytest.mark.parametrize("name", OTHER_THAN_MODEL)
def test_every_section_can_be_the_bottleneck_and_its_settings_exist(name: str) -> None:
    found = find_bottleneck(seconds({name: 1.0, "forward": 1.0}), 10, SETUP)
    assert found.waits_for == name
    assert found.fraction == 0.5
    assert "50%" in found.text
    for block, field in re.findall(r"(runtime|slurm)\.(\w+)", found.text):
        config = RuntimeConfig if block == "runtime" else SlurmConfig
        assert field in config.model_fields, field


def test_there_is_a_remedy_for_every_section_but_the_model() -> None:
    assert set(REMEDIES) == set(OTHER_THAN_MODEL)


def test_a_training_that_waits_for_its_model_is_well_configured() -> None:
    rank = {"forward": 5.0, "backward": 4.7, "data_wait": 0.2, "all_reduce": 0.1}
    found = find_bottleneck(seconds(rank), 10, SETUP)
    assert found.waits_for == "model"
    assert found.fraction == pytest.approx(0.97)
    assert "256 images/s" in found.text


def test_fractions_and_table() -> None:
    two_ranks = seconds({"forward": 3.0, "all_reduce": 1.0}, {"forward": 4.0})
    fractions = section_fractions(two_ranks)
    assert fractions["forward"] == pytest.approx(3.5 / 4)
    assert fractions["all_reduce"] == 0
    assert section_table(two_ranks, 2)[0] == {
        "section": "forward",
        "share": 3.5 / 4,
        "mean_ms": 1750.0,
        "max_ms": 2000.0,
        "max_rank": 1,
    }
