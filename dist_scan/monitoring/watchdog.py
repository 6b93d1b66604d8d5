"""Watchdog: ends a process that makes no progress, and writes the stacks of all threads to disk.

Limits hold for each step of a training, each shard or iteration of long work (whatever shows
`Progress`), each save and each load. gloo notices a killed peer at once, but a suspended one only
after its own time-out of half an hour, and NCCL may never. A rank that waits for such a peer
exceeds its limit instead. All ranks have the same limits, so all of them write their stacks.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

POLLS = 20
"""Polls within the shortest limit."""
LINGER = 3
"""Polls that a rank over its limit waits before it ends, so that others write their stacks too."""


class StuckError(RuntimeError):
    """Work exceeded its limit. Recorded but never raised; see `Watchdog`."""


@dataclass
class WatchedWork:
    """Work in progress, and since when it has made none."""

    name: str
    is_step: bool = False
    """Whether the limit of a training step holds, not the longer one of other work."""
    since: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Restart the clock: the work has made progress."""
        self.since = time.monotonic()


_open: list[WatchedWork] = []
"""Work of the main thread that has begun and not ended, the innermost last."""


@contextmanager
def watched(name: str) -> Iterator[WatchedWork]:
    """Context manager or decorator: the watchdog limits the time of this work."""
    work = WatchedWork(name)
    _open.append(work)
    try:
        yield work
    finally:
        _open.pop()
        if _open:
            _open[-1].restart()


class Watchdog:
    """Watches the work of this process (`watched`) from a thread.

    Over a limit it calls ``on_timeout(error)`` and then ends the process with exit code 1. In a
    process that was suspended and continues (SIGCONT) the clock restarts.

    Args:
        folder: where stacks-rank*.txt is written.
        rank: the rank of this process.
        step_s: limit of one training step, in seconds.
        section_s: limit of any other work, also for one unit of its `Progress`.
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

    def start(self) -> None:
        """Start the thread; it ends with the process."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while True:
            polled = time.monotonic()
            time.sleep(self.poll_s)
            now = time.monotonic()
            open_work = tuple(_open)
            if now - polled > self.suspended_s:
                self._write_stacks(f"was suspended, or got no CPU time, for {now - polled:.1f} s")
                for work in open_work:
                    work.restart()
            if not open_work:
                faulthandler.cancel_dump_traceback_later()
                continue
            innermost = open_work[-1]
            limit_s = self.step_s if innermost.is_step else self.section_s
            if now - innermost.since > limit_s:
                self._end_process(innermost.name, now - innermost.since, limit_s)
            # Native code that holds the interpreter's lock stops this thread too. Then
            # faulthandler's own thread, which needs no lock, ends the process.
            faulthandler.dump_traceback_later(2 * limit_s + LINGER * self.poll_s, exit=True)

    def _end_process(self, name: str, took_s: float, limit_s: float) -> None:
        text = f"{name}: no progress for {took_s:.1f} s (limit: {limit_s:g} s)"
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
        # A full file system must not keep the process alive.
        with suppress(OSError), open(self.path, "a") as file:
            file.write(f"{now} rank {self.rank}, process {os.getpid()}: {text}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
