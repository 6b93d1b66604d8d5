"""Small files of a run folder that are torn, foreign or no files at all: the launcher reads what can be read and never crashes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Never

import pytest

from launch import records, recovery

GARBAGE = [
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
@pytest.mark.parametrize("found", GARBAGE)
def test_a_file_that_cannot_be_read_counts_as_absent(tmp_path: Path, name, found) -> None:
    mark = recovery.prepare_start(tmp_path)
    (tmp_path / name).write_bytes(found)
    decision = recovery.decide(tmp_path, mark, 0, 5)
    assert (decision.action, decision.idle_starts) == ("relaunch", 1) and "without an error message" in decision.reason
    assert records.read_objects(tmp_path / "logs" / "faults.jsonl")[-1]["start"] == 0, (
        "the next entry stands on a line of its own"
    )


def test_faults_behind_a_torn_line_are_counted(tmp_path: Path) -> None:
    mark = recovery.prepare_start(tmp_path)
    (tmp_path / "logs" / "faults.jsonl").write_text(
        '{"start": 0, "advanced": false, "job": null}\n{"time": "2026'
    )
    assert recovery.decide(tmp_path, mark, 1, 9).action == "relaunch"
    with open(tmp_path / "logs" / "faults.jsonl", "a") as f:
        f.write('[]\n{"advanced": false, "job": null}\n')
    assert (
        recovery.logged_idle_starts(tmp_path) == 2 and recovery.decide(tmp_path, mark, 2, 9).action == "give_up"
    )


def test_three_faults_are_the_last_also_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk faults.jsonl says nothing: the launcher hands each verdict's count to the next."""
    mark = recovery.prepare_start(tmp_path)

    def full(*_) -> Never:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "append_object", full)
    actions, idle = [], 0
    for start in range(3):
        action, _, idle = recovery.decide(tmp_path, mark, start, 20, idle)
        actions.append(action)
    assert actions == ["relaunch", "relaunch", "give_up"]
    assert recovery.decide(tmp_path, "another mark", 3, 20, idle).idle_starts == 0, (
        "a start that has finished something begins the count anew"
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (b'{"signal": 999}', "signal 999"),
        (b'{"signal": null}', "unknown signal"),
        (b'{"signal": 15}', "SIGTERM"),
        (b'{"signal": -3}', "signal -3"),
    ],
)
def test_a_signal_that_is_not_known_is_a_signal(tmp_path: Path, found, said) -> None:
    (tmp_path / "STOPPED").write_bytes(found)
    decision = recovery.decide(tmp_path, "", 0, 5)
    assert decision.action == "stopped" and decision.reason.startswith(f"{said}: ")


def test_requeues_that_get_nowhere_end_although_their_count_was_spoilt(tmp_path: Path) -> None:
    mark = recovery.prepare_start(tmp_path)
    (tmp_path / "STOPPED").write_text(json.dumps({"signal": int(signal.SIGUSR2)}))
    (tmp_path / "logs" / "idle_requeues").write_bytes(b"\xff")
    assert [recovery.decide(tmp_path, mark, 0, 5).action for _ in range(recovery.IDLE_REQUEUE_LIMIT)][
        -1
    ] == "give_up"


def test_a_mistake_of_any_bytes_is_a_mistake(tmp_path: Path) -> None:
    for found, said in ((b"no \xff such", "no \ufffd such"), (b"", "MISTAKE is empty")):
        (tmp_path / "MISTAKE").write_bytes(found)
        decision = recovery.decide(tmp_path, "", 0, 5)
        assert decision.action == "fatal_error" and said in decision.reason


def test_a_folder_in_a_markers_place_is_put_aside_and_no_marker(tmp_path: Path) -> None:
    for name in ("DONE", "STOPPED", "logs/error-rank00000.json"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "kept").write_text("x")
    assert recovery.decide(tmp_path, "", 0, 5).action == "relaunch", "a folder says nothing"
    recovery.prepare_start(tmp_path)
    assert not (tmp_path / "DONE").exists()
    assert (
        len(list(tmp_path.glob("bad-DONE-*/kept")))
        == len(list(tmp_path.glob("logs/bad-error-*/kept")))
        == 1
    )


def test_what_is_not_utf8_in_a_name_does_not_end_the_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "a" / "f00" / "work" / "\udcff"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert len(recovery.prepare_start(tmp_path)) == 16
