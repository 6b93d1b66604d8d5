"""The lock of a run folder: one job, local run or submission at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import BinaryIO

from dist_scan.config import ConfigError
from launch import records

RANKS_END_S = 20.0
"""How long the ranks of a killed launcher may take to end and to release the lock."""


def acquire_lock(run_dir: Path, name: str = "lock", verb: str = "is in use by") -> BinaryIO:
    """An open file that holds RUN/`name` as a lock until it is closed or this process ends.

    Forked ranks inherit it, so the run folder stays locked while any rank lives. Raises ConfigError
    ("the run folder RUN VERB HOLDER") if another process holds it, or if RUN is not writable.
    """
    deadline = time.monotonic() + RANKS_END_S
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Without a buffer: on a full disk closing would fail again.
        lock = open(run_dir / name, "a+b", buffering=0)  # noqa: SIM115  outlives this function
        while (holder := _try_lock(lock)) is not None:
            # The ranks of a launcher that was killed hold its lock for a moment longer.
            if not _was_killed(holder) or time.monotonic() > deadline:
                raise ConfigError(
                    f"the run folder '{run_dir}' {verb} {holder or 'another process'}; wait for "
                    "it, stop it, or give this run another name with name=OTHER"
                )
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise ConfigError(
            f"runtime.run_dir: cannot write in '{run_dir}' ({error.strerror}); choose another with "
            "runtime.run_dir=PATH"
        ) from None
    return lock


def _try_lock(lock: BinaryIO) -> str | None:
    """None if this process holds the lock now, else the text that its holder wrote."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return lock.read().decode(errors="replace").strip()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(
            f"this file system has no locks ({error.strerror}); two runs in one run folder would "
            "go unnoticed",
            file=sys.stderr,
        )
    return None


def _was_killed(holder: str) -> bool:
    """Whether the holder is a process of this machine that has ended (its ranks soon will)."""
    words = holder.split()  # process PID on HOST
    if len(words) != 4 or words[3] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


def local_holder(run_dir: Path) -> str:
    """The process of this machine that holds the lock, as `process PID on HOST`; '' if none does.

    Reads /proc/locks (Linux) instead of trying the lock, which could make a run fail that starts
    at this moment.
    """
    try:
        inode = (run_dir / "lock").stat().st_ino
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    holder = records.read_text(run_dir / "lock")
    for line in locks:
        fields = line.split()  # number: FLOCK ADVISORY WRITE pid major:minor:inode start end
        if len(fields) <= 5 or fields[1] != "FLOCK" or not fields[5].endswith(f":{inode}"):
            continue
        # Inodes are unique only within one file system, so the pid must match too.
        if holder.startswith(f"process {fields[4]} on "):
            return holder
    return ""
