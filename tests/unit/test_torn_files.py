"""Small files of a run folder that are incomplete, of unknown content, or folders.

The launcher reads what can be read and never crashes.
"""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Never

import pytest

from launch import records, recovery

UNREADABLE = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b"[1]",
    b"null",
    b"\xff\xfe\x00",
    b'{"time": "2026',
    b"[" * 100_000,
]


@pytest.mark.parametrize(
    "name", ["STOPPED", "logs/faults.jsonl", "logs/idle_requeues", "logs/error-rank00000.json"]
)
@pytest.mark.parametrize("content", UNREADABLE)
def test_an_unreadable_file_counts_as_absent(tmp_path: Path, name: str, content: bytes) -> None:
    digest = recovery.prepare_start(tmp_path)
    (tmp_path / name).write_bytes(content)
    decision = recovery.decide(tmp_path, digest, 0, 5)
    assert (decision.action, decision.fruitless_starts) == ("relaunch", 1)
    assert "without an error message" in decision.reason
    # The new entry is on a line of its own.
    assert records.read_objects(tmp_path / "logs" / "faults.jsonl")[-1]["start"] == 0


def test_faults_before_and_after_an_incomplete_line_are_counted(tmp_path: Path) -> None:
    digest = recovery.prepare_start(tmp_path)
    log = tmp_path / "logs" / "faults.jsonl"
    log.write_text('{"start": 0, "advanced": false, "job": null}\n{"time": "2026')
    assert recovery.decide(tmp_path, digest, 1, 9).action == "relaunch"
    with open(log, "a") as file:
        file.write('[]\n{"advanced": false, "job": null}\n')
    assert recovery.logged_fruitless_starts(tmp_path) == 2
    assert recovery.decide(tmp_path, digest, 2, 9).action == "give_up"


def test_three_faults_end_the_run_although_none_can_be_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk faults.jsonl stays empty; the launcher passes the count on."""

    def append_object(*args: object) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device")

    digest = recovery.prepare_start(tmp_path)
    monkeypatch.setattr(records, "append_object", append_object)
    actions = []
    fruitless_starts = 0
    for start in range(3):
        decision = recovery.decide(tmp_path, digest, start, 20, fruitless_starts)
        actions.append(decision.action)
        fruitless_starts = decision.fruitless_starts
    assert actions == ["relaunch", "relaunch", "give_up"]
    # A start that has made progress resets the count.
    assert (
        recovery.decide(tmp_path, "another digest", 3, 20, fruitless_starts).fruitless_starts == 0
    )


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'{"signal": 999}', "signal 999"),
        (b'{"signal": null}', "unknown signal"),
        (b'{"signal": 15}', "SIGTERM"),
        (b'{"signal": -3}', "signal -3"),
    ],
)
def test_a_stop_by_an_unknown_signal_is_a_stop(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "STOPPED").write_bytes(content)
    decision = recovery.decide(tmp_path, "", 0, 5)
    assert decision.action == "stopped"
    assert decision.reason.startswith(f"{name}: ")


def test_requeues_without_progress_end_although_their_count_was_unreadable(tmp_path: Path) -> None:
    digest = recovery.prepare_start(tmp_path)
    (tmp_path / "STOPPED").write_text(json.dumps({"signal": int(signal.SIGUSR2)}))
    (tmp_path / "logs" / "idle_requeues").write_bytes(b"\xff")
    for _ in range(recovery.FRUITLESS_REQUEUE_LIMIT):
        decision = recovery.decide(tmp_path, digest, 0, 5)
    assert decision.action == "give_up"


@pytest.mark.parametrize(
    ("content", "text"), [(b"no \xff such", "no \ufffd such"), (b"", "FATAL_ERROR is empty")]
)
def test_the_error_marker_may_hold_any_bytes(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "FATAL_ERROR").write_bytes(content)
    decision = recovery.decide(tmp_path, "", 0, 5)
    assert decision.action == "fatal_error"
    assert text in decision.reason


def test_a_folder_in_place_of_a_marker_is_renamed_and_no_marker(tmp_path: Path) -> None:
    for name in ("DONE", "STOPPED", "logs/error-rank00000.json"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "content").write_text("x")
    assert recovery.decide(tmp_path, "", 0, 5).action == "relaunch"
    recovery.prepare_start(tmp_path)
    assert not (tmp_path / "DONE").exists()
    assert len(list(tmp_path.glob("bad-DONE-*/content"))) == 1
    assert len(list(tmp_path.glob("logs/bad-error-*/content"))) == 1


def test_a_file_name_that_is_not_utf8_does_not_end_the_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "a" / "f00" / "work" / "\udcff"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert len(recovery.prepare_start(tmp_path)) == 16
