"""Marker and error files that ranks leave for the launcher, written even on a full disk.

Each rank reserves two files of a few blocks in RUN/logs. When an ordinary write fails, one of
them is overwritten in place, which needs no new block, and renamed to the file to be written.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dist_scan.storage.atomic import write_text

SIZE = 16384
"""Bytes of a reserved file, and the most that a file written on a full disk can hold."""
KINDS = ("marker", "error")


class RunMarkers:
    """Marker and error files of one rank in the run folder ``run_dir``."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.logs = run_dir / "logs"

    def reserve(self) -> None:
        """Reserve this rank's files; those of an earlier start are reused. Never raises."""
        try:
            self.logs.mkdir(exist_ok=True)
            for path in map(self._reserved, KINDS):
                if not path.is_file() or path.stat().st_size != SIZE:
                    # Random bytes: a compressing file system would store no blocks for zeros.
                    path.write_bytes(os.urandom(SIZE))
        except OSError:
            pass  # Needed only if a later write fails, which is then reported.

    def release(self) -> None:
        """Remove the reserved files; called when the rank ends normally. Never raises."""
        for path in map(self._reserved, KINDS):
            with suppress(OSError):  # On a read-only disk they stay; the next start reuses them.
                path.unlink(missing_ok=True)

    def write_marker(self, name: str, text: str, short: str | None = None) -> None:
        """Write the marker file RUN/``name`` (DONE, STOPPED, ...) atomically and durably.

        On a full disk it holds ``short`` (default: ``text``), cut to SIZE bytes. Raises OSError if
        it cannot be written at all.
        """
        self._write(self.run_dir / name, text, "marker", short, durable=True)

    def write_error(self, text: str, short: str) -> None:
        """Write this rank's error file, RUN/logs/error-rank*.json.

        As `write_marker`, but does not wait for the disk: the process is about to end.
        """
        path = self.logs / f"error-rank{self.rank:05d}.json"
        self._write(path, text, "error", short, durable=False)

    def _write(self, path: Path, text: str, kind: str, short: str | None, durable: bool) -> None:
        try:
            write_text(path, text, durable)
        except OSError as error:
            data = (text if short is None else short).encode()[:SIZE]
            try:
                _overwrite(self._reserved(kind), data)
                os.replace(self._reserved(kind), path)
            except OSError:
                raise error from None

    def _reserved(self, kind: str) -> Path:
        """Path of the reserved file for this kind."""
        return self.logs / f".reserved-for-{kind}-rank{self.rank:05d}"


def _overwrite(path: Path, data: bytes) -> None:
    """Replace a file's content in its own blocks."""
    with open(path, "r+b", buffering=0) as file:
        file.write(data)
        file.truncate()
        os.fsync(file.fileno())
