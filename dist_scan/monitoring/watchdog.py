"""Watchdog: ends a process that makes no progress, and leaves the stacks of all threads on disk.

Limits hold for each step of a training, each shard or iteration of long work (whatever shows
`Progress`), each save and each load. gloo notices a killed peer at once, but a suspended one only
after its own time-out of half an hour, and NCCL may never. A rank that waits for such a peer exceeds
its limit instead. All ranks have the same limits, so all of them write their stacks.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dist_scan.monitoring.progress import Progress

POLLS = 20
"""Polls within the shortest limit."""
LINGER = 3
"""Polls that a rank over its limit waits before it ends, so that others write their stacks too."""


class StuckError(RuntimeError):
    """A section exceeded its limit. Passed to ``on_timeout``, never raised: the main thread hangs."""


class _Section(NamedTuple):
    name: str
    limit_s: float


class Watchdog:
    """Watches this process from a thread.

    Over a limit it calls ``on_timeout(error)`` and then ends the process with exit code 1. A process
    that was suspended and continues (SIGCONT) is not over its limit: its clock restarts.

    Args:
        folder: where stacks-rank*.txt is written.
        rank: the rank of this process.
        step_s: limit of one training step, in seconds.
        section_s: limit of any other section.
        on_timeout: records the error.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        step_s: float,
        section_s: float,
        on_timeout: Callable[[BaseException], None],
    ) -> None:
        self.path = folder / f"stacks-rank{rank:05d}.txt"
        self.rank = rank
        self.step_s = step_s
        self.section_s = section_s
        self.on_timeout = on_timeout
        shortest_s = min(step_s, section_s)
        self.poll_s = min(max(shortest_s / POLLS, 0.05), 5.0)
        self.suspended_s = max(shortest_s / 2, 2 * self.poll_s)
        """The process was suspended if a poll takes longer than this."""
        self.sections: list[_Section] = []
        self.last = time.monotonic()
        self.stopped = threading.Event()

    def start(self) -> Watchdog:
        """Start watching; everything that shows `Progress` is a section."""
        global _active
        _active = self
        Progress.watchdog = self
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop watching."""
        global _active
        _active = None
        Progress.watchdog = None
        self.stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, name: str, limit_s: float | None = None) -> None:
        """Begin a section; ``limit_s`` None: ``section_s``."""
        self.sections.append(_Section(name, self.section_s if limit_s is None else limit_s))
        self.last = time.monotonic()

    def leave(self) -> None:
        """End the innermost section; the clock of the one around it restarts."""
        self.sections.pop()
        self.last = time.monotonic()

    def advance(self, unit: str) -> None:
        """Restart the clock of the innermost section.

        In a training the limit of a step holds from the first step on; before it, kernels are
        selected and compiled, which may take longer.
        """
        if unit == "steps" and self.sections:
            self.sections[-1] = self.sections[-1]._replace(limit_s=self.step_s)
        self.last = time.monotonic()

    def _watch(self) -> None:
        previous = time.monotonic()
        while not self.stopped.wait(self.poll_s):
            now = time.monotonic()
            pause_s = now - previous
            previous = now
            if pause_s > self.suspended_s:
                self._write_stacks(f"was stopped, or had no processor time, for {pause_s:.1f} s")
                self.last = now
            sections = tuple(self.sections)
            if not sections:
                faulthandler.cancel_dump_traceback_later()
                continue
            name, limit_s = sections[-1]
            if now - self.last > limit_s:
                self._end_process(name, now - self.last, limit_s)
            # Native code that holds the interpreter's lock stops this thread too. Then
            # faulthandler's own thread, which needs no lock, ends the process.
            faulthandler.dump_traceback_later(2 * limit_s + LINGER * self.poll_s, exit=True)

    def _end_process(self, section: str, took_s: float, limit_s: float) -> None:
        text = f"{section}: no progress for {took_s:.1f} s (limit: {limit_s:g} s)"
        self._write_stacks(text)
        self.on_timeout(
            StuckError(
                f"{text}; possible causes: a suspended process, a data loader or a file system "
                f"that hangs. The stacks of all threads are in {self.path}. If this work may take "
                "so long, raise runtime.step_limit_s or runtime.section_limit_s"
            )
        )
        time.sleep(LINGER * self.poll_s)
        os._exit(1)

    def _write_stacks(self, text: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        try:
            with open(self.path, "a") as file:
                file.write(f"{now} rank {self.rank}, process {os.getpid()}: {text}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass  # A full file system must not keep the process alive.


_active: Watchdog | None = None


@contextmanager
def watched(name: str, limit_s: float | None = None) -> Iterator[None]:
    """Context manager or decorator: a section for the watchdog, for work without `Progress`."""
    watchdog = _active
    if watchdog is not None:
        watchdog.enter(name, limit_s)
    try:
        yield
    finally:
        if watchdog is not None:
            watchdog.leave()
