"""What the ranks leave for the launcher, written also where the disk is full: each rank keeps two files of a few blocks aside, and one
that is needed is written over in place (which takes no new block) and renamed to what it has become.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Literal

from dist_scan.storage.artifacts import write_text

SIZE = 16384
Kind = Literal["marker", "error"]
KINDS: tuple[Kind, ...] = ("marker", "error")


def keep(folder: Path, rank: int) -> None:
    """Set this rank's files aside in RUN/logs. Never raises: on a disk that is full already those of an earlier start are still there."""
    try:
        (folder / "logs").mkdir(exist_ok=True)
        for spare in _spares(folder, rank):
            if not spare.is_file() or spare.stat().st_size != SIZE:
                spare.write_bytes(
                    os.urandom(SIZE)
                )  # a file system that compresses would keep no block for zeros
    except OSError:
        pass  # they are wanted only when a marker cannot be written, and then that is said


def drop(folder: Path, rank: int) -> None:
    """The rank ends in good order: remove what is left of them."""
    for spare in _spares(folder, rank):
        try:
            spare.unlink(missing_ok=True)
        except OSError:
            pass  # a read-only disk keeps them; they are the next start's


def put(
    path: Path,
    text: str,
    kind: Kind,
    folder: Path,
    rank: int,
    short: str | None = None,
    durable: bool = True,
) -> None:
    """Write a file so that readers see all of it or nothing. On a full disk it takes the place of this rank's spare file of that kind, as
    `short` (at most SIZE bytes; None: the text). durable: wait until the disk has it. Raises OSError when no way is left.
    """
    try:
        (write_text if durable else write_at_once)(path, text)
    except OSError as error:
        try:
            _over(
                _spare(folder, rank, kind), path, (text if short is None else short).encode()[:SIZE]
            )
        except OSError:
            raise error from None


def _over(spare: Path, path: Path, data: bytes) -> None:
    with open(spare, "r+b", buffering=0) as f:
        f.write(data)
        f.truncate()
        os.fsync(f.fileno())
    os.replace(spare, path)


def write_at_once(path: Path, text: str) -> None:
    """write_text without waiting for the disk, for who is about to end: whole or not there. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _spares(folder: Path, rank: int) -> list[Path]:
    return [_spare(folder, rank, kind) for kind in KINDS]


def _spare(folder: Path, rank: int, kind: Kind) -> Path:
    return folder / "logs" / f".kept-for-{kind}-rank{rank:05d}"
