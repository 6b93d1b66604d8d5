"""Parameter groups, and the learning rate as a function of the step: no scheduler has state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_scan.config import StrictModel
from dist_scan.methods.base import ParameterGroup


class OptimizerConfig(StrictModel):
    """The update rule. Adam's weight decay is L2-coupled, as the papers of this field used it; adamw decouples it."""

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
    """From 0, before the rest of the schedule."""
    warmup_power: float = Field(default=1.0, gt=0)
    """1 is linear. 4 moves so little at first that float32's rounding, which the first steps of Adam magnify tenfold every few
    steps, stays below 1e-5 of the loss for 20 steps: runs over other numbers of ranks can be compared."""
    min_share: float = Field(default=0.0, ge=0, le=1)
    """cosine ends at lr * min_share (SCAN's SimCLR: 0.1 ** 3)."""
    milestones: tuple[int, ...] = ()
    """step: epochs at which lr is multiplied by gamma."""
    gamma: float = Field(default=0.1, gt=0)
    decay: float = Field(default=0.0, ge=0)
    """inverse_sqrt: lr / sqrt(1 + lr * decay * step), as DeepCluster's linear probes have it (with their weight decay)."""
    per: Literal["step", "epoch"] = "step"
    """Whether cosine moves at every step or once an epoch (as the released codes do)."""


def learning_rate(
    base: float, schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """lr at optimizer step `step` (0-based) of a stage of `epochs` epochs."""
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * ((step + 1) / (warmup + 1)) ** schedule.warmup_power
    if schedule.kind == "constant":
        return base
    if schedule.kind == "inverse_sqrt":
        return base / math.sqrt(1 + base * schedule.decay * step)
    at = step / steps_per_epoch if schedule.per == "step" else step // steps_per_epoch
    if schedule.kind == "step":
        return base * schedule.gamma ** sum(at >= m for m in schedule.milestones)
    done = (at - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-12)
    share = (
        schedule.min_share
        + (1 - schedule.min_share) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    )
    return base * share


def build_optimizer(config: OptimizerConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """A torch optimizer over the method's groups; each remembers its lr_scale."""
    wanted = [
        {
            "params": list(g.parameters),
            "lr_scale": g.lr_scale,
            "weight_decay": config.weight_decay if g.weight_decay is None else g.weight_decay,
        }
        for g in groups
        if g.parameters
    ]
    if config.kind == "sgd":
        for group, given in zip(wanted, (g for g in groups if g.parameters)):
            group["momentum"] = config.momentum if given.sgd_momentum is None else given.sgd_momentum
            group["nesterov"] = config.nesterov and group["momentum"] > 0
        return torch.optim.SGD(
            wanted, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    cls = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    # foreach, not fused: fused CPU Adam differs between builds, and a resumed run must equal an undisturbed one.
    return cls(wanted, lr=config.lr, betas=config.betas, eps=config.eps, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def forget(optimizer: torch.optim.Optimizer, parameters) -> None:
    """Drop the optimizer's memory of parameters that a method re-initialised."""
    for p in parameters:
        optimizer.state.pop(p, None)


def all_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether every number is one, as a bool on their device. On a CPU by sums of squares: the largest magnitudes take seven times as long there (a
    tenth of a step of ResNet-18 at 64 px), and are asked for only where squares do not fit in fp32. A GPU is not asked twice: that waits."""
    if not gradients:
        return torch.tensor(True)

    def finite(order: float) -> Tensor:
        return torch.isfinite(torch.stack(torch._foreach_norm(gradients, order))).all()

    return (
        torch.tensor(True)
        if gradients[0].device.type == "cpu" and finite(2.0)
        else finite(float("inf"))
    )
