"""launch/local.py where nothing can be written: one line, no traceback of the launcher's."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Never

import pytest

from dist_scan.storage import atomic
from launch import local, run_lock

QUICK = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")


def full(path, *_) -> Never:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_lock_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lock").symlink_to("/dev/full")
    assert local.main([QUICK, f"runtime.run_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(
        f"error: runtime.run_dir: cannot write in '{tmp_path}' ("
    ), said


@pytest.mark.parametrize("place", ["config.yaml", "logs"])
def test_settings_or_logs_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place
) -> None:
    if place == "logs":
        (tmp_path / "logs").write_text("a file")
    else:
        monkeypatch.setattr(atomic, "write_text", full)
    assert local.main([QUICK, f"runtime.run_dir={tmp_path}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1
        and said[0].startswith(f"failed: '{tmp_path}/{place}': ")
        and "start the same command again" in said[0]
    ), said


def test_a_file_system_without_locks_is_said_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_) -> Never:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    run_lock.acquire_lock(tmp_path).close()
    assert "this file system has no locks (No locks available)" in capsys.readouterr().err
