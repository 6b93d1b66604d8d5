"""Start launch/local.py as a user does, with a small version of the quickstart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pipeline import QUICK
from tests.support.ranks import CONTEXT, ONE_THREAD_NO_GPU

ROOT = Path(__file__).resolve().parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
SMALL = QUICK
"""Overrides that make the quickstart small."""
MEASURED = ("seconds", "stage_seconds", "stage_memory", "stage_timing")
"""Keys of report.json that differ between equal runs."""


def environment(**variables: str) -> dict[str, str]:
    """Environment of a process with one thread and no GPU."""
    return os.environ | ONE_THREAD_NO_GPU | variables


def command(
    run_dir: Path, *overrides: str, config: str = "quickstart", processes: int = 1
) -> list[str]:
    """Command line of a run in ``run_dir``."""
    small = SMALL if config == "quickstart" else []
    return [
        *LOCAL,
        str(ROOT / "configs" / f"{config}.yaml"),
        "--processes",
        str(processes),
        f"runtime.run_dir={run_dir}",
        *small,
        *overrides,
    ]


class RunningLauncher:
    """launch/local.py in a process, for tests that watch, stop or kill it.

    The process is forked from one that has imported everything, which saves ten seconds.

    Args:
        command: the command line; its Python and script are not used.
        folder: working folder, which also receives the output.
        prepare: called in the process before the launcher starts; must be picklable.
        variables: environment variables.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        prepare: Callable[[], None] | None = None,
        **variables: str,
    ) -> None:
        self.command = command
        number = len(list(folder.glob("output-*.txt")))
        self.output_path = folder / f"output-{number}.txt"
        self.output_path.touch()
        arguments = command[len(LOCAL) :]
        self.process = CONTEXT.Process(
            target=_run_launcher,
            args=(arguments, self.output_path, folder, prepare, variables),
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def output(self) -> str:
        """Everything printed so far by the launcher and by rank 0."""
        return self.output_path.read_text()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait for a condition. Fails if the launcher ends before, or after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            code = self.process.exitcode
            assert code is None, f"{self.command} ended with {code}:\n{self.output()}"
            assert time.monotonic() < deadline, f"{self.command}: timeout\n{self.output()}"
            time.sleep(0.02)

    def wait_for_line(self, start: str) -> None:
        """Wait until a line is printed that starts with ``start``."""
        self.wait_until(lambda: any(line.startswith(start) for line in self.output().splitlines()))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int | None:
        """Kill its process group; returns the exit code: -9, unless it had ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode

    def wait(self, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for the end; returns exit code and output."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"{self.command} did not end in {timeout_s} s:\n{self.output()}")
        return subprocess.CompletedProcess(self.command, code, self.output())


def _run_launcher(
    arguments: list[str],
    output: Path,
    folder: Path,
    prepare: Callable[[], None] | None,
    variables: dict[str, str],
) -> None:
    _start_session(output, **variables)
    # As on a terminal, also if the tests run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    if prepare is not None:
        prepare()
    from launch import local

    sys.exit(local.main(arguments))


def _start_session(output: Path, **variables: str) -> None:
    """Give a forked process what a shell gives: a session, no blocked signals, its own output."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ |= ONE_THREAD_NO_GPU | variables
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  open until exit
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  open until exit


def run(
    run_dir: Path,
    *overrides: str,
    config: str = "quickstart",
    processes: int = 1,
    timeout_s: float = 240,
    new_interpreter: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, and return exit code and output.

    ``new_interpreter`` starts Python as a user does; otherwise see `RunningLauncher`.
    """
    words = command(run_dir, *overrides, config=config, processes=processes)
    if not new_interpreter:
        return RunningLauncher(words, run_dir.parent).wait(timeout_s)
    return subprocess.run(
        words,
        env=environment(),
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run_dir.parent,
    )


def read_report(run_dir: Path) -> dict[str, Any]:
    """report.json without times and memory."""
    return _without_measurements(json.loads((run_dir / "report.json").read_text()))


def _without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_measurements(v) for k, v in value.items() if k not in MEASURED}
    if isinstance(value, list):
        return [_without_measurements(v) for v in value]
    return value
