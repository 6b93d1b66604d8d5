"""Atomic and durable writes of small files. Standard library only."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


def fsync_dir(path: Path) -> None:
    """Flush a folder to disk, so that renames inside it survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, write: Callable[[BinaryIO], Any], durable: bool = True) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part of it.

    ``write`` receives a temporary file, which is renamed to ``path`` once complete.
    With ``durable`` the call returns only after the disk has the file. Raises OSError; the old
    file is then unchanged and the temporary one removed.
    """
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            raise _with_remedy(error, path) from None
        raise
    if durable:
        fsync_dir(path.parent)


def _with_remedy(error: OSError, path: Path) -> OSError:
    """A disk-full error that names the file and says what to do."""
    remedy = "free some space there and start the same command again: finished work is kept"
    return OSError(error.errno, f"{error.strerror} ({remedy})", str(path))


def error_reason(error: Exception) -> str:
    """Text of an error; that of an OSError without its path, for messages that name the file."""
    return getattr(error, "strerror", None) or str(error)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write text (UTF-8) atomically; see `write_atomic`."""
    write_atomic(path, lambda file: file.write(text.encode()), durable)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically; see `write_atomic`."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file.

    A disk that fills up may accept only a part of a write; the next write then raises OSError.
    """
    while data:
        data = data[file.write(data) :]


def append_line(file: BinaryIO, line: bytes) -> None:
    """Append a line, newline included, to an unbuffered file opened with mode "a+b".

    A killed process or a full disk may have left an incomplete last line; it is ended first.
    """
    if _is_last_line_incomplete(file):
        line = b"\n" + line
    write_all(file, line)


def _is_last_line_incomplete(file: BinaryIO) -> bool:
    """Whether the file ends without a newline. Leaves the position at the end of the file."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
