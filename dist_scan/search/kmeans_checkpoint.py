"""Resumable state of k-means, in one file: an interrupted call continues to the same bits.

It holds the centroids that an iteration ended with and not the assignment, which follows from them
exactly. Rank 0 writes the file, of about 8 k D bytes.
"""

from __future__ import annotations

import json
import time
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.storage.arrays import write_npz
from dist_scan.storage.atomic import error_reason
from dist_scan.world.collectives import broadcast_object
from dist_scan.world.world import current

WRITE_EVERY_S = 60.0
ARRAYS = ("centroids", "best_centroids")
NUMBERS = (
    "restart",
    "iteration",
    "unused_iterations",
    "objective",
    "random_state",
    "num_splits",
    "best",
)


class KMeansCheckpoint:
    """State of a k-means over all its restarts. Collective.

    Attributes
    ----------
    restart : restarts that are complete
    unused_iterations : iterations left over from restarts that converged early
    iteration : iterations of the current restart that are complete
    centroids : [k, D] float32 of the last complete iteration
    objective : of the last complete iteration
    random_state : state of the random generator after it
    num_splits : empty clusters that were refilled by splitting another, in this restart
    best : {objective, iterations, num_splits} of the best complete restart
    best_centroids : its centroids [k, D]
    best_assignment : its clusters of this rank's rows, if this process has computed them
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Continue from the file at `path`, if it was written with equal settings.

        settings : everything that the result depends on. A file with other settings, or one that
        cannot be read, is ignored with a message. Without a path nothing is read or written.
        """
        self.path = path
        self.settings = dict(settings)
        self.written_at = time.monotonic()
        self.restart = 0
        self.unused_iterations = 0
        self.best: dict[str, Any] | None = None
        self.best_centroids: np.ndarray | None = None
        self.best_assignment: np.ndarray | None = None
        self._begin_restart()
        if path is not None:
            saved = self._read(path) if current().rank == 0 else {}
            for name, value in broadcast_object(saved).items():
                setattr(self, name, value)

    def _begin_restart(self) -> None:
        self.iteration = 0
        self.objective = float("inf")
        self.num_splits = 0
        self.random_state: Mapping[str, Any] | None = None
        self.centroids: np.ndarray | None = None

    def _read(self, path: Path) -> dict[str, Any]:
        """Saved attributes; empty if there are none to continue from."""
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = json.loads(bytes(file["state"]))
                settings = saved["settings"]
                if settings == self.settings:
                    arrays = {name: file[name] for name in ARRAYS if name in file}
                    return {name: saved[name] for name in NUMBERS} | arrays
            differing = [
                name for name in self.settings if settings.get(name) != self.settings[name]
            ]
            message = f"was written with other {', '.join(sorted(differing))}"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            message = f"cannot be read ({error_reason(error)})"
        print(f"{path} {message}; k-means starts from the beginning", flush=True)
        return {}

    def after_iteration(
        self,
        objective: float,
        centroids: np.ndarray,
        random: Mapping[str, Any],
        num_splits: int,
    ) -> None:
        """Record an iteration after which another follows. Written to disk once a minute."""
        self.iteration += 1
        self.objective = objective
        self.centroids = centroids
        self.random_state = random
        self.num_splits = num_splits
        if time.monotonic() - self.written_at > WRITE_EVERY_S:
            self.write()

    def after_restart(
        self,
        result: Mapping[str, Any],
        centroids: np.ndarray,
        assignment: np.ndarray,
        unused_iterations: int,
    ) -> None:
        """Record a complete restart. The lowest objective is kept, the first of equal ones."""
        if self.best is None or result["objective"] < self.best["objective"]:
            self.best = dict(result)
            self.best_centroids = centroids
            self.best_assignment = assignment
        self.restart += 1
        self.unused_iterations += unused_iterations
        self._begin_restart()

    def remove(self) -> None:
        """Delete the file, when all restarts are complete."""
        if self.path is not None and current().rank == 0:
            with suppress(OSError):  # there is none where none could be written
                self.path.unlink()

    def write(self) -> None:
        """Write the file from rank 0. If that fails k-means goes on, with a message."""
        self.written_at = time.monotonic()
        if self.path is None or current().rank != 0:
            return
        saved = {"settings": self.settings} | {name: getattr(self, name) for name in NUMBERS}
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        arrays["state"] = np.frombuffer(json.dumps(saved).encode(), np.uint8)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(self.path, arrays)
        except OSError as error:
            reason = error_reason(error)
            print(f"{self.path}: the state of k-means cannot be written ({reason})", flush=True)
