"""How far long work has come, how fast, and how long it will take: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO


class Lined(Protocol):
    """Takes plain lines (engine/log.py: Lines)."""

    def write(self, text: str) -> Any: ...


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """A line to stderr, or another stream. One that cannot be written (a log on a full disk, a reader that left) ends no work: it never raises OSError."""
    try:
        print(text, end=end, file=stream or sys.stderr, flush=True)
    except OSError:
        pass  # there is nowhere else to say it


def duration(seconds: float) -> str:
    """42 -> '42s', 754 -> '12m34s', 7500 -> '2h05m', 200000 -> '2d07h'."""
    s = int(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return (
        f"{s // 3600}h{s % 3600 // 60:02d}m"
        if s < 86400
        else f"{s // 86400}d{s % 86400 // 3600:02d}h"
    )


class StopRequested(Exception):
    """Long work was left in good order because the process was asked to stop; everything is saved, the same command goes on."""


class Progress:
    """`with Progress("embed", total, "images") as p: p.advance(512)`. Silent on ranks other than 0 (pass enabled=False).

    `done` is what was finished before this start: it counts as progress but not into the rate.
    """

    copy_to: Lined | None = None
    """A log file that gets a plain line every 10 s beside the terminal's live one (set once per process)."""

    watch: Any = None
    """engine/watchdog.py: long work is a section, and every advance starts its clock again (set once per process)."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "",
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.done, self.enabled = name, total, unit, done, enabled
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.first, self.next_print, self.next_copy, self.note = done, 0.0, 0.0, ""
        self.printed: int | None = None
        self.copied: int | None = None

    def __enter__(self) -> Progress:
        if self.watch is not None:
            self.watch.enter(self.name)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.watch is not None:
            self.watch.leave()
        self._print(last=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished work; prints at most twice a second on a terminal, every 10 s elsewhere."""
        self.done += count
        self.note = note or self.note
        if self.watch is not None:
            self.watch.advance(self.unit)
        now = time.monotonic()
        if now >= self.next_print:
            self.next_print = now + (0.5 if self.live else 10.0)
            self._print()

    @property
    def rate(self) -> float:
        """Units per second since this start."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """One line: share, rate, time left, note."""
        left = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
        share = 100 * self.done / max(self.total, 1)
        took = duration(time.monotonic() - self.started)
        rest = f"{duration(left)} left" if self.done < self.total else f"took {took}"
        return f"{self.name}: {self.done}/{self.total} {self.unit} ({share:.0f} %), {self.rate:.3g}/s, {rest}{'  ' + self.note if self.note else ''}"

    def _print(self, last: bool = False) -> None:
        """A live line is written over; a plain one stands, so the last is not said again when the one before it said as much."""
        if not self.enabled:
            return
        line, now = self.line(), time.monotonic()
        if self.live:
            tell("\r\x1b[K" + line, self.stream, end="\n" * last)
        elif self.printed != self.done:
            tell(line, self.stream)
            self.printed = self.done
        if (
            self.copy_to is not None
            and self.copied != self.done
            and (last or now >= self.next_copy)
        ):
            self.next_copy, self.copied = now + 10.0, self.done
            self.copy_to.write(time.strftime("%H:%M:%S ") + line + "\n")
