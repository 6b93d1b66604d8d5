"""A process that hangs ends itself: every section of work has a limit, and one that is passed leaves all stacks on disk.

What counts as a section: each step of a training, each shard or iteration of long work (everything that shows Progress), a save, a
load. gloo sees a killed peer at once, but a stopped one only after its own time-out of half an hour, and NCCL may never: those
that wait for it are over their own limit instead (RELIABILITY.md 8). All ranks have the same limits, so all leave their stacks.
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

POLLS = 20  # looks in the time of the shortest limit
LINGER = 3  # polls that a rank over its limit waits for the others to write their stacks too


class StuckError(RuntimeError):
    """What is written down when a section is over its limit (it is never raised: the one who would catch it hangs)."""


class _Section(NamedTuple):
    name: str
    limit_s: float


class Watchdog:
    """Watches this process from a thread. `bark(error)` writes the error down; then the process ends with code 1.

    A process that was stopped and goes on (SIGCONT, a suspended job) is not over its limit: its clock starts again.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        step_s: float,
        section_s: float,
        bark: Callable[[BaseException], None],
    ) -> None:
        self.path, self.rank, self.bark = folder / f"stacks-rank{rank:05d}.txt", rank, bark
        self.step_s, self.section_s = step_s, section_s
        self.poll_s = min(max(min(step_s, section_s) / POLLS, 0.05), 5.0)
        self.sections: list[_Section] = []
        self.last = time.monotonic()
        self.ended = threading.Event()

    def start(self) -> Watchdog:
        """Stand up, and watch whatever shows Progress."""
        global _standing
        _standing = Progress.watch = self
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def stop(self) -> None:
        """Watch no more."""
        global _standing
        _standing = Progress.watch = None
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, name: str, limit_s: float | None = None) -> None:
        """A section begins; None: the limit of long sections."""
        self.sections.append(_Section(name, self.section_s if limit_s is None else limit_s))
        self.last = time.monotonic()

    def leave(self) -> None:
        """The innermost section is over; the one around it starts its clock again."""
        self.sections.pop()
        self.last = time.monotonic()

    def advance(self, unit: str) -> None:
        """A piece of the innermost section is done: its clock starts again. From the first step of a training on, a step's limit
        holds (before it, kernels are chosen and compiled: that is a long section)."""
        if unit == "steps" and self.sections:
            self.sections[-1] = self.sections[-1]._replace(limit_s=self.step_s)
        self.last = time.monotonic()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self.poll_s):
            now = time.monotonic()
            if now - before > max(min(self.step_s, self.section_s) / 2, 2 * self.poll_s):
                self._write(
                    f"was stopped, or had no processor, for {now - before:.1f} s; it goes on"
                )
                self.last = now
            before = now
            sections = tuple(self.sections)
            if not sections:
                faulthandler.cancel_dump_traceback_later()
                continue
            name, limit_s = sections[-1]
            if now - self.last > limit_s:
                self._end(name, now - self.last, limit_s)
            # native code that keeps the interpreter's lock stops this thread too; faulthandler's own, which needs no lock, then ends the
            # process with its stacks on stderr
            faulthandler.dump_traceback_later(2 * limit_s + LINGER * self.poll_s, exit=True)

    def _end(self, name: str, took_s: float, limit_s: float) -> None:
        text = f"{name}: no progress for {took_s:.1f} s (limit: {limit_s:g} s)"
        self._write(text)
        self.bark(
            StuckError(
                f"{text}; a peer that was stopped, a loader or a file system that hangs? The stacks of all threads are in "
                f"{self.path}. Raise runtime.step_limit_s or runtime.section_limit_s if this work may take so long"
            )
        )
        time.sleep(LINGER * self.poll_s)
        os._exit(1)

    def _write(self, text: str) -> None:
        try:
            with open(self.path, "a") as f:
                f.write(
                    f"{time.strftime('%Y-%m-%dT%H:%M:%S')} rank {self.rank}, process {os.getpid()}: {text}\n"
                )
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
        except OSError:
            pass  # a file system that hangs or is full must not keep the process alive


_standing: Watchdog | None = None


@contextmanager
def watched(name: str, limit_s: float | None = None) -> Iterator[None]:
    """`with watched("save"):` (or as a decorator) work that no Progress shows; nothing when no watchdog stands."""
    dog = _standing
    if dog is not None:
        dog.enter(name, limit_s)
    try:
        yield
    finally:
        if dog is not None:
            dog.leave()
