"""A terminal that is closed under a local run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import local, terminal

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_said_to_a_closed_terminal_is_lost_and_no_more() -> None:
    here, there = os.openpty()
    program = (
        "import sys, pathlib; from launch import terminal; terminal.outlive(); print('before', flush=True); input(); "
        "print('after', flush=True); print('error', file=sys.stderr); pathlib.Path('/dev/fd/3').write_text('lived')"
    )
    told, tell = os.pipe()
    lived = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({tell}, 3); {program}"],
        stdin=subprocess.PIPE,
        stdout=there,
        stderr=there,
        pass_fds=[tell],
        cwd=ROOT,
    )
    os.close(there)
    os.close(tell)
    assert b"before" in os.read(here, 100)
    os.close(here)
    lived.communicate(b"\n", timeout=60)
    assert lived.returncode == 0 and os.read(told, 10) == b"lived"


def test_a_file_or_a_pipe_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        terminal.outlive()
        assert sys.stdout is log


class Rank:
    """A process that has not ended, which the launcher only signals."""

    exitcode, pid = None, 4321


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_asks_the_ranks_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nohup
) -> None:
    """A hang-up reaches them as TERM; under nohup it reaches nobody."""
    sent, before = [], {number: signal.getsignal(number) for number in local.NOTICE}
    real = os.kill

    def wait(ranks) -> int:
        real(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(local, "start", lambda *_: [Rank()])
    monkeypatch.setattr(local, "wait_for_ranks", wait)
    monkeypatch.setattr(local.os, "kill", lambda pid, number: sent.append((pid, number)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else lambda *_: sent.append("nobody"))
    try:
        assert local.attempt(tmp_path, 1) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, local.NOTICE)
    assert sent == ([] if nohup else [(4321, signal.SIGTERM)])
