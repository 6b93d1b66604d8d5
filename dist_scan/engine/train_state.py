"""Position of a training, and when it is saved.

Random generators, the learning rate and the order of images are functions of the position, so they
are not saved. Parameters that are sharded over ranks are saved as one rank without sharding would
save them, so that a run may be resumed with another number of ranks or another sharding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_scan.engine.checkpoint import CheckpointStore, load_bank_files
from dist_scan.methods.base import Method
from dist_scan.world.sharding import RowSharding
from dist_scan.world.world import current

MTBF_S = 4 * 3600.0
"""Mean time between failures of a job, for Young's formula."""
FIRST_SAVE_S = 60.0
"""Interval until the cost of a save is known."""
SHORTEST_S = 10.0
"""Shortest interval that the formula may give."""


@dataclass
class TrainState:
    """Position and counters since the stage began. The fields are saved in checkpoints."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    """Steps tried, including those without an update."""
    epoch_begun: bool = False
    """`begin_epoch` of the current epoch has run."""
    finished: bool = False
    """The method has ended the training early; it stays False if all epochs are trained."""
    skipped: int = 0
    """Steps that the method skipped."""
    non_finite: int = 0
    """Updates skipped because the loss or a gradient was not finite."""
    non_finite_in_a_row: int = 0
    """Of these, the ones since the last update."""
    warnings: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves and loads method, memory banks, optimizer and position.

    interval_s: seconds between saves; None chooses them by Young's formula (1974),
    sqrt(2 * cost of a save * mean time between failures).
    """

    def __init__(self, store: CheckpointStore, interval_s: float | None) -> None:
        self.store = store
        self.interval_s = interval_s
        self.last_save = time.monotonic()

    def save(self, method: Method, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write a checkpoint now. Collective."""
        content = {**gather_state(method, optimizer), "train_state": asdict(state)}
        epoch_begun = state.epoch_begun and state.step_in_epoch == 0
        self.store.save(state.step, content, method.memory_banks, epoch_begun)
        self.last_save = time.monotonic()

    def is_due(self) -> bool:
        """True when the interval since the last save has passed on this rank."""
        return time.monotonic() - self.last_save >= self._interval()

    def _interval(self) -> float:
        if self.interval_s is not None:
            return self.interval_s
        if not self.store.save_s:
            return FIRST_SAVE_S
        return max(math.sqrt(2 * self.store.save_s * MTBF_S), SHORTEST_S)

    def load(self, method: Method, optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Load the newest valid checkpoint; None if there is none. Collective."""
        # A device may be too small for the complete tensors of sharded parameters.
        device = torch.device("cpu") if method.sharded_state else current().device
        found = self.store.load(device)
        if found is None:
            return None
        content, folder = found
        load_state(content, method, optimizer)
        for name, bank in method.memory_banks.items():
            bank.load(load_bank_files(folder, name))
        self.last_save = time.monotonic()
        return TrainState(**content["train_state"])


def gather_state(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State dicts {method, optimizer}, complete on rank 0. Collective.

    On other ranks the sharded tensors are None.
    """
    method_state = method.state_dict()
    optimizer_state = optimizer.state_dict()
    for name, sharding in method.sharded_state.items():
        method_state[name] = sharding.gather(method_state[name])
    slots = optimizer_state["state"]
    for number, parameter, sharding in _sharded_parameters(method, optimizer):
        if number in slots:
            slots[number] = _map_tensors(slots[number], parameter.shape, sharding.gather)
    return {"method": method_state, "optimizer": optimizer_state}


def load_state(saved: dict[str, Any], method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Load the complete state dicts that `gather_state` returned on rank 0."""
    method_state = dict(saved["method"])
    for name, sharding in method.sharded_state.items():
        method_state[name] = sharding.local_rows(method_state[name])
    slots = dict(saved["optimizer"]["state"])
    for number, parameter, sharding in _sharded_parameters(method, optimizer):
        if number in slots:
            complete_shape = torch.Size((sharding.num_rows, *parameter.shape[1:]))
            slots[number] = _map_tensors(slots[number], complete_shape, sharding.local_rows)
    method.load_state_dict(method_state)
    optimizer.load_state_dict({**saved["optimizer"], "state": slots})


def _sharded_parameters(
    method: Method, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, Tensor, RowSharding]]:
    """(number in the optimizer's state dict, parameter, its sharding)."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        sharding = method.sharded_state.get(names.get(id(parameter), ""))
        if sharding is not None:
            yield number, parameter, sharding


def _map_tensors(
    slots: dict[str, Any], shape: torch.Size, function: Callable[[Tensor], Tensor | None]
) -> dict[str, Any]:
    """The optimizer's values of a parameter, with `function` applied to those of this shape."""
    return {
        name: function(value) if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in slots.items()
    }
