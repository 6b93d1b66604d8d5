"""A terminal that is closed during a local run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import local, terminal
from tests.support.launches import ROOT

PROGRAM = """
import os, pathlib, sys
from launch import terminal
os.dup2({pipe}, 3)
terminal.survive_hangup()
print("before", flush=True)
input()
print("after", flush=True)
print("error", file=sys.stderr)
pathlib.Path("/dev/fd/3").write_text("survived")
"""


def test_output_to_a_closed_terminal_is_dropped() -> None:
    controller, terminal_end = os.openpty()
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(pipe=write_end)],
        stdin=subprocess.PIPE,
        stdout=terminal_end,
        stderr=terminal_end,
        pass_fds=[write_end],
        cwd=ROOT,
    )
    os.close(terminal_end)
    os.close(write_end)
    assert b"before" in os.read(controller, 100)
    os.close(controller)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert os.read(read_end, 10) == b"survived"


def test_files_and_pipes_are_left_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        terminal.survive_hangup()
        assert sys.stdout is log


class LiveRank:
    """A process that has not ended."""

    exitcode = None
    pid = 4321


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_the_ranks_unless_under_nohup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nohup: bool
) -> None:
    """A hang-up reaches the ranks as TERM, and they save; under nohup it reaches nobody."""
    sent: list[tuple[int, int]] = []
    handlers = {number: signal.getsignal(number) for number in local.FORWARDED_SIGNALS}
    kill = os.kill

    def hang_up(ranks: list[LiveRank]) -> int:
        kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(local, "fork_ranks", lambda *_: [LiveRank()])
    monkeypatch.setattr(local, "wait_for_ranks", hang_up)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else lambda *_: sent.append((0, 0)))
    try:
        assert local.run_one_start(tmp_path, 1) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, local.FORWARDED_SIGNALS)
    assert sent == ([] if nohup else [(4321, signal.SIGTERM)])
