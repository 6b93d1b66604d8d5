"""The stop flag: signals request a stop; a second SIGINT ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.launches import ROOT, environment

PROGRAM = """
import signal, sys
from dist_scan.engine.stop import StopFlag
stop = StopFlag()
stop.install()
for number in map(int, sys.argv[1:]):
    signal.raise_signal(number)
print("requested", stop.signal)
"""


@pytest.mark.parametrize(
    ("signals", "exit_code", "output"),
    [
        ((), 0, "requested None"),
        ((signal.SIGINT,), 0, f"requested {signal.SIGINT:d}"),
        ((signal.SIGUSR2, signal.SIGTERM), 0, f"requested {signal.SIGUSR2:d}"),
        ((signal.SIGINT, signal.SIGINT), -signal.SIGINT, ""),
    ],
)
def test_signals_request_a_stop(
    signals: tuple[signal.Signals, ...], exit_code: int, output: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(number.value) for number in signals)],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout.strip()) == (exit_code, output), done.stderr
