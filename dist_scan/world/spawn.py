"""A command as several ranks on this machine, or as the rank that srun or torchrun has already made of this process.

Import nothing heavy before `as_ranks`: the ranks are forked, and OpenMP reads its settings when torch is imported.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

from dist_scan.config import ConfigError

GRACE_S = 4.0  # how long ranks may take to end once one has failed, before they are killed
USER_MISTAKE = 2


def as_ranks(work: Callable[[], int], processes: int) -> int:
    """Run `work` (it opens its world) in `processes` ranks and return the exit code. Raises ConfigError with the text of the first rank's
    ValueError. Inside a job step of several tasks `processes` is not used: every task is a rank."""
    if processes < 1:
        raise ConfigError(f"--processes: {processes}; allowed: 1 or more")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # threads that spin while they wait slow down everything else on the cores
    if "RANK" in os.environ or _slurm_rank():
        return work()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return work() if processes == 1 else _fork(work, processes)


def _slurm_rank() -> bool:
    """In a step of srun with several tasks: say where this one stands in the variables that open_world reads."""
    env = os.environ
    if (
        int(env.get("SLURM_NTASKS", 1)) < 2
        or "SLURM_PROCID" not in env
        or "SLURM_STEP_NODELIST" not in env
    ):
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
    env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault(
        "MASTER_PORT",
        str(
            20000 + (7 * int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))) % 12000
        ),
    )
    return True


def first_host(nodes: str) -> str:
    """node[03-07,9],other -> node03."""
    return re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0])


def _fork(work: Callable[[], int], processes: int) -> int:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mistakes = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(work, r, processes, port, os.getpid(), mistakes))
        for r in range(processes)
    ]
    for p in ranks:
        p.start()

    def forward(number: int, frame) -> None:
        for p in ranks:
            if (
                p.exitcode is None and number != signal.SIGINT
            ):  # Ctrl-C has reached every process of the terminal
                os.kill(p.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, forward)
    code = _wait(ranks)
    if not mistakes.empty():
        raise ConfigError(mistakes.get())
    return code


def _rank(
    work: Callable[[], int], rank: int, processes: int, port: int, parent: int, mistakes
) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: a parent that is killed takes its ranks along
        if os.getppid() != parent:
            os._exit(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        code = work()
    except (ValueError, OSError) as error:
        named = isinstance(error, ValueError) or error.filename is not None
        mistakes.put(
            str(error) if isinstance(error, ValueError) else f"{error.filename}: {error.strerror}"
        ) if named else traceback.print_exc()
        code = USER_MISTAKE if named else 1
    except BaseException:
        if (
            mistakes.empty()
        ):  # else a peer has said what was wrong, and this is its connection that closed
            traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly shutdown waits for peers that may be gone


def _wait(ranks: list) -> int:
    """0 when all ended well; else the code of the first that did not, with the others ended within GRACE_S."""
    while any(p.exitcode is None for p in ranks):
        bad = [p.exitcode for p in ranks if p.exitcode not in (None, 0)]
        if bad:
            deadline = time.monotonic() + GRACE_S
            while any(p.exitcode is None for p in ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
            for p in ranks:
                if p.exitcode is None:
                    p.kill()
                p.join()
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        time.sleep(0.05)
    return max(p.exitcode if p.exitcode >= 0 else 128 - p.exitcode for p in ranks)
