"""A run folder that is locked, or cannot be written: launch/local.py prints one line and ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Never

import pytest

from dist_scan.config import ConfigError
from dist_scan.storage import atomic
from launch import local, run_lock

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")


@contextmanager
def lock_of(pid: int, run_dir: Path) -> Iterator[BinaryIO]:
    """Hold the lock of a run folder in the name of a process on this machine."""
    with open(run_dir / "lock", "wb", buffering=0) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"process {pid} on {socket.gethostname()}".encode())
        yield lock


def test_a_lock_is_awaited_while_the_ranks_of_a_killed_launcher_hold_it(tmp_path: Path) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    with lock_of(killed.pid, tmp_path) as lock:
        threading.Timer(1.0, lock.close).start()
        began = time.monotonic()
        run_lock.acquire_lock(tmp_path).close()
    assert time.monotonic() - began >= 0.9


def test_a_lock_of_a_running_process_is_an_error_that_names_the_process(tmp_path: Path) -> None:
    with (
        lock_of(os.getpid(), tmp_path),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
    ):
        run_lock.acquire_lock(tmp_path)


def test_a_file_system_without_locks_causes_a_warning_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> Never:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    run_lock.acquire_lock(tmp_path).close()
    assert "this file system has no locks (No locks available)" in capsys.readouterr().err


def test_a_lock_that_cannot_be_written_is_a_config_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lock").symlink_to("/dev/full")
    assert local.main([QUICKSTART, f"runtime.run_dir={tmp_path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: runtime.run_dir: cannot write in '{tmp_path}' (")


@pytest.mark.parametrize("name", ["config.yaml", "logs"])
def test_a_config_or_log_folder_that_cannot_be_written_is_named_in_one_line(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_text(path: Path, text: str) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if name == "logs":
        (tmp_path / "logs").write_text("a file instead of a folder")
    else:
        monkeypatch.setattr(atomic, "write_text", write_text)
    assert local.main([QUICKSTART, f"runtime.run_dir={tmp_path}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"failed: '{tmp_path}/{name}': ")
    assert "start the same command again" in lines[0]
