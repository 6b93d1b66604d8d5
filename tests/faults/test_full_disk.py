"""RELIABILITY.md's row 8 on a disk that is really full, to the last byte: a small tmpfs as the run folder, filled while it trains."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_scan import run as life
from dist_scan.monitoring.log import read_rows
from dist_scan.storage import run_markers
from dist_scan.storage.run_markers import RunMarkers
from launch.recovery import first_error
from tests.support.faulted_run import TinyRun

pytestmark = pytest.mark.timeout(600)
LONG = "stages.pretext.epochs=2000"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """tmp_path/run is a file system of its own, of 16 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(
            f"a full disk needs a file system of its own, and mounting one needs root: {mounted.stderr.strip()}"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take the last byte; removing the file that is returned gives it all back."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as f:
        for size in (65536, 4096, 1):
            try:
                while True:
                    f.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


@pytest.fixture
def begin(disk) -> Iterator[Callable]:
    """Start the launcher; whatever becomes of the test, it ends with it."""
    run, started = TinyRun(disk.parent), []

    def start(*overrides: str):
        started.append(run.start(*overrides))
        return started[-1]

    yield start
    for launcher, _ in started:
        launcher.kill()
        launcher.join()


def until(what: Callable[[str], object], launcher, said: Path, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not what(text := said.read_text() if said.exists() else ""):
        assert launcher.exitcode is None and time.monotonic() < deadline, text
        time.sleep(0.05)


def trained(folder: Path) -> int:
    """The newest step a reader sees."""
    return max((r["step"] for r in read_rows(folder / "logs" / "pretext.metrics.jsonl")), default=0)


def test_row_8_nothing_that_is_logged_on_a_full_disk_ends_training(disk, begin) -> None:
    launcher, said = begin(LONG, "runtime.checkpoint_s=1e9")
    until(lambda told: trained(disk) > 20, launcher, said)
    filler, before = fill(disk), trained(disk)
    until(lambda told: "metrics.jsonl: No space left on device" in told, launcher, said)
    time.sleep(3)
    assert launcher.exitcode is None, said.read_text()
    filler.unlink()
    until(
        lambda told: "metrics.jsonl can be written again" in told and trained(disk) > before + 50,
        launcher,
        said,
    )
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.join(60)
    text = said.read_text()
    assert launcher.exitcode == 128 + signal.SIGTERM and json.loads(
        (disk / "STOPPED").read_text()
    ) == {"signal": signal.SIGTERM}, text
    assert (
        "Traceback" not in text
        and "starting again" not in text
        and not list(disk.glob("logs/error-rank*"))
    ), text
    rows = read_rows(disk / "logs" / "pretext.metrics.jsonl")
    lines = (disk / "logs" / "pretext.metrics.jsonl").read_text().splitlines()
    assert len(lines) - len(rows) <= 1 + text.count("metrics.jsonl can be written again"), (
        "each time at most one torn line"
    )
    assert rows[-1]["step"] - rows[0]["step"] + 1 > len(rows), "what could not be written is lost"
    assert list(disk.glob("stages/pretext/*/work/checkpoints/step-*/manifest.json")), (
        "what was trained meanwhile is saved"
    )


def test_row_8_three_saves_that_fail_on_a_full_disk_end_the_run_once(disk, begin) -> None:
    launcher, said = begin(LONG, "runtime.checkpoint_s=1.5")
    until(lambda told: list(disk.glob("stages/pretext/*/work/checkpoints/step-*")), launcher, said)
    filler = fill(disk)
    launcher.join(120)
    text = said.read_text()
    assert (
        launcher.exitcode == life.USER_ERROR
        and "starting again" not in text
        and "Traceback" not in text
    ), text
    assert (
        text.count("could not save") == 3
        and "3 checkpoints in a row could not be saved" in (disk / "MISTAKE").read_text()
    ), text
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize <= 4 * run_markers.SIZE, (
        "full but for what the two ranks had kept aside"
    )
    filler.unlink()
    launcher, said = begin(LONG, "runtime.checkpoint_s=1.5")
    until(lambda told: "pretext: resumes" in told and trained(disk) > 20, launcher, said)
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.join(60)
    assert launcher.exitcode == 128 + signal.SIGTERM, said.read_text()


def raise_full(*given: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder in which no new file can be written; what was kept aside can be written over."""
    (tmp_path / "config.yaml").touch()
    RunMarkers(tmp_path, 1).reserve()
    monkeypatch.setattr(run_markers, "write_text", raise_full)
    monkeypatch.setattr(life, "RANK_0_FIRST_S", 0.0)
    return tmp_path


def test_a_mistake_and_an_error_are_left_where_no_new_block_can_be_had(full) -> None:
    error = ValueError("\u00e4" * 5000)
    life._record_error(RunMarkers(full, 1), error)
    left = first_error(full)
    assert (
        left["error"] == "ValueError: " + "\u00e4" * (life.SHORT - len("ValueError: "))
        and left["rank"] == 1
    )
    assert life._report_user_error(RunMarkers(full, 1), "\u00e4" * 20000) == life.USER_ERROR
    assert (full / "MISTAKE").read_text().startswith("rank 1: \u00e4") and not list(
        full.glob("logs/.kept*")
    )


def test_what_can_be_left_nowhere_is_said_and_raises_nothing(
    full, capfd: pytest.CaptureFixture[str]
) -> None:
    RunMarkers(full, 1).release()
    life._record_error(RunMarkers(full, 1), ValueError("bad"))
    assert life._report_user_error(RunMarkers(full, 1), "bad") == life.USER_ERROR
    assert not (full / "MISTAKE").exists() and not list(full.glob("logs/*"))
    said = capfd.readouterr().err
    assert (
        "MISTAKE cannot be written (No space left on device)" in said and "ValueError: bad" in said
    ), said


def test_what_is_kept_aside_is_not_written_again_and_goes_in_the_end(tmp_path: Path) -> None:
    markers = RunMarkers(tmp_path, 0)
    markers.reserve()
    before = {p.name: p.stat().st_ino for p in (tmp_path / "logs").iterdir()}
    markers.reserve()
    assert {p.name: p.stat().st_ino for p in (tmp_path / "logs").iterdir()} == before and len(
        before
    ) == 2
    markers.write_marker("DONE", "now\n")
    assert (tmp_path / "DONE").read_text() == "now\n"
    markers.release()
    assert not list((tmp_path / "logs").iterdir())
