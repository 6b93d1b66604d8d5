"""Checkpoint state of a method whose parameters are sharded over ranks.

The state is written as one rank without sharding would write it, so that a run may be resumed with
another number of ranks or another sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dist_scan.methods.base import Method
from dist_scan.world.sharding import RowSharding


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
