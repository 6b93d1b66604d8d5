"""Start the product as a user does: launch/local.py as a process, with a quickstart made small."""

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

from tests.support.ranks import CONTEXT

ROOT = Path(__file__).resolve().parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
SMALL = [
    "data.train.limit=400",
    "stages.pretext.epochs=2",
    "stages.pretext.network.width=8",
    "stages.pretext.global_batch=96",
    "stages.heads.epochs=4",
    "stages.heads.global_batch=96",
    "stages.selflabelling.epochs=1",
    "stages.selflabelling.global_batch=96",
    "stages.selflabelling.method.threshold=0.2",
]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: two tests run at once on two cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def command(
    run_dir: Path, *overrides: str, config: str = "quickstart", processes: int = 1
) -> list[str]:
    """The command line of one run in run_dir."""
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


class Started:
    """A launcher that is running, forked like the rest: for tests that watch it, ask it to leave, or kill it."""

    def __init__(self, words: list[str], folder: Path, **variables: str) -> None:
        self.words, self.out = words, folder / f"said-{len(list(folder.glob('said-*.txt')))}.txt"
        self.out.touch()
        self.process = CONTEXT.Process(
            target=_launcher, args=(words[2:], self.out, folder, variables)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until(self, true: Callable[[], bool], timeout_s: float = 120) -> None:
        """Return once it is so. Fails when the launcher ends, or takes too long, before."""
        end = time.monotonic() + timeout_s
        while not true():
            assert self.process.exitcode is None and time.monotonic() < end, (
                f"{self.words}: ended {self.process.exitcode}\n{self.out.read_text()}"
            )
            time.sleep(0.02)

    def wait_for_line(self, beginning: str) -> None:
        """Return once it has said a line that begins so."""
        self.wait_until(
            lambda: any(line.startswith(beginning) for line in self.out.read_text().splitlines())
        )

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """kill -9 for its process group; waits for the launcher's end. Returns its exit code: -9, unless it had ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode

    def end(self, timeout_s: float = 240) -> subprocess.CompletedProcess:
        """Wait for its end; its exit code, and all it said."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(
                f"{self.words} did not end in {timeout_s} s:\n{self.out.read_text()}"
            )
        return subprocess.CompletedProcess(self.words, self.process.exitcode, self.out.read_text())


def run(
    run_dir: Path,
    *overrides: str,
    config: str = "quickstart",
    processes: int = 1,
    timeout_s: float = 240,
    from_nothing: bool = False,
):
    """Run to the end; returns the finished process with its output as text. Unless it starts from nothing, as a user's does, it is forked from
    a process that has imported everything: launch/local.py's main as the launcher, its ranks below it, without ten seconds of imports."""
    if not from_nothing:
        return Started(
            command(run_dir, *overrides, config=config, processes=processes), run_dir.parent
        ).end(timeout_s)
    return subprocess.run(
        command(run_dir, *overrides, config=config, processes=processes),
        env=environment(),
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run_dir.parent,
    )


def _launcher(arguments: list[str], out: Path, folder: Path, variables: dict[str, str]) -> None:
    enter(out, **variables)
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # as on a terminal, also where the tests run under nohup
    os.chdir(folder)
    from launch import local

    sys.exit(local.main(arguments))


def enter(out: Path, **variables: str) -> None:
    """Make a forked process what a shell would have started: a session, no blocked signals, its output in a file."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    to = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.stdout, sys.stderr = (
        open(1, "w", buffering=1, closefd=False),
        open(2, "w", buffering=1, closefd=False),
    )


def report(run_dir: Path) -> dict:
    """report.json without what a clock or a memory meter says."""
    facts = json.loads((run_dir / "report.json").read_text())

    def timeless(value):
        if isinstance(value, dict):
            return {
                k: timeless(v)
                for k, v in value.items()
                if k not in ("seconds", "stage_seconds", "stage_memory", "stage_timing")
            }
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(facts)
