"""Where the time of a training step goes: exclusive seconds per section.

``with timed("forward"):`` counts the time of its block, less that of sections inside it, so the
sections add up to the wall-clock time. On a GPU the time stamps are events in its stream: a section
is what the device executed or waited for between two events, not the time Python took to launch it,
and nothing is synchronised.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

SECTIONS = (
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
UNDIVIDED = ("save", "epoch")
"""Sections that include inner ones: their all-reduce time is waiting for the rank that writes."""
Timestamp = Any
"""Seconds on the host, or an event in the device's stream."""
T = TypeVar("T")


def cuda_event_recorder(device: torch.device) -> Callable[[], torch.cuda.Event] | None:
    """A function that records a timed event in the device's current stream; None on a CPU."""
    if device.type != "cuda":
        return None

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record


class StepTimer:
    """Seconds per section on this rank.

    ``record_event`` returns a device event recorded now; None: use the host's clock.
    """

    def __init__(self, record_event: Callable[[], Timestamp] | None = None) -> None:
        self.record_event = record_event
        self.stack = ["other"]
        self.pending: deque[tuple[str, Timestamp, Timestamp]] = deque()
        self.trace_span: Callable[[str], AbstractContextManager] | None = None
        """Shows a section in a trace; set while one is recorded."""
        self.spans: list[AbstractContextManager | None] = []
        self.reset()

    def reset(self) -> None:
        """Discard all counts; the current section starts now."""
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self.pending.clear()
        self.gradients_ready: Timestamp | None = None
        self.last = self._now()

    def _now(self) -> Timestamp:
        return time.perf_counter() if self.record_event is None else self.record_event()

    def _count_until(self, end: Timestamp) -> None:
        """Add the time since the last change of section to the current one."""
        if self.record_event is None:
            self.seconds[self.stack[-1]] += end - self.last
        else:
            self.pending.append((self.stack[-1], self.last, end))
        self.last = end

    def enter(self, name: str) -> None:
        """Start a section inside the current one."""
        self._count_until(self._now())
        self.stack.append(self.stack[-1] if self.stack[-1] in UNDIVIDED else name)
        span = self.trace_span(name) if self.trace_span else None
        self.spans.append(span)
        if span is not None:
            span.__enter__()

    def leave(self) -> None:
        """End the current section; the one around it continues."""
        self._count_until(self._now())
        self.stack.pop()
        span = self.spans.pop()
        if span is not None:
            span.__exit__(None, None, None)

    def gradient_ready(self, _: Any = None) -> None:
        """Hook of every parameter: its gradient is complete on this rank.

        After the last one, backward() only waits for other ranks.
        """
        self.gradients_ready = self._now()

    def split_at_last_gradient(self, name: str) -> None:
        """Count the time since the last `gradient_ready` as ``name``."""
        if self.gradients_ready is not None:
            on_host = self.record_event is None
            end = max(self.gradients_ready, self.last) if on_host else self.gradients_ready
            self._count_until(end)
            self.stack[-1] = name
            self.gradients_ready = None

    def collect_events(self, wait: bool = False) -> None:
        """Count the events that the device has passed; with ``wait`` all of them (synchronises)."""
        while self.pending:
            name, begin, end = self.pending[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self.seconds[name] += max(begin.elapsed_time(end), 0.0) / 1000
            self.pending.popleft()

    def read(self) -> dict[str, float]:
        """Seconds by section since the last reset or read; counting restarts at zero."""
        self._count_until(self._now())
        self.collect_events(wait=True)
        seconds = self.seconds
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        return seconds


_timer: StepTimer | None = None


def use_timer(timer: StepTimer | None) -> None:
    """Count sections on this timer from now on; None: do not count."""
    global _timer
    _timer = timer


class _Section:
    """Context manager of one section. Stateless: one object serves nested and repeated use."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _timer is not None:
            _timer.enter(self.name)

    def __exit__(self, *error: object) -> None:
        if _timer is not None:
            _timer.leave()


_SECTIONS = {name: _Section(name) for name in SECTIONS}


def timed(name: str) -> AbstractContextManager:
    """Count the time of a block under one of SECTIONS; costs nothing if no timer is in use."""
    return _SECTIONS[name]


def time_data_wait(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; waiting for each counts as data wait, less the sections inside."""
    iterator = iter(items)
    while True:
        with _SECTIONS["data_wait"]:
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
