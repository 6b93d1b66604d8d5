"""Run a command on several ranks of this machine, or as one task of a Slurm job step.

Import nothing that imports torch before `run_on_ranks`; see `dist_scan.world.processes`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import SimpleQueue
from types import FrameType

from dist_scan.config import FATAL_ERROR, ConfigError
from dist_scan.world.processes import (
    CONTEXT,
    free_port,
    limit_threads,
    send_signal,
    set_passive_waiting,
    start_ranks,
    wait_for_ranks,
)

FIRST_SLURM_PORT = 20000
NUM_SLURM_PORTS = 12000


def run_on_ranks(work: Callable[[], int], processes: int) -> int:
    """Run ``work``, which opens its world, on ``processes`` ranks; returns the exit code.

    Inside a Slurm step of several tasks, or under torchrun, every task is a rank and ``processes``
    is not used. Raises ConfigError with the text of the first rank's ValueError.
    """
    if processes < 1:
        raise ConfigError(f"--processes: {processes}; allowed: 1 or more")
    set_passive_waiting()
    if "RANK" in os.environ or _set_slurm_environment():
        return work()
    limit_threads(processes)
    return work() if processes == 1 else _fork(work, processes)


def error_text(error: ValueError | OSError) -> str:
    """One line for the user: the text of a ValueError, or the file and reason of an OSError."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _set_slurm_environment() -> bool:
    """Set the variables that `open_world` reads from those of srun.

    Returns False if this process is not a task of a Slurm step with several tasks.
    """
    env = os.environ
    is_step = "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env
    if not is_step or int(env.get("SLURM_NTASKS", 1)) < 2:
        return False
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=str(int(env["SLURM_NTASKS"]) // nodes),
    )
    if "SLURM_CPUS_PER_TASK" in env:
        env.setdefault("CORES_PER_RANK", env["SLURM_CPUS_PER_TASK"])
    step = 7 * int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault("MASTER_PORT", str(FIRST_SLURM_PORT + step % NUM_SLURM_PORTS))
    return True


def first_host(nodes: str) -> str:
    """node[03-07,9],other -> node03."""
    return re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0])


def _fork(work: Callable[[], int], processes: int) -> int:
    errors = CONTEXT.SimpleQueue()
    ranks = start_ranks(partial(_run_work, work, errors), processes, free_port())

    def forward(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # Ctrl-C has reached every process of the terminal.
            send_signal(ranks, number)

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, forward)
    code = wait_for_ranks(ranks)
    if not errors.empty():
        raise ConfigError(errors.get())
    return code


def _run_work(work: Callable[[], int], errors: SimpleQueue[str], rank: int) -> None:
    """Run ``work`` and end this process; an error in its input goes into the queue."""
    try:
        code = work()
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or error.filename is not None:
            errors.put(error_text(error))
            code = FATAL_ERROR
        else:
            traceback.print_exc()
            code = 1
    except BaseException:
        # If another rank has reported an error, this one is only the connection that it closed.
        if errors.empty():
            traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # An orderly shutdown would wait for ranks that may have ended.
