"""Graceful stop: a signal only sets a flag; long work checks the flag where it is safe to stop.

`StopFlag.raise_if_requested` checks this process's flag; searches get it as a callback and use
`search/stopping.py`. Both raise `monitoring.progress.StopRequested`.
"""

from __future__ import annotations

import signal
from types import FrameType

from dist_scan.monitoring.progress import StopRequested
from dist_scan.world.collectives import any_rank

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class NonRetryableError(RuntimeError):
    """Fatal error: starting the ranks again cannot help. The process ends with exit code 2."""


class StopFlag:
    """The stop request of this process.

    SIGUSR2 means save, end and be requeued; SIGTERM and SIGINT mean save and end. A second SIGINT
    ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        """Install the signal handlers, then unblock pending signals.

        Launchers start the ranks with SIGUSR2 and SIGTERM blocked, so that no signal is lost before
        the handlers are installed.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        # Slurm may send SIGTERM while the run saves after SIGUSR2; it must be requeued anyway.
        if self.signal != signal.SIGUSR2:
            self.signal = number

    @property
    def requested(self) -> bool:
        """True when this rank has received a stop signal."""
        return self.signal is not None

    def raise_if_requested(self) -> None:
        """Raise StopRequested on all ranks if any rank has received a stop signal. Collective."""
        if any_rank(self.requested):
            raise StopRequested()
