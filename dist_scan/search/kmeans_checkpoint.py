"""How far a k-means has come, in a file: asked to leave or killed, the same call goes on where it was and ends with the same bits.

Kept is what an iteration began from, not the rows' clusters: those follow from the centroids, exactly. 8 k D bytes, written by rank 0.
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

from dist_scan.storage.atomic import write_atomic
from dist_scan.world.collectives import broadcast_object
from dist_scan.world.world import current

EVERY_S = 60.0
ARRAYS = ("centroids", "best_centroids")
NUMBERS = ("restart", "iteration", "spared", "objective", "random", "num_empty", "best")


class KMeansCheckpoint:
    """Where a k-means is. `asked`: all that its result depends on; a file of other settings or rows is left aside, and that is said. Collective.

    restart: those that are done; spared: iterations that they did not need; iteration: those done of the next restart, whose last had the
    `centroids` [k, D] and the `objective`; `random` is its generator's state then, `num_empty` the clusters split so far. best: of the restarts
    that are done, {objective, iterations, num_empty}, with its centroids beside it, and its assignment if this process has made it.
    """

    def __init__(self, path: Path | None, asked: Mapping[str, Any]) -> None:
        self.path, self.asked, self.written = path, dict(asked), time.monotonic()
        self.restart, self.spared, self.best, self.best_centroids, self.best_assignment = (
            0,
            0,
            None,
            None,
            None,
        )
        self._begin()
        if path is not None:
            for name, value in broadcast_object(
                self._read() if current().rank == 0 else None
            ).items():
                setattr(self, name, value)

    def _begin(self) -> None:
        self.iteration, self.objective, self.num_empty, self.random, self.centroids = (
            0,
            float("inf"),
            0,
            None,
            None,
        )

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            with np.load(self.path, allow_pickle=False) as file:
                facts = json.loads(bytes(file["facts"]))
                if facts["asked"] == self.asked:
                    return {name: facts[name] for name in NUMBERS} | {
                        name: file[name] for name in ARRAYS if name in file
                    }
            differ = sorted(key for key in self.asked if facts["asked"].get(key) != self.asked[key])
            print(
                f"{self.path} is of a k-means with other {', '.join(differ)}: this one begins anew",
                flush=True,
            )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"{self.path} cannot be read ({error}): k-means begins anew", flush=True)
        return {}

    def after_iteration(
        self, objective: float, centroids: np.ndarray, random: dict[str, Any], num_empty: int
    ) -> None:
        """One more is done, and another will follow. Written now and then."""
        self.iteration += 1
        self.objective, self.centroids, self.random, self.num_empty = (
            objective,
            centroids,
            random,
            num_empty,
        )
        if time.monotonic() - self.written > EVERY_S:
            self.write()

    def after_restart(
        self, found: Mapping[str, Any], centroids: np.ndarray, assignment: np.ndarray, spared: int
    ) -> None:
        """A restart is done. The best of all is kept, the first of equals."""
        if self.best is None or found["objective"] < self.best["objective"]:
            self.best, self.best_centroids, self.best_assignment = (
                dict(found),
                centroids,
                assignment,
            )
        self.restart, self.spared = self.restart + 1, self.spared + spared
        self._begin()

    def over(self) -> None:
        """All restarts are done: the file goes."""
        if self.path is not None and current().rank == 0:
            with suppress(OSError):  # what could not be written either
                self.path.unlink()

    def write(self) -> None:
        """Rank 0 writes. Where nothing can be written, nothing is lost but this."""
        self.written = time.monotonic()
        if self.path is None or current().rank != 0:
            return
        facts = json.dumps({"asked": self.asked} | {name: getattr(self, name) for name in NUMBERS})
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(
                self.path,
                lambda file: np.savez(
                    file, facts=np.frombuffer(facts.encode(), np.uint8), **arrays
                ),
            )
        except OSError as error:
            print(
                f"{self.path}: how far k-means is cannot be kept ({error}); it goes on", flush=True
            )
