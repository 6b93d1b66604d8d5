"""What ranks say to each other. Every function is the identity when alone, so no algorithm asks whether it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_scan.monitoring.step_timer import section
from dist_scan.world.world import current

TALK = section("all_reduce")


def _alone() -> bool:
    return current().world_size == 1


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks (no gradient). Returns a new tensor of the same shape and type."""
    x = x.detach().clone()
    if not _alone():
        with TALK:
            dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks (no gradient)."""
    x = x.detach().clone()
    if not _alone():
        with TALK:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def all_mean(x: Tensor) -> Tensor:
    """Mean over ranks, differentiable: under DDP's gradient averaging a loss of it has the global batch's gradient.

    The value is the global mean, the gradient flows to the local part with factor 1; DDP's mean over ranks supplies
    the 1/W (FIDELITY.md 1.13). No communication in the backward pass.
    """
    return x if _alone() else x + (all_sum(x) / current().world_size - x).detach()


class _AllSumGrad(torch.autograd.Function):
    """Sum over ranks in both directions: what batch norm over the global batch needs."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x)

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad.contiguous())


def all_sum_grad(x: Tensor) -> Tensor:
    """Sum over ranks whose gradient is summed over ranks too (each rank's loss depends on every rank's x)."""
    return x if _alone() else _AllSumGrad.apply(x)


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = x.shape[0]
        out = [torch.empty_like(x) for _ in range(current().world_size)]
        with TALK:
            dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        start = current().rank * ctx.rows
        return all_sum(grad.contiguous())[start : start + ctx.rows]


def all_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [b, ...] -> [W*b, ...], differentiable (the gradient is summed over ranks).

    All ranks must hold the same number of rows; see `gather_rows` for uneven ones.
    """
    return x if _alone() else _AllRows.apply(x)


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, uneven counts allowed, no gradient."""
    if _alone():
        return x
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(current().world_size)
    ]
    with TALK:
        dist.all_gather(sizes, torch.tensor([x.shape[0]], device=x.device))
    counts = [int(s) for s in sizes]
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    out = [torch.empty_like(padded) for _ in counts]
    with TALK:
        dist.all_gather(out, padded)
    return torch.cat([rows[:count] for rows, count in zip(out, counts)])


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """The source's tensor on all ranks, in place. All ranks pass the same shape and type."""
    if not _alone():
        with TALK:
            dist.broadcast(x, source)
    return x


class _Done:
    def wait(self) -> None:
        pass


def broadcast_async(x: Tensor, source: int) -> Any:
    """Start a broadcast in place; `.wait()` on the result before x is read."""
    return _Done() if _alone() else dist.broadcast(x, source, async_op=True)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """A small picklable value from the source to all ranks (decisions, paths, error texts)."""
    if _alone():
        return value
    box = [value]
    with TALK:
        dist.broadcast_object_list(box, source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Small picklable values of all ranks, in rank order, on all ranks."""
    if _alone():
        return [value]
    out: list[Any] = [None] * current().world_size
    with TALK:
        dist.all_gather_object(out, value)
    return out


def on_every_rank(work: Callable[[], Any]) -> Any:
    """work() of this rank. Where it fails on one (ValueError, OSError), all raise ValueError with the first one's text: none is left waiting."""
    value = problem = None
    try:
        value = work()
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    if problems := [p for p in gather_objects(problem) if p is not None]:
        raise ValueError(problems[0])
    return value


def agree(flag: bool) -> bool:
    """True on all ranks when it is true on any: how a stop or a failure on one becomes everyone's."""
    return bool(all_max(torch.tensor(float(flag))) > 0)


def barrier() -> None:
    """Wait for all ranks."""
    if not _alone():
        with TALK:
            dist.barrier()
