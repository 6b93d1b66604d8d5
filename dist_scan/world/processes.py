"""The rank processes of one machine: start them, set their environment, wait until they end.

Standard library only: ranks are forked, and OpenMP reads its settings when torch is imported.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess

CONTEXT = multiprocessing.get_context("fork")
"""Forked ranks need no imports."""
LOOPBACK = "127.0.0.1"
GRACE_S = 4.0
"""Seconds that ranks may take to end once one has failed, before they are killed."""
POLL_S = 0.05
PR_SET_PDEATHSIG = 1


def set_passive_waiting() -> None:
    """Set OMP_WAIT_POLICY: OpenMP threads sleep while they wait, and leave the cores to others."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def limit_threads(processes: int) -> None:
    """Divide the cores among the processes: two oversubscribed ranks were 17 times slower."""
    threads = max(1, available_cores() // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def free_port(address: str = LOOPBACK) -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        return listener.getsockname()[1]


def start_ranks(main: Callable[[int], None], processes: int, port: int) -> list[ForkProcess]:
    """Start ``main(rank)`` in ``processes`` processes, whose rendezvous is at ``port``.

    A rank is killed with this process.
    """
    ranks = [
        CONTEXT.Process(target=_run_rank, args=(main, rank, processes, port, os.getpid()))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    return ranks


def _run_rank(
    main: Callable[[int], None], rank: int, processes: int, port: int, parent: int
) -> None:
    # Ask the kernel to kill this process when its parent ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # The parent ended before the call above.
        os._exit(1)
    set_rank_environment(rank, processes, port)
    main(rank)


def set_rank_environment(rank: int, processes: int, port: int) -> None:
    """Set the variables that `open_world` reads, for a rank of ``processes`` on this machine."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR=LOOPBACK,
        MASTER_PORT=str(port),
    )


def send_signal(ranks: Sequence[ForkProcess], number: int) -> None:
    """Send a signal to all ranks that are still running."""
    for process in ranks:
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)


def wait_for_ranks(ranks: Sequence[ForkProcess]) -> int:
    """Wait until all ranks have ended.

    Returns 0 if all succeeded, else the exit code of the first that failed (128 + n if signal n
    ended it). After a failure the others get GRACE_S to end, and are then killed.
    """
    while True:
        codes = [process.exitcode for process in ranks]
        failures = [code for code in codes if code not in (None, 0)]
        if failures:
            _end_ranks(ranks)
            code = failures[0]
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


def _end_ranks(ranks: Sequence[ForkProcess]) -> None:
    # A stopped rank continues, so that it can write its stacks and end by itself.
    send_signal(ranks, signal.SIGCONT)
    deadline = time.monotonic() + GRACE_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
        process.join()
