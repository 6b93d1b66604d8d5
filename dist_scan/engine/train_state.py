"""Where training is, and when it is saved. Not saved: randomness, schedules, order; they are functions of the position."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dist_scan.engine.checkpoint import CheckpointStore
from dist_scan.engine.checkpoint_files import load_bank_files
from dist_scan.engine.sharded_state import put_state, whole_state
from dist_scan.methods.base import Method
from dist_scan.world.world import current

MTBF_S = 4 * 3600.0  # mean time between failures assumed for Young's interval, per job
FIRST_SAVE_S = 60.0  # until one save has been timed
SHORTEST_S = 10.0


@dataclass
class TrainState:
    """Counts since the stage began. `step` counts optimizer steps tried; `begun`: begin_epoch of `epoch` has run."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    begun: bool = False
    finished: bool = False
    skipped: int = 0
    refused: int = 0
    refused_in_a_row: int = 0
    warnings: list[str] = field(default_factory=list)
    asked: bool = field(default=False, compare=False)
    save_due: bool = field(default=False, compare=False)

    def next_epoch(self, finished: bool) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.step_in_epoch, self.begun, self.finished = (
            self.epoch + 1,
            0,
            False,
            finished,
        )

    def saved(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {k: v for k, v in asdict(self).items() if k not in ("asked", "save_due")}


class Checkpointer:
    """Saves and loads (method, banks, optimizer, position); decides when by Young's formula from the measured cost of a save."""

    def __init__(self, checkpoints: CheckpointStore, interval_s: float | None) -> None:
        self.checkpoints, self.interval_s = checkpoints, interval_s
        self.last = time.monotonic()

    def save(self, method: Method, optimizer: torch.optim.Optimizer, at: TrainState) -> None:
        """Write a checkpoint now (collective)."""
        state = {**whole_state(method, optimizer), "position": at.saved()}
        self.checkpoints.save(
            at.step, state, method.memory_banks(), epoch_begun=at.begun and at.step_in_epoch == 0
        )
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether the interval has passed on this rank."""
        return time.monotonic() - self.last >= self._interval()

    def _interval(self) -> float:
        if self.interval_s is not None:
            return self.interval_s
        if not self.checkpoints.save_s:
            return FIRST_SAVE_S
        return max(math.sqrt(2 * self.checkpoints.save_s * MTBF_S), SHORTEST_S)

    def load(self, method: Method, optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Put the newest good checkpoint into method and optimizer (collective). None: there is none, start at 0."""
        found = self.checkpoints.load(
            torch.device("cpu") if method.sharded_state else current().device
        )  # the whole may not fit on a device
        if found is None:
            return None
        state, folder = found
        put_state(state, method, optimizer)
        for name, bank in method.memory_banks().items():
            bank.load(load_bank_files(folder, name))
        self.last = time.monotonic()
        return TrainState(**state["position"])
