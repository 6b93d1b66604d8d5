"""Faults in a training started as by a user: a launcher and two ranks, a fault in one of them."""

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

from dist_scan.config import FATAL_ERROR
from dist_scan.data.beton.format import FIELD, HEADER, ROW
from dist_scan.monitoring.log import read_rows
from tests.support.fault_checks import assert_equal_runs, flip_a_bit
from tests.support.faulted_run import LaunchResult, TinyRun

pytestmark = pytest.mark.timeout(600)
SAVE_EVERY_STEP = "runtime.checkpoint_s=1e-9"
REQUEUED = 128 + signal.SIGUSR2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LaunchResult:
    """The run without faults."""
    result = TinyRun(tmp_path_factory.mktemp("undisturbed"))()
    assert result.code == 0, result.output
    assert len(result.losses()) == 20
    assert len(result.weights()) == 2
    assert not list(result.folder.glob("logs/stacks-*"))
    assert not (result.folder / "logs" / "faults.jsonl").exists()
    return result


def num_repeated_steps(result: LaunchResult) -> int:
    """How many steps were done again after restarts; each must have given the same loss."""
    lines = (result.folder / "logs" / "pretext.metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(parse_line, lines) if "loss" in row]
    losses: dict[int, float] = {}
    for row in rows:
        assert losses.setdefault(row["step"], row["loss"]) == row["loss"]
    return len(rows) - len(losses)


def parse_line(line: str) -> dict[str, Any]:
    """A row of metrics.jsonl; {} if the line is incomplete."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def recorded_faults(result: LaunchResult) -> list[dict[str, Any]]:
    """The faults that the launcher has recorded."""
    lines = (result.folder / "logs" / "faults.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoints(result: LaunchResult) -> list[Path]:
    return sorted(result.folder.glob("stages/pretext/*/work/checkpoints/*"))


def test_killed_ranks_and_a_taken_port(undisturbed: LaunchResult, tmp_path: Path) -> None:
    """kill -9 of rank 1, then of rank 0; the first rendezvous finds its port taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        faults = [
            {"kind": "kill", "rank": 1, "step": 7},
            {"kind": "kill", "rank": 0, "step": 14},
        ]
        result = TinyRun(tmp_path)(faults=faults, taken_port=taken.getsockname()[1])
    assert_equal_runs(result, undisturbed)
    assert "the rendezvous port was taken; trying another" in result.output
    assert result.output.count("starting again") == 3
    assert len(recorded_faults(result)) == 2
    num_repeated_steps(result)


def test_an_exception_on_one_rank_is_the_error_that_is_shown(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    fault = {"kind": "exception", "rank": 1, "step": 5}
    failed = run("runtime.relaunches=0", faults=[fault])
    assert failed.code == 1
    shown = failed.output[failed.output.index("failed: ") :]
    assert shown.startswith("failed: rank 1: InjectedError: injected fault at step 5 of rank 1")
    assert "Traceback" not in shown, "the first error is shown last and alone"
    errors = [json.loads(p.read_text()) for p in failed.folder.glob("logs/error-rank*.json")]
    assert max(error["time"] for error in errors) - run.fired()[0]["time"] < 5
    assert_equal_runs(run(), undisturbed)


def test_the_watchdog_ends_a_stopped_rank_and_a_hanging_loader(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    result = TinyRun(tmp_path)(
        "runtime.step_limit_s=6",
        "runtime.section_limit_s=40",
        SAVE_EVERY_STEP,
        faults=[
            {"kind": "stop", "rank": 1, "step": 6},
            # Batch 12: the first ones are read before the first step.
            {"kind": "hang", "rank": 1, "at": "batch", "step": 12},
        ],
    )
    assert_equal_runs(result, undisturbed)
    logs = result.folder / "logs"
    stacks = [(logs / f"stacks-rank0000{rank}.txt").read_text() for rank in (0, 1)]
    assert stacks[0].count("pretext: no progress for") == 2
    assert "all_reduce" in stacks[0]
    assert "was suspended" in stacks[1], "a stopped rank writes its stacks when it continues"
    assert "limit: 6 s" in stacks[1]
    assert "loader.py" in stacks[1]
    faults = recorded_faults(result)
    assert ["Stuck" in fault["fault"] for fault in faults] == [True, True]
    assert all(fault["advanced"] for fault in faults)


def test_killed_at_every_point_of_a_save_and_saves_that_fail(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    result = TinyRun(tmp_path)(
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
    assert_equal_runs(result, undisturbed)
    assert result.output.count("could not save") == 2
    assert "File too large" in result.output
    assert "Read-only file system" in result.output
    assert "earlier checkpoints are intact" in result.output
    assert result.output.count("starting again") == 4
    assert "is damaged" not in result.output, "an incomplete save is never taken for a checkpoint"
    assert all(fault["advanced"] for fault in recorded_faults(result))
    assert num_repeated_steps(result) == 3, "one for each kill before the rename, none after it"


def test_stop_signals_at_the_start_in_a_step_and_after_the_end_and_a_flipped_bit(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    early = run(faults=[{"kind": "signal", "rank": 1, "at": "start"}])
    assert early.code == REQUEUED, early.output
    assert "everything is saved" in early.output
    assert "pretext" not in early.output

    stopped = run(SAVE_EVERY_STEP, faults=[{"kind": "signal", "rank": 1, "step": 8}])
    assert stopped.code == REQUEUED, stopped.output
    assert json.loads((run.folder / "STOPPED").read_text()) == {"signal": signal.SIGUSR2}
    *_, before, newest = checkpoints(stopped)
    assert newest.name == "step-000000009", "the step of the signal is finished and saved"

    flip_a_bit(newest / "state.pt")
    result = run(faults=[{"kind": "signal", "rank": 0, "at": "done"}])
    assert_equal_runs(result, undisturbed)
    assert f"{newest.name} is damaged" in result.output
    assert before.name not in result.output
    assert not (run.folder / "STOPPED").exists()


def test_with_only_damaged_checkpoints_a_run_ends_without_a_relaunch(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    stopped = run(SAVE_EVERY_STEP, faults=[{"kind": "signal", "rank": 0, "step": 3}])
    for path in checkpoints(stopped):
        (path / "state.pt").write_bytes(b"")
    for _ in range(2):
        failed = run()
        assert failed.code == FATAL_ERROR, failed.output
        assert "not starting again at step 0" in failed.output
        assert "starting again (" not in failed.output
        assert failed.output.count("error: ") == 1
        assert "Traceback" not in failed.output
    assert all(path.name.startswith("bad-") for path in checkpoints(stopped))


def test_a_non_finite_loss_or_gradient_skips_the_update_on_all_ranks(tmp_path: Path) -> None:
    result = TinyRun(tmp_path)(
        SAVE_EVERY_STEP,
        "runtime.keep_checkpoints=30",
        faults=[
            {"kind": "nan", "at": "loss", "rank": 1, "step": 3},
            {"kind": "nan", "at": "gradient", "rank": 0, "step": 4},
            {"kind": "inf", "at": "loss", "rank": 1, "step": 6, "times": 10},
        ],
    )
    # Ten in a row end the run.
    assert result.code == FATAL_ERROR, result.output
    assert "10 updates in a row" in result.output
    assert "image rows of rank 1: [" in result.output
    assert "of rank 0" not in result.output
    assert "starting again" not in result.output
    assert "Traceback" not in result.output
    # Rows and checkpoints count steps from 1.
    rows = {r["step"]: r for r in read_rows(result.folder / "logs" / "pretext.metrics.jsonl")}
    assert [rows[n]["non_finite"] for n in (3, 4, 5, 6, 7)] == [0, 1, 2, 2, 3]
    assert math.isfinite(rows[5]["loss"])
    assert math.isfinite(rows[6]["loss"])
    states = {
        int(path.name.removeprefix("step-")): torch.load(path / "state.pt")["method"]
        for path in checkpoints(result)
        if path.name.startswith("step-")
    }
    for state in states.values():
        assert all(torch.isfinite(x).all() for x in state.values() if x.is_floating_point())
    weights = {step: state["backbone.conv1.weight"] for step, state in states.items()}
    assert torch.equal(weights[3], weights[4])
    assert torch.equal(weights[4], weights[5])
    assert not torch.equal(weights[5], weights[6])


def test_a_truncated_and_a_foreign_beton_are_refused(
    undisturbed: LaunchResult, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    shutil.copytree(undisturbed.folder, run.folder)
    beton = next(run.folder.glob("stages/beton_train/*/images.beton"))
    data = bytearray(beton.read_bytes())
    beton.write_bytes(data[:-100])
    truncated = run()
    assert truncated.code == FATAL_ERROR, truncated.output
    assert "images.beton has" in truncated.output
    assert "Traceback" not in truncated.output

    # A file of the same size that describes other images.
    data[HEADER.itemsize + 3 * FIELD.itemsize + 5 * ROW.itemsize + 1] ^= 1
    beton.write_bytes(data)
    foreign = run("stages.pretext.epochs=1")
    assert foreign.code == FATAL_ERROR, foreign.output
    assert "images.beton" in foreign.output
    assert "pretext: 1/" not in foreign.output
    assert "starting again" not in foreign.output
