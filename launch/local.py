"""Run a config on this machine: python launch/local.py CONFIG [--processes N] [path=value ...]"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType

# This file is run by its path, from a checkout; the imports below need the checkout in sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_scan.config import FATAL_ERROR, ConfigError, RunConfig, dump  # noqa: E402
from dist_scan.storage import atomic  # noqa: E402
from dist_scan.world.processes import (  # noqa: E402
    limit_threads,
    send_signal,
    set_passive_waiting,
    start_ranks,
    wait_for_ranks,
)
from launch import command_line, recovery, terminal  # noqa: E402
from launch.run_lock import acquire_lock  # noqa: E402

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""Passed on to the ranks, which save and stop. HUP: the terminal or connection was closed."""


def main(argv: list[str] | None = None) -> int:
    """Validate the config, lock the run folder, run. Returns the exit code (2: invalid setting)."""
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description="Run a config on this machine."
    )
    command_line.add_run_arguments(parser)
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="how many processes share the work (default 1; on GPUs one per GPU)",
    )
    args = parser.parse_intermixed_args(argv)
    terminal.survive_hangup()
    try:
        if args.processes < 1:
            raise ConfigError(f"--processes: {args.processes}; allowed: 1 or more")
        limit_threads(args.processes)
        set_passive_waiting()
        run = command_line.load_run(args)
        command_line.check_world_size(run, args.processes)
        lock = acquire_lock(run.run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return FATAL_ERROR
    with lock:
        try:
            atomic.write_text(run.run_dir / "config.yaml", dump(run))
            return run_until_done(run.run_dir, args.processes, run.runtime.relaunches)
        except OSError as error:
            print(_os_error_text(run, error), file=sys.stderr)
            return 1


def _os_error_text(run: RunConfig, error: OSError) -> str:
    text = f"failed: '{error.filename or run.run_dir}': {error.strerror or error}"
    if "same command" in text:  # the error names a remedy already
        return text
    return f"{text}; fix it and start the same command again: finished work is kept"


def run_until_done(run_dir: Path, processes: int, relaunches: int) -> int:
    """Start the ranks, and again after each fault that a relaunch may help; returns the exit code.

    `recovery.decide` makes the decision after each start.
    """
    start = fruitless_starts = 0
    while True:
        digest = recovery.prepare_start(run_dir)
        code = run_one_start(run_dir, processes)
        decision = recovery.decide(run_dir, digest, start, relaunches, fruitless_starts)
        if decision.action != "relaunch":
            break
        start += 1
        fruitless_starts = decision.fruitless_starts
        print(
            f"fault: {decision.reason}\nstarting again ({start}) from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )

    if decision.action == "done":
        return 0
    if decision.action == "fatal_error":
        if decision.reason.startswith("rank "):  # rank 0 prints its own errors
            print(f"error: {decision.reason}", file=sys.stderr)
        return FATAL_ERROR
    if decision.action == "give_up":
        print(
            f"failed: {decision.reason}\n(tracebacks: {run_dir}/logs/error-rank*.json; the same "
            "command resumes the run from the last checkpoint)",
            file=sys.stderr,
        )
        return code or 1
    number = recovery.stop_signal(run_dir)
    return 128 + (number if number in set(signal.Signals) else signal.SIGTERM)


def run_one_start(run_dir: Path, processes: int) -> int:
    """One start of the ranks, until all have ended.

    Signals that ask the run to stop are passed on to the ranks. Returns 0, or the exit code of the
    first rank that failed.
    """
    ranks = fork_ranks(run_dir, processes, recovery.free_port())

    def forward(number: int, frame: FrameType | None) -> None:
        send_signal(ranks, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in FORWARDED_SIGNALS:
        ignored_by_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
        if not ignored_by_nohup:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)
    try:
        return wait_for_ranks(ranks)
    finally:
        # A signal that arrives between two starts is delivered to the next ranks.
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)


def fork_ranks(run_dir: Path, processes: int, port: int) -> list[ForkProcess]:
    """Fork the ranks from this process, which has imported everything that they need.

    This saves every start and relaunch the imports (8 s on two cores). It is safe because this
    process has neither used a GPU nor started a thread pool. The ranks start with the stop signals
    blocked: a signal that comes early is delivered once their handlers are installed.
    """
    import dist_scan.run  # noqa: F401  the ranks inherit it

    if processes > 1:
        import torch._dynamo  # noqa: F401  every optimizer imports it, in 3 s per rank

    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
    return start_ranks(partial(_rank_main, run_dir), processes, port)


def _rank_main(run_dir: Path, rank: int) -> None:
    """The main function of a rank's process; does not return."""
    terminal.survive_hangup()
    os.setsid()  # Ctrl-C reaches only the launcher, which passes it on
    if rank > 0:
        path = run_dir / "logs" / f"rank{rank:05d}.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
    from dist_scan import run

    sys.exit(run.main(str(run_dir)))


if __name__ == "__main__":
    sys.exit(main())
