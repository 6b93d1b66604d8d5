"""Training on a disk that is full to the last byte: a small tmpfs as the run folder.

Logs and failed saves do not end the training, and the launcher learns how the ranks ended.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Never

import pytest

from dist_scan import run
from dist_scan.monitoring.log import read_rows
from dist_scan.storage import run_markers
from dist_scan.storage.run_markers import RunMarkers
from launch.recovery import first_error
from tests.support.faulted_run import TinyRun
from tests.support.launches import RunningLauncher

pytestmark = pytest.mark.timeout(600)
Start = Callable[..., RunningLauncher]
MANY_EPOCHS = "stages.pretext.epochs=2000"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder that is a file system of 16 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"needs to mount a file system of its own, as root: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def start(disk: Path) -> Iterator[Start]:
    """Starts the launcher in the run folder; kills it when the test ends."""
    tiny_run = TinyRun(disk.parent)
    launchers = []

    def start(*overrides: str) -> RunningLauncher:
        launchers.append(tiny_run.start(*overrides))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.process.kill()
        launcher.process.join()


def fill(disk: Path) -> Path:
    """Use up the last byte of a disk, with one file."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


def last_step(disk: Path) -> int:
    """The last step in metrics.jsonl."""
    rows = read_rows(disk / "logs" / "pretext.metrics.jsonl")
    return max((row["step"] for row in rows), default=0)


def stop(launcher: RunningLauncher) -> str:
    """Stop the run by SIGTERM; returns the output."""
    launcher.send_signal(signal.SIGTERM)
    done = launcher.wait(60)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout
    return done.stdout


def test_logs_on_a_full_disk_do_not_end_the_training(disk: Path, start: Start) -> None:
    launcher = start(MANY_EPOCHS, "runtime.checkpoint_s=1e9")
    launcher.wait_until(lambda: last_step(disk) > 20)
    filler = fill(disk)
    step_when_full = last_step(disk)
    launcher.wait_until(lambda: "metrics.jsonl: No space left on device" in launcher.output())
    time.sleep(3)
    assert launcher.process.exitcode is None, launcher.output()
    filler.unlink()
    launcher.wait_until(lambda: "metrics.jsonl can be written again" in launcher.output())
    launcher.wait_until(lambda: last_step(disk) > step_when_full + 50)
    output = stop(launcher)
    assert json.loads((disk / "STOPPED").read_text()) == {"signal": signal.SIGTERM}
    assert "Traceback" not in output, output
    assert "starting again" not in output, output
    assert not list(disk.glob("logs/error-rank*"))
    # The training went on while the disk was full, and is saved.
    assert list(disk.glob("stages/pretext/*/work/checkpoints/step-*/manifest.json"))
    rows = read_rows(disk / "logs" / "pretext.metrics.jsonl")
    assert len(rows) < rows[-1]["step"] - rows[0]["step"] + 1
    # Each time the disk filled up at most one line is incomplete.
    lines = (disk / "logs" / "pretext.metrics.jsonl").read_text().splitlines()
    assert len(lines) - len(rows) <= 1 + output.count("metrics.jsonl can be written again")


def test_three_failed_saves_on_a_full_disk_end_the_run(disk: Path, start: Start) -> None:
    launcher = start(MANY_EPOCHS, "runtime.checkpoint_s=1.5")
    launcher.wait_until(lambda: bool(list(disk.glob("stages/pretext/*/work/checkpoints/step-*"))))
    filler = fill(disk)
    done = launcher.wait(120)
    assert done.returncode == run.FATAL_ERROR, done.stdout
    assert "starting again" not in done.stdout, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert done.stdout.count("could not save") == 3, done.stdout
    assert "3 checkpoints in a row could not be saved" in (disk / "FATAL_ERROR").read_text()
    # Only the reserved files of the two ranks have been released.
    free = os.statvfs(disk)
    assert free.f_bavail * free.f_frsize <= 4 * run_markers.SIZE
    filler.unlink()
    launcher = start(MANY_EPOCHS, "runtime.checkpoint_s=1.5")
    launcher.wait_until(lambda: "pretext: resumes" in launcher.output())
    launcher.wait_until(lambda: last_step(disk) > 20)
    stop(launcher)


@pytest.fixture
def full_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder in which no new file can be written, with the reserved files of rank 1."""

    def write_text(*args: object) -> Never:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "config.yaml").touch()
    RunMarkers(tmp_path, 1).reserve()
    monkeypatch.setattr(run_markers, "write_text", write_text)
    monkeypatch.setattr(run, "RANK_0_FIRST_S", 0.0)
    return tmp_path


def test_errors_are_written_into_reserved_files(full_folder: Path) -> None:
    markers = RunMarkers(full_folder, 1)
    run._record_error(markers, ValueError("\u00e4" * 5000))
    error = first_error(full_folder)
    assert error is not None
    assert error["error"] == "ValueError: " + "\u00e4" * (
        run.MAX_TEXT_ON_FULL_DISK - len("ValueError: ")
    )
    assert error["rank"] == 1
    assert run._report_fatal_error(markers, "\u00e4" * 20000) == run.FATAL_ERROR
    assert (full_folder / "FATAL_ERROR").read_text().startswith("rank 1: \u00e4")
    assert not list(full_folder.glob("logs/.kept*"))


def test_an_error_that_cannot_be_written_is_printed(
    full_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    markers = RunMarkers(full_folder, 1)
    markers.release()
    run._record_error(markers, ValueError("bad"))
    assert run._report_fatal_error(markers, "bad") == run.FATAL_ERROR
    assert not (full_folder / "FATAL_ERROR").exists()
    assert not list(full_folder.glob("logs/*"))
    output = capfd.readouterr().err
    assert "FATAL_ERROR cannot be written (No space left on device)" in output
    assert "ValueError: bad" in output


def test_reserved_files_are_reused_and_removed_at_the_end(tmp_path: Path) -> None:
    def inodes() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (tmp_path / "logs").iterdir()}

    markers = RunMarkers(tmp_path, 0)
    markers.reserve()
    before = inodes()
    assert len(before) == 2
    markers.reserve()
    assert inodes() == before
    markers.write_marker("DONE", "now\n")
    assert (tmp_path / "DONE").read_text() == "now\n"
    markers.release()
    assert not inodes()
