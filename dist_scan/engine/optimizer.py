"""Optimizer, and the learning rate as a function of the step: there is no scheduler with state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_scan.config import StrictModel
from dist_scan.methods.base import ParameterGroup


class OptimizerConfig(StrictModel):
    """The update rule.

    Weight decay of adam is L2 regularisation, as in the papers of this field; adamw decouples it.
    """

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class ScheduleConfig(StrictModel):
    """The learning rate over a stage."""

    kind: Literal["constant", "cosine", "step", "inverse_sqrt"] = "constant"
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs in which the learning rate rises from 0, before the rest of the schedule."""
    warmup_power: float = Field(default=1.0, gt=0)
    """Exponent of the warm-up; 1 is linear.

    With 4 the first steps change so little that float32 rounding, which Adam's first steps amplify
    tenfold every few steps, stays below 1e-5 of the loss for 20 steps. Runs on different numbers of
    ranks can then be compared.
    """
    min_share: float = Field(default=0.0, ge=0, le=1)
    """cosine ends at lr * min_share (SCAN's SimCLR: 0.1 ** 3)."""
    milestones: tuple[int, ...] = ()
    """step: epochs at which lr is multiplied by gamma."""
    gamma: float = Field(default=0.1, gt=0)
    decay: float = Field(default=0.0, ge=0)
    """inverse_sqrt: lr / sqrt(1 + lr * decay * step). DeepCluster's linear probes use their weight
    decay here."""
    per: Literal["step", "epoch"] = "step"
    """Whether cosine is updated at every step, or once an epoch as in the released code of SCAN."""


def learning_rate(
    base: float, schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Learning rate at optimizer step `step` (0-based) of a training of `epochs` epochs."""
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base * ((step + 1) / (warmup_steps + 1)) ** schedule.warmup_power
    if schedule.kind == "constant":
        return base
    if schedule.kind == "inverse_sqrt":
        return base / math.sqrt(1 + base * schedule.decay * step)
    epoch: float = step // steps_per_epoch
    if schedule.per == "step":
        epoch = step / steps_per_epoch
    if schedule.kind == "step":
        passed = sum(epoch >= milestone for milestone in schedule.milestones)
        return base * schedule.gamma**passed
    length = max(epochs - schedule.warmup_epochs, 1e-12)
    progress = min(max((epoch - schedule.warmup_epochs) / length, 0.0), 1.0)
    cosine = (1 - schedule.min_share) * (1 + math.cos(math.pi * progress)) / 2
    return base * (schedule.min_share + cosine)


def build_optimizer(config: OptimizerConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """A torch optimizer over the method's parameter groups."""
    torch_groups = [_torch_group(config, group) for group in groups if group.parameters]
    if config.kind == "sgd":
        return torch.optim.SGD(
            torch_groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    cls = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    # foreach and not fused: fused Adam on a CPU differs between builds of PyTorch, and a resumed
    # run must equal one that was never stopped.
    return cls(torch_groups, lr=config.lr, betas=config.betas, eps=config.eps, foreach=True)


def _torch_group(config: OptimizerConfig, group: ParameterGroup) -> dict[str, Any]:
    """A method's group as torch's; values that the group does not set come from the config."""
    result: dict[str, Any] = {
        "params": list(group.parameters),
        "lr_scale": group.lr_scale,
        "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
    }
    if config.kind == "sgd":
        result["momentum"] = config.momentum if group.sgd_momentum is None else group.sgd_momentum
        result["nesterov"] = config.nesterov and result["momentum"] > 0
    return result


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to lr times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def reset_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> None:
    """Drop momentum and other state of parameters that a method has re-initialised."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def all_finite(gradients: list[Tensor]) -> Tensor:
    """True if all gradients are finite; a bool tensor on their device.

    A finite L2 norm proves that all values are finite, and on a CPU it is seven times cheaper than
    the maximum norm (which takes a tenth of a step of ResNet-18 at 64 px). It may overflow, so the
    maximum norm decides then. On a GPU a second try would wait for the first.
    """
    if not gradients:
        return torch.tensor(True)
    if gradients[0].device.type == "cpu" and _norms_are_finite(gradients, 2.0):
        return torch.tensor(True)
    return _norms_are_finite(gradients, float("inf"))


def _norms_are_finite(gradients: list[Tensor], order: float) -> Tensor:
    return torch.isfinite(torch.stack(torch._foreach_norm(gradients, order))).all()
