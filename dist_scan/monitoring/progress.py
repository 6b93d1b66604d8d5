"""Progress of long work: units done, rate and time left, as a live line or as plain lines."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, ClassVar, Protocol, TextIO

from dist_scan.monitoring.watchdog import watched

REFRESH_S = 0.5
"""Seconds between updates of the live line on a terminal."""
LINE_EVERY_S = 10.0
"""Seconds between plain lines, in a log file or where stderr is no terminal."""


class LineWriter(Protocol):
    """Receives lines, as `AppendOnlyFile` does."""

    def write(self, text: str, /) -> object: ...


def print_line(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print to stderr, or another stream, without ever raising OSError.

    Output that cannot be written (a full disk, a closed pipe) must not end the work.
    """
    with suppress(OSError):
        print(text, end=end, file=stream or sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """42 -> '42s', 754 -> '12m34s', 7500 -> '2h05m', 200000 -> '2d07h'."""
    s = int(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


class StopRequested(Exception):
    """The process was asked to stop; all state is saved, and the same command resumes the work."""


class Progress:
    """Context manager of long work: ``with Progress("embed", n, "images") as p: p.advance(512)``.

    Prints progress, writes it to the run's log file, and restarts the watchdog's clock (`watched`)
    whenever units are finished.

    Args:
        name: what is done.
        total: number of units.
        unit: their name in the plural.
        done: units finished before this start; they do not count into the rate.
        enabled: whether to print; pass False on ranks other than 0.
        stream: where to print (default stderr).
        is_training: units are training steps, for which the watchdog has a limit of its own.
    """

    log_file: ClassVar[LineWriter | None] = None
    """Also receives a plain line every 10 s; set once per process."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "",
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        is_training: bool = False,
    ) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = done
        self.first = done
        self.enabled = enabled
        self.watched = watched(name)
        self.is_training = is_training
        self.stream = stream or sys.stderr
        self.is_live = self.stream.isatty()
        self.started = time.monotonic()
        self.note = ""
        self.next_print = 0.0
        self.next_log = 0.0
        self.last_printed: int | None = None
        self.last_logged: int | None = None

    def __enter__(self) -> Progress:
        self.work = self.watched.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.watched.__exit__(*error)
        self._print(is_last=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units; prints from time to time, with the latest note."""
        self.done += count
        self.note = note or self.note
        # Before the first step is done kernels may be compiled, which takes longer than a step.
        self.work.is_step = self.is_training
        self.work.restart()
        now = time.monotonic()
        if now >= self.next_print:
            self.next_print = now + (REFRESH_S if self.is_live else LINE_EVERY_S)
            self._print()

    @property
    def rate(self) -> float:
        """Units per second since this start."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """Units done, percentage, rate, time left (or taken) and note, as one line."""
        percent = 100 * self.done / max(self.total, 1)
        if self.done >= self.total:
            clock = f"took {format_duration(time.monotonic() - self.started)}"
        else:
            left_s = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
            clock = f"{format_duration(left_s)} left"
        note = f"  {self.note}" if self.note else ""
        units = f"{self.done}/{self.total} {self.unit}"
        return f"{self.name}: {units} ({percent:.0f} %), {self.rate:.3g}/s, {clock}{note}"

    def _print(self, is_last: bool = False) -> None:
        """Update the live line, or print a plain one unless the last already showed this count."""
        if not self.enabled:
            return
        line = self.line()
        if self.is_live:
            print_line("\r\x1b[K" + line, self.stream, end="\n" if is_last else "")
        elif self.last_printed != self.done:
            print_line(line, self.stream)
            self.last_printed = self.done
        now = time.monotonic()
        if self.last_logged != self.done and (is_last or now >= self.next_log):
            self.next_log = now + LINE_EVERY_S
            self.last_logged = self.done
            self.write_log(line)

    @classmethod
    def write_log(cls, text: str) -> None:
        """Write text with the time of day to the log file, if there is one."""
        if cls.log_file is not None:
            cls.log_file.write(time.strftime("%H:%M:%S ") + text + "\n")
