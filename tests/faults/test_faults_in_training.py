"""Rows 1 to 9, 11, 16 and 20 to 22 of docs/reliability.md: faults in one of two ranks.

Started as a user does, by the launcher.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_scan.data.beton.format import FIELD, HEADER, ROW
from dist_scan.monitoring.log import read_rows
from tests.support.faulted_run import LaunchResult, TinyRun

pytestmark = pytest.mark.timeout(600)
SAVE_EVERY_STEP = "runtime.checkpoint_s=1e-9"
STOPPED = 128 + signal.SIGUSR2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LaunchResult:
    """A run without faults."""
    done = TinyRun(tmp_path_factory.mktemp("undisturbed"))()
    assert done.code == 0, done.output
    assert len(done.losses()) == 20
    assert len(done.weights()) == 2
    assert not list(done.folder.glob("logs/stacks-*"))
    assert not (done.folder / "logs" / "faults.jsonl").exists()
    return done


def assert_same_result(done: LaunchResult, undisturbed: LaunchResult) -> None:
    """The run is done, with losses and weights equal to the bit."""
    assert done.code == 0, done.output
    assert (done.folder / "DONE").exists()
    assert done.losses() == undisturbed.losses()
    assert done.weights() == undisturbed.weights()


def repeated_steps(done: LaunchResult) -> int:
    """Number of steps that were repeated after a fault; each must have the same loss again."""
    first: dict[int, float] = {}
    repeated = 0
    for line in (done.folder / "logs" / "pretext.metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not row or "loss" not in row:
            continue
        repeated += row["step"] in first
        assert first.setdefault(row["step"], row["loss"]) == row["loss"]
    return repeated


def logged_faults(done: LaunchResult) -> list[dict[str, Any]]:
    """The faults that the launcher has logged."""
    text = (done.folder / "logs" / "faults.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoints(done: LaunchResult) -> list[Path]:
    """Folders of the checkpoints, the oldest first."""
    return sorted(done.folder.glob("stages/pretext/*/work/checkpoints/*"))


def test_rows_1_2_20_killed_ranks_and_a_taken_port(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    """kill -9 of rank 1 and then of rank 0, each in a step; the first rendezvous port is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = TinyRun(tmp_path)(
            faults=[
                {"kind": "kill", "rank": 1, "step": 7},
                {"kind": "kill", "rank": 0, "step": 14},
            ],
            taken_port=taken.getsockname()[1],
        )
    assert_same_result(done, undisturbed)
    assert "the rendezvous port was taken; trying another" in done.output
    assert done.output.count("starting again") == 3
    assert len(logged_faults(done)) == 2
    repeated_steps(done)


def test_row_3_an_exception_on_one_rank_is_the_error_that_is_shown(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    done = run("runtime.relaunches=0", faults=[{"kind": "exception", "rank": 1, "step": 5}])
    assert done.code == 1
    # The first error is printed last, without tracebacks of others after it.
    last = done.output[done.output.index("failed: ") :]
    assert last.startswith("failed: rank 1: InjectedError: injected fault at step 5 of rank 1")
    assert "Traceback" not in last, last
    errors = [json.loads(p.read_text()) for p in done.folder.glob("logs/error-rank*.json")]
    assert max(error["time"] for error in errors) - run.fired()[0]["time"] < 5
    assert_same_result(run(), undisturbed)


def test_row_4_a_stopped_rank_and_a_stuck_loader_are_noticed_by_the_watchdog(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    done = TinyRun(tmp_path)(
        "runtime.step_limit_s=6",
        "runtime.section_limit_s=40",
        SAVE_EVERY_STEP,  # 12 batches: the first are read before the first step
        faults=[
            {"kind": "stop", "rank": 1, "step": 6},
            {"kind": "hang", "rank": 1, "at": "batch", "step": 12},
        ],
    )
    assert_same_result(done, undisturbed)
    waiting = (done.folder / "logs" / "stacks-rank00000.txt").read_text()
    assert waiting.count("pretext: no progress for") == 2
    assert "all_reduce" in waiting
    # A stopped process writes its stacks when it continues.
    stuck = (done.folder / "logs" / "stacks-rank00001.txt").read_text()
    assert "was stopped" in stuck
    assert "limit: 6 s" in stuck
    assert "loader.py" in stuck
    faults = logged_faults(done)
    assert len(faults) == 2
    assert all("Stuck" in fault["fault"] and fault["advanced"] for fault in faults)


def test_rows_5_8_killed_at_every_point_of_a_save_and_saves_that_cannot_be_written(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    done = TinyRun(tmp_path)(
        SAVE_EVERY_STEP,
        faults=[
            {"kind": "full", "at": "write", "step": 1},
            {"kind": "read_only", "at": "prepare", "step": 3},
            {"kind": "kill", "at": "data", "step": 5},
            {"kind": "kill", "at": "manifest", "step": 2},
            {"kind": "kill", "at": "rename", "step": 2},
            {"kind": "kill", "at": "prune", "step": 2},
        ],
    )
    assert_same_result(done, undisturbed)
    assert done.output.count("could not save") == 2
    assert "File too large" in done.output
    assert "Read-only file system" in done.output
    assert "earlier checkpoints are intact" in done.output
    assert done.output.count("starting again") == 4
    # Nothing that a kill has left is taken for a checkpoint, and every start makes progress.
    assert "is damaged" not in done.output
    assert all(fault["advanced"] for fault in logged_faults(done))
    # One step each; none if the new checkpoint already had its name.
    assert repeated_steps(done) == 3


def test_rows_6_9_11_signals_at_the_start_in_a_step_and_after_the_end_and_a_flipped_bit(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    early = run(faults=[{"kind": "signal", "rank": 1, "at": "start"}])
    assert early.code == STOPPED
    assert "everything is saved" in early.output, early.output
    assert "pretext" not in early.output, early.output

    stopped = run(SAVE_EVERY_STEP, faults=[{"kind": "signal", "rank": 1, "step": 8}])
    assert stopped.code == STOPPED
    assert json.loads((run.folder / "STOPPED").read_text()) == {"signal": signal.SIGUSR2}
    # The step during which the signal arrives is finished and saved.
    saved = checkpoints(stopped)
    assert saved[-1].name == "step-000000009"

    file = saved[-1] / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = run(faults=[{"kind": "signal", "rank": 0, "at": "done"}])
    assert_same_result(done, undisturbed)
    assert f"{saved[-1].name} is damaged" in done.output
    assert saved[-2].name not in done.output
    assert not (run.folder / "STOPPED").exists()


def test_row_7_if_every_checkpoint_is_damaged_the_run_ends_without_a_relaunch(
    tmp_path: Path,
) -> None:
    run = TinyRun(tmp_path)
    stopped = run(SAVE_EVERY_STEP, faults=[{"kind": "signal", "rank": 0, "step": 3}])
    for path in checkpoints(stopped):
        (path / "state.pt").write_bytes(b"")
    for _ in range(2):
        refused = run()
        assert refused.code == 2, refused.output
        assert "not starting again at step 0" in refused.output
        assert "starting again (" not in refused.output
        assert refused.output.count("error: ") == 1
        assert "Traceback" not in refused.output
    # The damaged checkpoints are renamed, not removed.
    assert all(path.name.startswith("bad-") for path in checkpoints(refused))


def test_row_16_updates_that_are_not_finite_are_skipped_by_all_ranks(tmp_path: Path) -> None:
    done = TinyRun(tmp_path)(
        SAVE_EVERY_STEP,
        "runtime.keep_checkpoints=30",
        faults=[
            {"kind": "nan", "at": "loss", "rank": 1, "step": 3},
            {"kind": "nan", "at": "gradient", "rank": 0, "step": 4},
            {"kind": "inf", "at": "loss", "rank": 1, "step": 6, "times": 10},
        ],
    )
    assert done.code == 2, done.output
    assert "10 updates in a row" in done.output
    assert "image rows of rank 1: [" in done.output
    assert "of rank 0" not in done.output
    assert "starting again" not in done.output
    assert "Traceback" not in done.output

    rows = {r["step"]: r for r in read_rows(done.folder / "logs" / "pretext.metrics.jsonl")}
    assert [rows[step]["refused"] for step in (3, 4, 5, 6, 7)] == [0, 1, 2, 2, 3]
    assert math.isfinite(rows[5]["loss"])
    assert math.isfinite(rows[6]["loss"])

    states = {
        int(path.name.removeprefix("step-")): torch.load(path / "state.pt", weights_only=True)
        for path in checkpoints(done)
        if path.name.startswith("step-")
    }
    for state in states.values():
        for value in state["method"].values():
            assert not value.is_floating_point() or torch.isfinite(value).all()
    weights = {step: s["method"]["backbone.conv1.weight"] for step, s in states.items()}
    # The updates of steps 3 and 4 are skipped, that of step 5 is not.
    assert torch.equal(weights[3], weights[4])
    assert torch.equal(weights[4], weights[5])
    assert not torch.equal(weights[5], weights[6])


def test_rows_21_22_a_truncated_and_a_foreign_beton_file_are_refused(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    shutil.copytree(undisturbed.folder, run.folder)
    beton = next(run.folder.glob("stages/beton_train/*/images.beton"))
    content = beton.read_bytes()
    beton.write_bytes(content[:-100])
    truncated = run()
    assert truncated.code == 2, truncated.output
    assert "images.beton has" in truncated.output
    assert "Traceback" not in truncated.output

    # A file of the same size whose table describes other images.
    foreign_content = bytearray(content)
    foreign_content[HEADER.itemsize + 3 * FIELD.itemsize + 5 * ROW.itemsize + 1] ^= 1
    beton.write_bytes(foreign_content)
    foreign = run("stages.pretext.epochs=1")
    assert foreign.code == 2, foreign.output
    assert "pretext: 1/" not in foreign.output
    assert "images.beton" in foreign.output
    assert "starting again" not in foreign.output
