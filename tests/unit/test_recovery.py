"""launch/recovery.py: the decision after a start has ended, from the files that it left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import recovery
from tests.support.launches import ROOT


def write_markers(run_dir: Path, **texts: str) -> None:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (run_dir / name).write_text(text)


def write_stop(run_dir: Path, number: signal.Signals) -> None:
    write_markers(run_dir, STOPPED=json.dumps({"signal": int(number)}))


def write_checkpoint(run_dir: Path, name: str) -> None:
    path = run_dir / "stages" / "pretext" / "f00" / "work" / "checkpoints" / name
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


def actions(run_dir: Path, digest: str, starts: range, relaunches: int = 9) -> list[str]:
    """The action after each of these starts, none of which makes progress."""
    return [recovery.decide(run_dir, digest, start, relaunches).action for start in starts]


def test_run_markers_determine_the_action(tmp_path: Path) -> None:
    digest = recovery.prepare_start(tmp_path)
    write_stop(tmp_path, signal.SIGUSR2)
    assert recovery.decide(tmp_path, digest, 0, 5).action == "requeue"
    write_stop(tmp_path, signal.SIGTERM)
    assert recovery.decide(tmp_path, digest, 0, 5).action == "stopped"
    write_markers(tmp_path, DONE="now")
    assert recovery.decide(tmp_path, digest, 0, 5).action == "done", "DONE comes before all others"

    assert recovery.prepare_start(tmp_path) == digest
    assert not (tmp_path / "DONE").exists()
    assert not (tmp_path / "STOPPED").exists()
    write_markers(tmp_path, FATAL_ERROR="data.train: no such folder\n")
    decision = recovery.decide(tmp_path, digest, 0, 5)
    assert decision[:2] == ("fatal_error", "data.train: no such folder")


def test_a_fault_is_relaunched_while_relaunches_are_left(tmp_path: Path) -> None:
    digest = recovery.prepare_start(tmp_path)
    write_checkpoint(tmp_path, "step-10")
    decision = recovery.decide(tmp_path, digest, 0, 5)
    assert decision.action == "relaunch"
    assert "killed?" in decision.reason
    assert recovery.decide(tmp_path, digest, 5, 5).action == "give_up"

    write_markers(tmp_path, PORT_TAKEN="")
    assert recovery.decide(tmp_path, digest, 1, 5).action == "relaunch"
    assert recovery.decide(tmp_path, digest, 5, 5).action == "give_up"
    lines = (tmp_path / "logs" / "faults.jsonl").read_text().splitlines()
    faults = [json.loads(line) for line in lines]
    assert [fault["start"] for fault in faults] == [0, 5, 5]
    assert all(fault["advanced"] for fault in faults)


def test_three_starts_without_progress_are_the_last(tmp_path: Path) -> None:
    expected = ["relaunch", "relaunch", "give_up"]
    digest = recovery.prepare_start(tmp_path)
    write_checkpoint(tmp_path, ".tmp-step-20")  # an unfinished checkpoint is no progress
    assert actions(tmp_path, digest, range(3)) == expected
    assert actions(tmp_path, digest, range(1)) == ["relaunch"], "the next job starts from zero"

    write_checkpoint(tmp_path, "step-10")
    recovery.decide(tmp_path, digest, 1, 9)
    digest = recovery.prepare_start(tmp_path)
    assert actions(tmp_path, digest, range(2, 5)) == expected


def test_a_requeued_job_counts_starts_without_progress_from_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ["relaunch", "relaunch", "give_up"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    digest = recovery.prepare_start(tmp_path)
    assert actions(tmp_path, digest, range(1, 4)) == expected
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert actions(tmp_path, digest, range(1, 4)) == expected


def test_requeues_without_progress_are_limited(tmp_path: Path) -> None:
    limit = recovery.FRUITLESS_REQUEUE_LIMIT
    digest = recovery.prepare_start(tmp_path)
    write_stop(tmp_path, signal.SIGUSR2)
    repeated = [recovery.decide(tmp_path, digest, 0, 5).action for _ in range(limit)]
    assert repeated == ["requeue"] * (limit - 1) + ["give_up"]

    write_checkpoint(tmp_path, "step-10")
    assert recovery.decide(tmp_path, digest, 0, 5).action == "requeue"
    digest = recovery.prepare_start(tmp_path)
    assert recovery.decide(tmp_path, digest, 0, 5).action != "requeue", "the marker is gone"


def test_the_reason_is_the_earliest_error_of_all_ranks(tmp_path: Path) -> None:
    digest = recovery.prepare_start(tmp_path)
    for rank, time in ((0, 5.0), (1, 3.0), (2, 4.0)):
        error = {"time": time, "rank": rank, "error": f"Boom: {rank}"}
        (tmp_path / "logs" / f"error-rank{rank:05d}.json").write_text(json.dumps(error))
    (tmp_path / "logs" / "error-rank00003.json").write_text("{incomplete")
    assert "rank 1: Boom: 1" in recovery.decide(tmp_path, digest, 0, 5).reason
    recovery.prepare_start(tmp_path)
    assert recovery.first_error(tmp_path) is None


def test_the_command_line_of_the_batch_script(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch" / "recovery.py"), *words]
        return subprocess.run(command, capture_output=True, text=True)

    digest = call("prepare", str(tmp_path)).stdout.strip()
    assert len(digest) == 16
    assert int(call("port").stdout) > 1023
    write_markers(tmp_path, DONE="now")
    result = call("decide", str(tmp_path), digest, "0", "3", "2")
    assert (result.stdout, result.stderr) == ("done 0\nthe run is complete\n", "")

    # The script passes the number of starts without progress on, because no file may be writable.
    (tmp_path / "DONE").unlink()
    result = call("decide", str(tmp_path), digest, "1", "9", "1")
    assert result.stdout.splitlines()[0] == "relaunch 2"
    result = call("decide", str(tmp_path), digest, "1", "9", "2")
    assert result.stdout.splitlines()[0] == "give_up 3"

    (tmp_path / "a file").write_text("")
    result = call("prepare", str(tmp_path / "a file"))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_an_unknown_command_of_another_version_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert recovery.main(["begin", "runs/x"]) == 2
    assert "unknown command 'begin'" in capsys.readouterr().err
