"""benchmarks/recovery.py without its runs: what counts as lost, new and trained; missed goals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faulted_run import (
    LoggedStep,
    MetricsReader,
    RandomKills,
    RankExit,
    children,
    differing_steps,
    has_ended,
    interval_steps,
    repeated_steps,
    seconds_to_new_step,
    training_seconds,
)
from benchmarks.recovery import CASES, flip_bit, make_row
from tests.support.faults import FAULTS, Faults

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# Ten steps a second. At 0.55 s a rank is killed; the run is back at 3 s with step 4, because the
# last checkpoint was that of step 3.
BEFORE = [LoggedStep(0.1 * step, step, 5.0 - step) for step in range(1, 6)]
STEPS = BEFORE + [LoggedStep(3 + 0.1 * step, step, 5.0 - step) for step in range(4, 9)]
EXITS = [RankExit(0.6, 5), RankExit(0.7, 5)]


def test_repeated_steps_are_lost_and_must_give_the_same_loss() -> None:
    assert repeated_steps(STEPS) == 2
    assert repeated_steps(BEFORE) == 0
    assert differing_steps(STEPS) == 0
    assert differing_steps([*STEPS, LoggedStep(9.0, 8, -2.9)]) == 1


def test_a_new_step_had_not_been_done_before_the_rank_ended() -> None:
    new_step_s = seconds_to_new_step(STEPS, EXITS, 0.55)
    assert new_step_s == pytest.approx(3.6 - 0.55), "step 6; 4 and 5 are repeated"
    assert seconds_to_new_step(STEPS, EXITS, 0.8) is None, "no rank ended after that"
    assert seconds_to_new_step(STEPS[:7], EXITS, 0.55) is None, "no new step"
    before_first_step = seconds_to_new_step(STEPS, [RankExit(0.05, 0)], 0.0)
    assert before_first_step == pytest.approx(0.1)


def test_a_fault_may_cost_the_steps_between_two_saves_and_one() -> None:
    steady = [LoggedStep(0.1 * step, step, 0.0) for step in range(100)]
    assert interval_steps(steady, 2.0) in (21, 22)  # 0.1 is not a binary number
    faster = [LoggedStep(20 + 0.01 * step, step, 0.0) for step in range(50)]
    assert interval_steps([*steady, *faster], 0.495) == 51
    assert interval_steps([], 2.0) == 1


def test_training_seconds_leave_out_starts_and_repeated_steps() -> None:
    # Steps 2 and 3 of the first start, 5 to 8 of the second; 1 and 4 include a start.
    assert training_seconds(STEPS, EXITS) == pytest.approx(0.2 + 0.4)
    rng = random.Random(0)
    time = 0.0
    steps = []
    for step in range(50):
        time += rng.random()
        steps.append(LoggedStep(time, step, 0.0))
    assert training_seconds(steps, []) == pytest.approx(steps[-1].time - steps[0].time)


def test_rows_are_read_as_the_file_grows_and_incomplete_ones_skipped(tmp_path: Path) -> None:
    metrics = MetricsReader(tmp_path / "pretext.metrics.jsonl")
    metrics.read_new()
    assert metrics.steps == []
    complete = json.dumps({"step": 1, "loss": 2.5})
    without_loss = json.dumps({"step": 1, "timing": {}})
    metrics.path.write_text(f'{complete}\n{without_loss}\n{{"step": 2, "lo')
    metrics.read_new()
    metrics.read_new()
    assert [(step.step, step.loss) for step in metrics.steps] == [(1, 2.5)]
    with open(metrics.path, "a") as file:
        file.write('ss": 1.5}\n{"step": 3, "lo\n' + json.dumps({"step": 3, "loss": 0.5}) + "\n")
    metrics.read_new()
    assert [(step.step, step.loss) for step in metrics.steps] == [(1, 2.5), (2, 1.5), (3, 0.5)]


def test_random_kills_happen_when_due_and_until_the_end() -> None:
    clock = [0.0]
    first, second = subprocess.Popen(SLEEP), subprocess.Popen(SLEEP)
    kills = RandomKills(60.0, 600.0, seed=1, now=lambda: clock[0])
    first_time = kills.next_time
    clock[0] = first_time - 0.1
    kills.kill_if_due([first.pid], has_stepped=True)
    assert kills.count == 0
    assert not has_ended(first.pid)

    clock[0] = first_time
    kills.kill_if_due([], has_stepped=True)
    assert kills.count == 0, "no rank is alive: the kill waits for the next start"
    kills.kill_if_due([first.pid], has_stepped=True)
    assert first.wait() == -signal.SIGKILL
    assert has_ended(first.pid)
    assert (kills.count, kills.early_count) == (1, 0)
    assert kills.next_time > first_time

    clock[0] = kills.next_time
    kills.kill_if_due([second.pid], has_stepped=False)
    assert second.wait() == -signal.SIGKILL
    assert (kills.count, kills.early_count) == (2, 1)
    clock[0] = kills.next_time = 600.0
    kills.kill_if_due([first.pid], has_stepped=True)
    assert kills.count == 2, "the time is over"


def test_the_mean_interval_of_random_kills() -> None:
    intervals = [RandomKills(60.0, 1e9, seed, lambda: 0.0).next_time for seed in range(2000)]
    assert sum(intervals) / len(intervals) == pytest.approx(60, rel=0.1)
    assert min(intervals) < 1
    assert max(intervals) > 300


def test_children_are_found() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in children(os.getpid())
        assert not has_ended(child.pid)
    finally:
        child.communicate(b"\n")


def test_a_row_names_the_figures_that_miss_their_goal() -> None:
    figures = {"new_step_s": 31.0, "identical": True, "steps_lost": 4}
    goals = {
        "new_step_s": ("<", 30.0),
        "identical": ("==", True),
        "steps_lost": ("<", 4),
        "stalls": ("==", 0),
    }
    row = make_row("a case", figures, goals)
    assert row["missed"] == ["new_step_s", "steps_lost"]
    texts = {"new_step_s": "< 30.0", "identical": "== True", "steps_lost": "< 4"}
    assert row["goals"] == texts


def test_every_case_has_a_valid_fault() -> None:
    for case in CASES.values():
        FAULTS.validate_python(list(case.faults))


def test_one_bit_of_the_newest_checkpoint_is_flipped(tmp_path: Path) -> None:
    checkpoints = tmp_path / "stages" / "pretext" / "f" / "work" / "checkpoints"
    older, newest = (checkpoints / f"step-{step:09d}" / "state.pt" for step in (9, 10))
    for file in (older, newest):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(100))
    flip_bit(tmp_path)
    assert older.read_bytes() == bytes(100)
    assert sum(byte.bit_count() for byte in newest.read_bytes()) == 1


def test_at_most_one_fault_at_a_stage_happens_in_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "faults.json"
    faults = [{"kind": "kill", "rank": rank, "at": "stage", "step": 1} for rank in (1, 0)]
    file.write_text(json.dumps(faults))
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    for start in (1, 2):
        # The last is rank 0 again, later than the others at the stage.
        ranks = [Faults(file, rank) for rank in (0, 1, 0)]
        for _ in range(2):
            for rank in ranks:
                rank.check("stage")
        assert len(killed) == start
    assert not file.exists()
