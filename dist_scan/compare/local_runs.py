"""Runs on this machine, several at a time, through launch/local.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from dist_scan.config import RunConfig, dump
from dist_scan.engine.stop import STOP_SIGNALS
from dist_scan.storage.atomic import write_text
from dist_scan.world.processes import available_cores

LOCAL = Path(__file__).resolve().parents[2] / "launch" / "local.py"
POLL_S = 0.1
NUM_LINES_SHOWN_OF_FAILED_RUN = 20


class _Running(NamedTuple):
    """A run that was started. output: its output file; None if it prints to the terminal."""

    title: str
    folder: Path
    output: Path | None


class LocalRuns:
    """Starts runs, at most `at_once` at a time, each with its part of the cores.

    The first one runs alone until the data that all share is built. Signals to this process are
    forwarded to the runs. If one fails, the others get SIGTERM: they save and stop.

    Args:
        processes: processes of each run.
        at_once: number of runs at a time; if more than 1, their output goes to RUN/output.txt.
        shared_data: files that exist once the shared data is built.
    """

    def __init__(self, processes: int, at_once: int, shared_data: Sequence[Path] = ()) -> None:
        self.processes = processes
        self.at_once = at_once
        self.shared_data = shared_data
        self.is_data_built = False
        self.threads = max(1, available_cores() // (processes * at_once))
        self.running: dict[subprocess.Popen[bytes], _Running] = {}
        self.exit_code = 0

    def run_all(self, runs: Mapping[str, RunConfig], on_finish: Callable[[], object]) -> int:
        """Run all in order; `on_finish` is called after each one that succeeded.

        runs: title -> settings. Returns 0, or the exit code of the first run that failed.
        """
        waiting = list(runs.items())
        previous = {
            number: signal.signal(number, lambda received, frame: self._stop(received))
            for number in STOP_SIGNALS
        }
        try:
            while self.running or (waiting and self.exit_code == 0):
                while waiting and self.exit_code == 0 and self._has_room():
                    self._start(*waiting.pop(0))
                time.sleep(POLL_S)
                self._handle_ended(on_finish)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.exit_code

    def _has_room(self) -> bool:
        if not self.is_data_built:
            self.is_data_built = all(file.is_file() for file in self.shared_data)
        return len(self.running) < (self.at_once if self.is_data_built else 1)

    def _start(self, title: str, run: RunConfig) -> None:
        print(title, flush=True)
        folder = run.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "settings.yaml"
        write_text(settings, dump(run))
        output = folder / "output.txt" if self.at_once > 1 else None
        with ExitStack() as files:
            file = None if output is None else files.enter_context(open(output, "ab"))
            process = subprocess.Popen(
                [sys.executable, str(LOCAL), str(settings), "--processes", str(self.processes)],
                start_new_session=True,
                stdout=file,
                stderr=None if file is None else subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(self.threads)} | os.environ,
            )
        self.running[process] = _Running(title, folder, output)

    def _stop(self, number: int) -> None:
        """Forward a signal to the runs and start no more; exit code 128 + number."""
        self.exit_code = self.exit_code or 128 + number
        for process in self.running:
            process.send_signal(number)

    def _handle_ended(self, on_finish: Callable[[], object]) -> None:
        for process in [p for p in self.running if p.poll() is not None]:
            run = self.running.pop(process)
            if process.returncode == 0:
                if run.output is not None:
                    print(f"{run.title}: done", flush=True)
                self.is_data_built = True
                on_finish()
            else:
                code = process.returncode
                self._handle_failure(run, code if code > 0 else 128 - code)

    def _handle_failure(self, run: _Running, code: int) -> None:
        """Show the end of the run's output, and stop the others."""
        lines: list[str] = []
        if run.output is not None:
            lines = run.output.read_text(errors="replace").splitlines()[
                -NUM_LINES_SHOWN_OF_FAILED_RUN:
            ]
        lines.append(f"{run.folder}: ended with exit code {code}; the same command resumes it")
        print("\n".join(lines), file=sys.stderr)
        if self.exit_code == 0:
            self._stop(signal.SIGTERM)
            self.exit_code = code
