"""Where a training step's time goes: named sections on one clock per process, always on while training.

A section is what runs inside `with section("forward")`, less the sections inside it, so all of them add up to the wall clock.
On a GPU the clock is a row of events in its stream (engine/precision.py makes them), so a section is what the device did or
waited for between two events, not how long Python took to ask for it; nothing is synchronised for its sake.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

NAMES = (
    "data_wait",
    "copy",
    "augmentation",
    "forward",
    "backward",
    "all_reduce",
    "optimizer",
    "end_step",
    "save",
    "epoch",
    "other",
)
WHOLE = (
    "save",
    "epoch",
)  # what ranks say to each other in there is part of it: all ranks wait for one that writes
T = TypeVar("T")


class StepTimer:
    """Seconds per section of this rank. `mark` makes a device event recorded now (None: the host's clock is the truth)."""

    def __init__(self, mark: Callable[[], Any] | None = None) -> None:
        self.mark, self.stack, self.pending = mark, ["other"], deque()
        self.span: Callable[[str], AbstractContextManager] | None = None
        """What shows a section in a trace, while one is recorded."""
        self.spans: list[AbstractContextManager | None] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; the running section starts now."""
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.pending.clear()
        self.ready, self.last = None, self._now()

    def _now(self) -> Any:
        return time.perf_counter() if self.mark is None else self.mark()

    def _book(self, until: Any) -> None:
        """Give the time since the last change to the running section."""
        if self.mark is None:
            self.seconds[self.stack[-1]] += until - self.last
        else:
            self.pending.append((self.stack[-1], self.last, until))
        self.last = until

    def enter(self, name: str) -> None:
        """Begin a section inside the running one."""
        self._book(self._now())
        self.stack.append(self.stack[-1] if self.stack[-1] in WHOLE else name)
        self.spans.append(self.span(name) if self.span else None)
        if self.spans[-1] is not None:
            self.spans[-1].__enter__()

    def leave(self) -> None:
        """End the running section; the one around it goes on."""
        self._book(self._now())
        self.stack.pop()
        span = self.spans.pop()
        if span is not None:
            span.__exit__(None, None, None)

    def gradient_ready(self, _: Any = None) -> None:
        """A gradient is complete on this rank (a hook of every parameter): after the last one, backward() only waits for others."""
        self.ready = self._now()

    def only_waiting_since_ready(self, name: str) -> None:
        """Give the running section up to the last gradient_ready, and what came after to `name`."""
        if self.ready is not None:
            self._book(self.ready if self.mark else max(self.ready, self.last))
            self.stack[-1], self.ready = name, None

    def settle(self, wait: bool = False) -> None:
        """Count the events that have passed; with `wait`, all of them (synchronises)."""
        while self.pending:
            name, begin, end = self.pending[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self.seconds[name] += max(begin.elapsed_time(end), 0.0) / 1000
            self.pending.popleft()

    def read(self) -> dict[str, float]:
        """Seconds by section since the last reset or read, up to now; starts at zero again."""
        self._book(self._now())
        self.settle(wait=True)
        found, self.seconds = self.seconds, dict.fromkeys(NAMES, 0.0)
        return found


_clock: StepTimer | None = None


def use_clock(clock: StepTimer | None) -> None:
    """Count sections on this clock from now on; None: count nothing."""
    global _clock
    _clock = clock


class _Section:
    """A name to enter; holds no state, so one object serves every use and nests in itself."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _clock is not None:
            _clock.enter(self.name)

    def __exit__(self, *error: object) -> None:
        if _clock is not None:
            _clock.leave()


_SECTIONS = {name: _Section(name) for name in NAMES}


def section(name: str) -> AbstractContextManager:
    """`with section("copy"): ...` counts the block's time under one of NAMES; free when no clock is in use."""
    return _SECTIONS[name]


def waited(items: Iterable[T]) -> Iterator[T]:
    """The same items; the time each takes to come is data wait (less the sections inside)."""
    source, end = iter(items), object()
    while True:
        with _SECTIONS["data_wait"]:
            item = next(source, end)
        if item is end:
            return
        yield item
