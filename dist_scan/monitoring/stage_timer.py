"""Working time of a stage over all its attempts."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from dist_scan.storage.atomic import write_text


class StageTimer:
    """Seconds of work on a stage, earlier attempts included.

    A background thread writes them to `path` every SAVE_EVERY_S, so that of a killed attempt all
    but the last few seconds count.

    Args:
        path: file that keeps the seconds between attempts.
        enabled: whether this process writes the file (rank 0).
    """

    SAVE_EVERY_S = 5.0

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path = path
        self.started = time.monotonic()
        self.earlier_s = _read_seconds(path)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._save_regularly, daemon=True)
        if enabled:
            self.thread.start()

    def seconds(self) -> float:
        """Seconds so far."""
        return self.earlier_s + time.monotonic() - self.started

    def stop(self) -> float:
        """Stop recording; returns the seconds so far.

        Waits for a write in progress: the caller removes the folder, which fails while a slow
        disk still writes into it.
        """
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        return self.seconds()

    def _save_regularly(self) -> None:
        while not self.stopped.wait(self.SAVE_EVERY_S):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, f"{self.seconds():.3f}")
            except OSError:
                pass  # A full disk must not end the stage because of its timer.


def _read_seconds(path: Path) -> float:
    """Seconds of earlier attempts; 0 if none are recorded."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0
