"""The pure parts of benchmarks/recovery.py: what is counted as lost, new and good, and when a goal is missed."""

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
    Exit,
    Kills,
    MetricsReader,
    Row,
    children,
    differing,
    ended,
    good_s,
    interval_steps,
    new_step_s,
    steps_lost,
)
from benchmarks.recovery import CASES, flip, judged
from tests.support.faults import FAULTS, Faults

# ten steps a second; at 0.55 a rank is killed; the run comes back at 3 s with step 4, which was saved last as step 3
SEEN = [Row(0.1 * n, n, 5.0 - n) for n in range(1, 6)] + [
    Row(3 + 0.1 * n, n, 5.0 - n) for n in range(4, 9)
]
EXITS = [Exit(0.6, 5), Exit(0.7, 5)]


def test_what_was_done_again_is_lost_and_told_when_it_differs() -> None:
    assert steps_lost(SEEN) == 2 and steps_lost(SEEN[:5]) == 0
    assert differing(SEEN) == 0 and differing([*SEEN, Row(9.0, 8, -2.9)]) == 1


def test_a_new_step_is_one_that_had_not_been_done_before_the_rank_ended() -> None:
    assert new_step_s(SEEN, EXITS, 0.55) == pytest.approx(3.6 - 0.55), (
        "step 6; 4 and 5 are done again"
    )
    assert new_step_s(SEEN, EXITS, 0.8) is None, "no rank ended after that"
    assert new_step_s(SEEN[:7], EXITS, 0.55) is None, "it never got further"
    assert new_step_s(SEEN, [Exit(0.05, 0)], 0.0) == pytest.approx(0.1), (
        "a fault before the first step"
    )


def test_a_fault_may_cost_the_most_steps_between_two_saves_and_one() -> None:
    steady = [Row(0.1 * n, n, 0.0) for n in range(100)]
    assert interval_steps(steady, 2.0) in (21, 22)  # 0.1 is no binary number
    assert interval_steps([*steady, *(Row(20 + 0.01 * n, n, 0.0) for n in range(50))], 0.495) == 51
    assert interval_steps([], 2.0) == 1


def test_good_is_the_training_of_steps_that_were_kept() -> None:
    assert good_s(SEEN, EXITS) == pytest.approx(0.2 + 0.4), (
        "2 and 3 of the first start, 5 to 8 of the second; 1 and 4 hold a start"
    )
    rng, at, rows = random.Random(0), 0.0, []
    for step in range(50):
        rows.append(Row(at := at + rng.random(), step, 0.0))
    assert good_s(rows, []) == pytest.approx(rows[-1].at - rows[0].at)


def test_rows_are_read_as_they_grow_and_torn_ones_left_out(tmp_path: Path) -> None:
    rows = MetricsReader(tmp_path / "pretext.metrics.jsonl")
    rows.look()
    assert rows.seen == []
    whole = json.dumps({"step": 1, "loss": 2.5}) + "\n"
    rows.path.write_text(whole + json.dumps({"step": 1, "timing": {}}) + "\n" + '{"step": 2, "lo')
    rows.look()
    rows.look()
    assert [(r.step, r.loss) for r in rows.seen] == [(1, 2.5)]
    with open(rows.path, "a") as f:
        f.write('ss": 1.5}\n{"step": 3, "lo\n' + json.dumps({"step": 3, "loss": 0.5}) + "\n")
    rows.look()
    assert [(r.step, r.loss) for r in rows.seen] == [(1, 2.5), (2, 1.5), (3, 0.5)]


def test_kills_come_at_random_with_their_mean_and_only_for_so_long() -> None:
    clock = [0.0]
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    kills = Kills(60.0, 600.0, seed=1, now=lambda: clock[0])
    first = kills.next
    clock[0] = first - 0.1
    kills.strike([victim.pid], stepped=True)
    assert kills.count == 0 and not ended(victim.pid)
    clock[0] = first
    kills.strike([], stepped=True)
    assert kills.count == 0, "nobody lives: the blow waits for the next start"
    kills.strike([victim.pid], stepped=True)
    assert (
        victim.wait() == -signal.SIGKILL
        and kills.count == 1
        and kills.early == 0
        and kills.next > first
        and ended(victim.pid)
    )
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    clock[0] = kills.next
    kills.strike([second.pid], stepped=False)
    assert second.wait() == -signal.SIGKILL and (kills.count, kills.early) == (2, 1)
    clock[0] = kills.next = 600.0
    kills.strike([victim.pid], stepped=True)
    assert kills.count == 2, "its time is over"
    gaps = [Kills(60.0, 1e9, seed, lambda: 0.0).next for seed in range(2000)]
    assert sum(gaps) / len(gaps) == pytest.approx(60, rel=0.1) and min(gaps) < 1 and max(gaps) > 300


def test_children_are_found() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in children(os.getpid()) and not ended(child.pid)
    finally:
        child.communicate(b"\n")


def test_a_row_names_what_fell_short() -> None:
    row = judged(
        "a case",
        {"new_step_s": 31.0, "identical": True, "steps_lost": 4},
        {
            "new_step_s": ("<", 30.0),
            "identical": ("==", True),
            "steps_lost": ("<", 4),
            "stalls": ("==", 0),
        },
    )
    assert row["missed"] == ["new_step_s", "steps_lost"] and row["goals"] == {
        "new_step_s": "< 30.0",
        "identical": "== True",
        "steps_lost": "< 4",
    }


def test_every_case_arms_a_fault_that_there_is() -> None:
    for case in CASES.values():
        FAULTS.validate_python(list(case.faults))


def test_one_bit_is_flipped_in_the_newest(tmp_path: Path) -> None:
    files = [
        tmp_path / "stages/pretext/f/work/checkpoints" / f"step-{n:09d}" / "state.pt"
        for n in (9, 10)
    ]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(100))
    flip(tmp_path)
    assert files[0].read_bytes() == bytes(100)
    assert sum(bin(byte).count("1") for byte in files[1].read_bytes()) == 1


def test_of_the_faults_at_stages_one_strikes_in_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, struck = tmp_path / "faults.json", []
    file.write_text(
        json.dumps([{"kind": "kill", "rank": rank, "at": "stage", "step": 1} for rank in (1, 0)])
    )
    monkeypatch.setattr(os, "kill", lambda *_: struck.append(len(struck)))
    for start, expected in ((1, 1), (2, 2)):
        ranks = [
            Faults(file, rank) for rank in (0, 1, 0)
        ]  # the last: rank 0, and later than the others to the stage
        for _ in range(2):
            for rank in ranks:
                rank.check("stage")
        assert len(struck) == expected, f"start {start}"
    assert not file.exists()
