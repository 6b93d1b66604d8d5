"""The simulated week against its closed form."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.goodput import WEEK_S, week


def test_without_faults_only_saving_costs() -> None:
    assert week(random.Random(0), 1e15, 10, 90, 60, 480, 0.5) == (
        pytest.approx(0.9 * WEEK_S, abs=90),
        0,
    )


@pytest.mark.parametrize("fault_s", [3600.0, 600.0])
def test_many_weeks_give_the_expected_share(fault_s) -> None:
    """Between faults (mean M) the expected good time is I / (exp((I + s) / M) - 1); a fault costs R."""
    rng, save_s, interval_s = random.Random(1), 5.0, 300.0
    weeks = [week(rng, fault_s, save_s, interval_s, 60.0, 480.0, 0.25) for _ in range(300)]
    expected = (
        interval_s
        / (math.exp((interval_s + save_s) / fault_s) - 1)
        / (fault_s + 0.75 * 60 + 0.25 * 480)
    )
    assert sum(good for good, _ in weeks) / len(weeks) / WEEK_S == pytest.approx(expected, rel=0.01)
