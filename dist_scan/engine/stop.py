"""Being asked to stop. A signal sets a flag and nothing else; whoever works looks at the flag where it is safe to leave."""

from __future__ import annotations

import signal

from dist_scan.monitoring.progress import StopRequested
from dist_scan.world.collectives import agree

NOTICE = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class NonRetryableError(RuntimeError):
    """What a relaunch would meet again: no checkpoint loads, training diverged. Told like a user's mistake, without a relaunch."""


class Stop:
    """The process's stop flag. USR2: leave and come back (requeue); TERM or INT: leave. A second INT ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        """Stand the handlers, then let in what waited (the launcher starts us with USR2 and TERM blocked)."""
        for number in NOTICE:
            signal.signal(number, self._notice)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICE)

    def _notice(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if (
            self.signal != signal.SIGUSR2
        ):  # "come back" stands, whatever Slurm sends while it waits for us to leave
            self.signal = number

    @property
    def asked(self) -> bool:
        """This rank was asked."""
        return self.signal is not None

    def agreed(self) -> bool:
        """Any rank was asked (collective): what long sections poll at every shard or iteration."""
        return agree(self.asked)

    def check(self) -> None:
        """Raise Stopped on all ranks when any was asked (collective)."""
        if self.agreed():
            raise StopRequested()
