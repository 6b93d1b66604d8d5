"""RELIABILITY.md's rows 1 to 9, 11, 16 and 20 to 22 in the product as it is started: a launcher, two ranks, a fault in one of them."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path

import pytest
import torch

from dist_scan.data.beton.format import FIELD, HEADER, ROW
from dist_scan.monitoring.log import read_rows
from tests.support.faulted_run import LaunchResult, TinyRun

pytestmark = pytest.mark.timeout(600)
EVERY_STEP = "runtime.checkpoint_s=1e-9"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LaunchResult:
    """The undisturbed run."""
    done = TinyRun(tmp_path_factory.mktemp("whole"))()
    assert done.code == 0 and len(done.losses()) == 20 and len(done.weights()) == 2, done.output
    assert (
        not list(done.folder.glob("logs/stacks-*"))
        and not (done.folder / "logs" / "faults.jsonl").exists()
    )
    return done


def same(done: LaunchResult, whole: LaunchResult) -> None:
    assert done.code == 0 and (done.folder / "DONE").exists(), done.output
    assert done.losses() == whole.losses() and done.weights() == whole.weights(), (
        "not bit-identical"
    )


def every_row(done: LaunchResult) -> list[dict]:
    """Also the rows of steps that were done again, torn lines left out."""
    lines = (done.folder / "logs" / "pretext.metrics.jsonl").read_text().splitlines()
    return [r for r in map(parsed, lines) if r and "loss" in r]


def steps_lost(done: LaunchResult) -> int:
    """Steps that were done again; each must have given the same loss."""
    first: dict[int, float] = {}
    for row in every_row(done):
        assert first.setdefault(row["step"], row["loss"]) == row["loss"]
    return len(every_row(done)) - len(first)


def parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def faults(done: LaunchResult) -> list[dict]:
    return [
        json.loads(line)
        for line in (done.folder / "logs" / "faults.jsonl").read_text().splitlines()
    ]


def checkpoints(done: LaunchResult) -> list:
    return sorted(done.folder.glob("stages/pretext/*/work/checkpoints/*"))


def test_rows_1_2_20_killed_ranks_and_a_taken_port(whole, tmp_path: Path) -> None:
    """kill -9 of rank 1, then of rank 0, in a step; the first rendezvous finds its port taken."""
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
    same(done, whole)
    assert (
        "the rendezvous port was taken; trying another" in done.output
        and done.output.count("starting again") == 3
        and len(faults(done)) == 2
    )
    steps_lost(done)  # what was done again gave the same numbers


def test_row_3_an_exception_on_one_rank_is_the_error_that_is_shown(whole, tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    done = run("runtime.relaunches=0", faults=[{"kind": "exception", "rank": 1, "step": 5}])
    assert done.code == 1
    told = done.output[done.output.index("failed: ") :]
    assert told.startswith("failed: rank 1: InjectedError: injected fault at step 5 of rank 1"), (
        told
    )
    assert "Traceback" not in told, "the first error comes last, alone"
    left = max(json.loads(p.read_text())["time"] for p in done.folder.glob("logs/error-rank*.json"))
    assert left - run.fired()[0]["time"] < 5
    same(run(), whole)


def test_row_4_a_stopped_rank_and_a_stuck_loader_are_noticed_by_the_watchdog(
    whole, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    done = run(
        "runtime.step_limit_s=6",
        "runtime.section_limit_s=40",
        EVERY_STEP,  # 12 batches: the first are read before the first step
        faults=[
            {"kind": "stop", "rank": 1, "step": 6},
            {"kind": "hang", "rank": 1, "at": "batch", "step": 12},
        ],
    )
    same(done, whole)
    stacks = {
        rank: (done.folder / "logs" / f"stacks-rank0000{rank}.txt").read_text() for rank in (0, 1)
    }
    assert stacks[0].count("pretext: no progress for") == 2 and "all_reduce" in stacks[0]
    assert "was stopped" in stacks[1], "the stopped one writes its stacks when it wakes"
    assert "limit: 6 s" in stacks[1] and "loader.py" in stacks[1]
    assert [("Stuck" in f["fault"], f["advanced"]) for f in faults(done)] == [(True, True)] * 2


def test_rows_5_8_killed_at_every_point_of_a_save_and_saves_that_cannot_be_written(
    whole, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    done = run(
        EVERY_STEP,
        faults=[
            {"kind": "full", "at": "write", "step": 1},
            {"kind": "read_only", "at": "prepare", "step": 3},
            {"kind": "kill", "at": "data", "step": 5},
            *({"kind": "kill", "at": at, "step": 2} for at in ("manifest", "rename", "prune")),
        ],
    )
    same(done, whole)
    assert (
        done.output.count("could not save") == 2
        and "File too large" in done.output
        and "Read-only file system" in done.output
    )
    assert (
        "earlier checkpoints are intact" in done.output and done.output.count("starting again") == 4
    )
    assert "is damaged" not in done.output, (
        "nothing that a kill left behind was taken for a checkpoint"
    )
    assert all(f["advanced"] for f in faults(done)), (
        "never zero valid ones: every start got further"
    )
    assert steps_lost(done) == 3, (
        "one step each, where the new one had not got its name yet; none where it had"
    )


def test_rows_6_9_11_signals_at_the_start_in_a_step_and_after_the_end_and_a_flipped_bit(
    whole, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path)
    early = run(faults=[{"kind": "signal", "rank": 1, "at": "start"}])
    assert (
        early.code == 128 + 12
        and "everything is saved" in early.output
        and "pretext" not in early.output
    ), early.output
    stopped = run(EVERY_STEP, faults=[{"kind": "signal", "rank": 1, "step": 8}])
    assert stopped.code == 128 + 12 and json.loads((run.folder / "STOPPED").read_text()) == {
        "signal": 12
    }
    saved = checkpoints(stopped)
    assert saved[-1].name == "step-000000009", (
        "the step it came in is finished and saved: none is lost"
    )
    file = saved[-1] / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = run(faults=[{"kind": "signal", "rank": 0, "at": "done"}])
    same(done, whole)
    assert (
        f"{saved[-1].name} is damaged" in done.output
        and f"{saved[-2].name}" not in done.output
        and not (run.folder / "STOPPED").exists()
    )


def test_row_7_when_every_checkpoint_is_bad_it_refuses_once(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    stopped = run(EVERY_STEP, faults=[{"kind": "signal", "rank": 0, "step": 3}])
    for path in checkpoints(stopped):
        (path / "state.pt").write_bytes(b"")
    for _ in range(2):
        refused = run()
        assert (
            refused.code == 2
            and "not starting again at step 0" in refused.output
            and "starting again (" not in refused.output
        ), refused.output
        assert refused.output.count("error: ") == 1 and "Traceback" not in refused.output
    assert all(p.name.startswith("bad-") for p in checkpoints(refused)), "kept aside, not removed"


def test_row_16_what_is_no_number_is_refused_by_all_ranks(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    done = run(
        EVERY_STEP,
        "runtime.keep_checkpoints=30",
        faults=[
            {"kind": "nan", "at": "loss", "rank": 1, "step": 3},
            {"kind": "nan", "at": "gradient", "rank": 0, "step": 4},
            {"kind": "inf", "at": "loss", "rank": 1, "step": 6, "times": 10},
        ],
    )
    assert (
        done.code == 2
        and "10 updates in a row" in done.output
        and "image rows of rank 1: [" in done.output
        and "of rank 0" not in done.output
    ), done.output
    assert "starting again" not in done.output and "Traceback" not in done.output
    rows = {r["step"]: r for r in read_rows(done.folder / "logs" / "pretext.metrics.jsonl")}
    assert (
        [rows[n]["refused"] for n in (3, 4, 5, 6, 7)] == [0, 1, 2, 2, 3]
        and math.isfinite(rows[5]["loss"])
        and math.isfinite(rows[6]["loss"])
    )
    states = {
        int(p.name[5:]): torch.load(p / "state.pt", weights_only=True)
        for p in checkpoints(done)
        if p.name.startswith("step-")
    }
    assert all(
        torch.isfinite(v).all()
        for s in states.values()
        for v in s["method"].values()
        if v.is_floating_point()
    )
    weights = {step: s["method"]["backbone.conv1.weight"] for step, s in states.items()}
    assert torch.equal(weights[3], weights[4]) and torch.equal(weights[4], weights[5]), (
        "the updates of steps 3 and 4 were refused"
    )
    assert not torch.equal(weights[5], weights[6]), "that of step 5 was not"


def test_rows_21_22_a_beton_that_is_not_the_runs_own(whole, tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    shutil.copytree(whole.folder, run.folder)
    beton = next(run.folder.glob("stages/beton_train/*/images.beton"))
    good = beton.read_bytes()
    beton.write_bytes(good[:-100])
    cut = run()
    assert cut.code == 2 and "images.beton has" in cut.output and "Traceback" not in cut.output, (
        cut.output
    )
    data = bytearray(good)
    data[HEADER.itemsize + 3 * FIELD.itemsize + 5 * ROW.itemsize + 1] ^= (
        1  # a file of the same size that describes other images
    )
    beton.write_bytes(data)
    foreign = run("stages.pretext.epochs=1")
    assert (
        foreign.code == 2
        and "pretext: 1/" not in foreign.output
        and "images.beton" in foreign.output
        and "starting again" not in foreign.output
    ), foreign.output
