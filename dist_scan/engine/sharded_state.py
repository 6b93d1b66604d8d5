"""Checkpoints of a method whose parameters are dealt over the ranks: written whole, as one rank would write them, so that a run resumes
with another number of ranks, or another dealing, or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dist_scan.methods.base import Method
from dist_scan.world.sharding import RowSharding


def whole_state(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{method, optimizer}: their state dicts, whole on rank 0 (what is dealt is None elsewhere). Collective."""
    state, memory = method.state_dict(), optimizer.state_dict()
    for name, rows in method.sharded_state.items():
        state[name] = rows.gather(state[name])
    for i, parameter, rows in _dealt_parameters(method, optimizer):
        if i in memory["state"]:
            memory["state"][i] = {
                k: rows.gather(v) if _like(v, parameter) else v
                for k, v in memory["state"][i].items()
            }
    return {"method": state, "optimizer": memory}


def put_state(saved: dict[str, Any], method: Method, optimizer: torch.optim.Optimizer) -> None:
    """Whole state dicts, as `whole_state` gives them to rank 0, into this rank's method and optimizer."""
    state, memory = dict(saved["method"]), saved["optimizer"]
    for name, rows in method.sharded_state.items():
        state[name] = rows.local_rows(state[name])
    of_parameter = dict(memory["state"])
    for i, parameter, rows in _dealt_parameters(method, optimizer):
        if i in of_parameter:
            shape = (rows.num_rows, *parameter.shape[1:])
            of_parameter[i] = {
                k: rows.local_rows(v) if isinstance(v, Tensor) and v.shape == shape else v
                for k, v in of_parameter[i].items()
            }
    method.load_state_dict(state)
    optimizer.load_state_dict({**memory, "state": of_parameter})


def _dealt_parameters(
    method: Method, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, Tensor, RowSharding]]:
    """(number in the optimizer's state dict, parameter, its rows)."""
    dealt = method.sharded_state
    names = {id(p): name for name, p in method.named_parameters()}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if names.get(id(parameter)) in dealt:
            yield i, parameter, dealt[names[id(parameter)]]


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
