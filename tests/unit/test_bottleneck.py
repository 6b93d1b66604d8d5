"""The verdict's words: the figure is right and the setting it names exists."""

from __future__ import annotations

import re

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

SETTING = TrainingSetup(
    global_batch=256,
    world_size=2,
    device="cuda",
    cores=12,
    workers=12,
    stored="original",
    resolution=512,
    size=224,
    hosts=("n1", "n2"),
)


def seconds(*ranks: dict[str, float]) -> np.ndarray:
    return np.array([[rank.get(name, 0.0) for name in SECTIONS] for rank in ranks])


def test_data_wait_tells_both_rates_and_the_cores_that_are_missing() -> None:
    rank = {"data_wait": 4.1, "forward": 3.0, "backward": 2.9}
    found = find_bottleneck(seconds(rank, rank), 100, SETTING)
    assert found.waits_for == "data_wait" and found.fraction == pytest.approx(0.41)
    assert "data wait is 41% of a step of 100 ms on 12 cores" in found.text
    assert "the loader gives 2,560 images/s, the model could take 4,339" in found.text
    assert "store 256 px" in found.text and "add 9 cores" in found.text  # 12 / (1 - .41) = 20.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workers": 2}, "raise runtime.workers from 2 to 12"),
        ({"stored": "jpeg", "resolution": 256}, "data.stored: raw"),
        ({"stored": ""}, "cached features"),
    ],
)
def test_data_wait_names_what_can_be_changed_here(change, said) -> None:
    setting = TrainingSetup(**{**vars(SETTING), **change})
    assert said in find_bottleneck(seconds({"data_wait": 1, "forward": 1}), 1, setting).text


def test_a_late_rank_is_named_with_its_machine_and_section_not_the_network() -> None:
    fast = {"forward": 1.0, "backward": 1.0, "all_reduce": 1.1}
    slow = {"forward": 1.0, "backward": 1.0, "data_wait": 1.0, "all_reduce": 0.1}
    found = find_bottleneck(
        seconds(fast, fast, slow), 10, TrainingSetup(**{**vars(SETTING), "hosts": ("a", "b", "c")})
    )
    assert (
        found.waits_for == "rank"
        and "rank 2 on c takes 100 ms longer" in found.text
        and "data wait" in found.text
    )


def test_what_even_the_last_rank_waits_for_is_the_network() -> None:
    found = find_bottleneck(
        seconds({"forward": 1.0, "all_reduce": 1.05}, {"forward": 1.05, "all_reduce": 1.0}),
        10,
        SETTING,
    )
    assert found.waits_for == "all_reduce" and found.fraction == pytest.approx(1.0 / 2.05)


@pytest.mark.parametrize("name", [n for n in SECTIONS if n not in ("forward", "backward")])
def test_every_section_is_named_and_its_settings_exist(name) -> None:
    found = find_bottleneck(seconds({name: 1.0, "forward": 1.0}), 10, SETTING)
    assert found.waits_for == name and found.fraction == 0.5 and "50%" in found.text
    for block, field in re.findall(r"(runtime|slurm)\.(\w+)", found.text):
        assert field in (RuntimeConfig if block == "runtime" else SlurmConfig).model_fields, field
    assert set(REMEDIES) == {n for n in SECTIONS if n not in ("forward", "backward")}


def test_a_run_that_waits_for_its_model_is_told_so() -> None:
    found = find_bottleneck(
        seconds({"forward": 5.0, "backward": 4.7, "data_wait": 0.2, "all_reduce": 0.1}), 10, SETTING
    )
    assert (
        found.waits_for == "model"
        and found.fraction == pytest.approx(0.97)
        and "256 images/s" in found.text
    )


def test_shares_and_table() -> None:
    two = seconds({"forward": 3.0, "all_reduce": 1.0}, {"forward": 4.0})
    assert (
        section_fractions(two)["forward"] == pytest.approx(3.5 / 4)
        and section_fractions(two)["all_reduce"] == 0
    )
    assert section_table(two, 2)[0] == {
        "section": "forward",
        "share": 3.5 / 4,
        "mean_ms": 1750.0,
        "max_ms": 2000.0,
        "max_rank": 1,
    }


@pytest.mark.parametrize(
    ("bad", "steps"),
    [(np.zeros((1, len(SECTIONS))), 3), (np.ones((1, 3)), 3), (np.ones((1, len(SECTIONS))), 0)],
)
def test_nothing_to_judge_is_an_error(bad, steps) -> None:
    with pytest.raises(ValueError, match="finding a bottleneck needs"):
        find_bottleneck(bad, steps, SETTING)
