"""The same job on this machine: python launch/local.py CONFIG [--processes N] [dotted.override=value ...]"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # `python launch/local.py` from a checkout

from dist_scan.world.processes import (  # noqa: E402
    limit_threads,
    send_signal,
    start_ranks,
    wait_for_ranks,
    wait_passively,
)
from launch import recovery, terminal  # noqa: E402

NOTICE = (
    signal.SIGTERM,
    signal.SIGUSR2,
    signal.SIGINT,
    signal.SIGHUP,
)  # HUP: the terminal was closed, or the connection was cut
LEAVING_S = 20.0  # how long the ranks of a killed launcher may take to end


def main(argv: list[str] | None = None) -> int:
    """Validate, write RUN/config.yaml, start the processes, wait. Returns the exit code (2: a mistake of the user's)."""
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description="Run a config on this machine."
    )
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="how many processes share the work (default 1; on GPUs one per GPU)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="look at the first 300 steps of each training: a trace, and what it waits for in words",
    )
    parser.add_argument("overrides", nargs="*", help="dotted.path=value, applied before validation")
    args = parser.parse_intermixed_args(argv)
    terminal.outlive()
    limit_threads(args.processes)
    wait_passively()
    from dist_scan.config import ConfigError, dump
    from dist_scan.run_config import load_config

    try:
        if args.processes < 1:
            raise ConfigError(f"--processes: {args.processes}; allowed: 1 or more")
        run = load_config(args.config, [*["runtime.profile=300"] * args.profile, *args.overrides])
        check_processes(run, args.processes)
        lock = take_lease(run.run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with lock:
        from dist_scan.storage.atomic import write_text

        try:
            write_text(run.run_dir / "config.yaml", dump(run))
            return launch(run.run_dir, args.processes, run.runtime.relaunches)
        except OSError as error:
            way = (
                ""
                if "same command" in str(error.strerror)
                else "; mend it and start the same command again: what is finished is kept"
            )
            print(
                f"failed: '{error.filename or run.run_dir}': {error.strerror or error}{way}",
                file=sys.stderr,
            )
            return 1


def check_processes(run, processes: int) -> None:
    """Every stage must be able to run on so many processes: said before anything starts."""
    from dist_scan.config import ConfigError

    for name, stage in run.stages.items():
        try:
            stage.check_ranks(name, processes)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def take_lease(run_dir: Path, name: str = "lock", held: str = "is in use by"):
    """An open file that holds the run folder's lock (or another of its locks) while this process lives. Raises ConfigError naming who holds it."""
    from dist_scan.config import ConfigError

    deadline = time.monotonic() + LEAVING_S
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(
            run_dir / name, "a+b", buffering=0
        )  # no buffer: on a full disk closing would fail once more
        while (holder := _locked(lock)) is not None:
            if not _gone(holder) or time.monotonic() > deadline:
                raise ConfigError(
                    f"the run folder '{run_dir}' {held} {holder or 'another process'}; wait for it, stop it, "
                    "or give this run another name with name=OTHER"
                )
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise ConfigError(
            f"runtime.run_dir: cannot write in '{run_dir}' ({error.strerror}); give another with runtime.run_dir=PATH"
        ) from None
    return lock


def _locked(lock) -> str | None:
    """None when the lock is ours now, else who holds it. Raises OSError."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return lock.read().decode(errors="replace").strip()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(
            f"no locks on this file system ({error.strerror}); two runs in one run folder would not be noticed here",
            file=sys.stderr,
        )
    return None


def _gone(holder: str) -> bool:
    """A launcher of this machine that was killed: its ranks, which hold the lock too, are about to end."""
    words = holder.split()
    if len(words) != 4 or words[3] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


def launch(run_dir: Path, processes: int, relaunches: int) -> int:
    """Start the ranks, wait, and start them again after a fault while starts get further. Returns the exit code."""
    idle = 0
    for start_number in range(relaunches + recovery.PORT_RETRIES + 1):
        mark = recovery.begin(run_dir)
        code = attempt(run_dir, processes)
        verdict = recovery.decide(run_dir, mark, start_number, relaunches, idle)
        idle = verdict.idle
        if verdict.action == "relaunch":
            print(
                f"fault: {verdict.why}\nstarting again ({start_number + 1}) from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            continue
        if verdict.action == "mistake" and verdict.why.startswith(
            "rank "
        ):  # rank 0 has told its own
            print(f"error: {verdict.why}", file=sys.stderr)
        if verdict.action == "give_up":
            print(
                f"failed: {verdict.why}\n(full text: {run_dir}/logs/error-rank*.json; the same command goes on from the last checkpoint)",
                file=sys.stderr,
            )
        break
    if verdict.action in ("requeue", "stopped"):
        number = recovery.asked(run_dir)
        return 128 + (number if number in set(signal.Signals) else signal.SIGTERM)
    return {"done": 0, "mistake": 2}.get(verdict.action, code or 1)


def attempt(run_dir: Path, processes: int) -> int:
    """One start of the ranks, to its end. 0 when all ended well, else the code of the first that did not."""
    ranks = start(run_dir, processes, recovery.free_port())

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded = signal.SIGTERM if number == signal.SIGHUP else number
        send_signal(ranks, forwarded)

    for number in NOTICE:
        if (
            number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ):  # nohup has seen to it that the run goes on
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICE)
    try:
        return wait_for_ranks(ranks)
    finally:
        signal.pthread_sigmask(
            signal.SIG_BLOCK, NOTICE
        )  # one that comes between two starts is kept for the next ranks


def start(run_dir: Path, processes: int, port: int) -> list[BaseProcess]:
    """Fork the ranks from this process, which has imported everything.

    A start or a relaunch then costs no imports (8 s on two cores). This is safe because nothing
    here has used a GPU or started a thread pool. The ranks start with NOTICE blocked, so that an
    early signal is pending until their handlers are installed.
    """
    import dist_scan.run  # noqa: F401  imported here for the ranks

    if processes > 1:
        import torch._dynamo  # noqa: F401  every optimizer imports it: three seconds per rank

    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICE)
    return start_ranks(partial(_run_rank, run_dir), processes, port)


def _run_rank(run_dir: Path, rank: int) -> None:
    """The main function of one rank. It holds the run folder's lock too, while it lives."""
    terminal.outlive()
    os.setsid()  # Ctrl-C reaches the launcher only, which forwards it.
    if rank > 0:
        path = run_dir / "logs" / f"rank{rank:05d}.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
    from dist_scan.run import main as run

    sys.exit(run(str(run_dir)))


if __name__ == "__main__":
    sys.exit(main())
