"""The simulated week of benchmarks/goodput.py against its closed form."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.goodput import WEEK_S, Job, simulate_week


def test_without_faults_only_saving_costs() -> None:
    job = Job(1e15, save_s=10, interval_s=90, in_place_s=60, requeue_s=480, node_share=0.5)
    trained_s, faults = simulate_week(random.Random(0), job)
    assert trained_s == pytest.approx(0.9 * WEEK_S, abs=90)
    assert faults == 0


@pytest.mark.parametrize("mtbf_s", [3600.0, 600.0])
def test_many_weeks_give_the_expected_share(mtbf_s: float) -> None:
    """Between two faults (mean time M) I / (exp((I + s) / M) - 1) seconds are expected to count."""
    job = Job(mtbf_s, save_s=5, interval_s=300, in_place_s=60, requeue_s=480, node_share=0.25)
    rng = random.Random(1)
    mean_s = sum(simulate_week(rng, job)[0] for _ in range(300)) / 300
    between_faults_s = 300 / (math.exp(305 / mtbf_s) - 1)
    expected = between_faults_s / (mtbf_s + 0.75 * 60 + 0.25 * 480)
    assert mean_s / WEEK_S == pytest.approx(expected, rel=0.01)
