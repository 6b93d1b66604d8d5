"""Stop requests in loops that all ranks run together."""

from __future__ import annotations

from collections.abc import Callable

from dist_scan.monitoring.progress import StopRequested
from dist_scan.world.collectives import any_rank


def never_stop() -> bool:
    """A `stop_requested` callback that never requests a stop."""
    return False


def raise_if_stopped(stop_requested: Callable[[], bool]) -> None:
    """Raise StopRequested on all ranks if `stop_requested()` is true on any rank. Collective."""
    if any_rank(stop_requested()):
        raise StopRequested()
