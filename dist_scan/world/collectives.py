"""Collectives; identity when world_size is 1.

Shapes: W ranks, b rows per rank. Collective functions are called by all ranks in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import Work as PendingBroadcast

from dist_scan.config import ConfigError
from dist_scan.monitoring.step_timer import timed
from dist_scan.world.spawn import error_text
from dist_scan.world.world import current

COMMUNICATION = timed("all_reduce")
T = TypeVar("T")


def _is_single() -> bool:
    return current().world_size == 1


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    x = x.detach().clone()
    if not _is_single():
        with COMMUNICATION:
            dist.all_reduce(x, op)
    return x


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks as a new tensor of the same shape and type; no gradient."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks as a new tensor; no gradient."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_mean(x: Tensor) -> Tensor:
    """Mean over ranks, differentiable.

    The gradient flows to the local x with factor 1. DistributedDataParallel then averages gradients
    over ranks, which supplies the factor 1/W: a loss of the mean has the gradient that one rank
    with the global batch would have. The backward pass needs no communication.
    """
    if _is_single():
        return x
    return x + (all_sum(x) / current().world_size - x).detach()


def _gather(x: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which have the same shape, in rank order."""
    out = [torch.empty_like(x) for _ in range(current().world_size)]
    with COMMUNICATION:
        dist.all_gather(out, x)
    return out


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return torch.cat(_gather(x.contiguous()))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = all_sum(gradient.contiguous())
        return total.tensor_split(current().world_size)[current().rank]


def all_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [b, ...] -> [W*b, ...]; the gradient is summed over ranks.

    All ranks must hold the same number of rows; see `gather_rows` for different numbers.
    """
    return x if _is_single() else _AllRows.apply(x)


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; ranks may hold different numbers of rows; no gradient."""
    if _is_single():
        return x
    counts = [int(size) for size in _gather(torch.tensor([len(x)], device=x.device))]
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    return torch.cat([rows[:count] for rows, count in zip(_gather(padded), counts)])


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """Copy the source rank's tensor into x, in place. All ranks pass the same shape and type."""
    if not _is_single():
        with COMMUNICATION:
            dist.broadcast(x, source)
    return x


def broadcast_async(x: Tensor, source: int) -> PendingBroadcast | None:
    """Start a broadcast in place; call `.wait()` on the result before x is read.

    Returns None on a single rank.
    """
    return None if _is_single() else dist.broadcast(x, source, async_op=True)


def broadcast_object(value: T, source: int = 0) -> T:
    """A small picklable value of the source rank, on all ranks (decisions, paths, error texts)."""
    if _is_single():
        return value
    box = [value]
    with COMMUNICATION:
        dist.broadcast_object_list(box, source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Small picklable values of all ranks in rank order, on all ranks."""
    if _is_single():
        return [value]
    out: list[Any] = [None] * current().world_size
    with COMMUNICATION:
        dist.all_gather_object(out, value)
    return out


def on_every_rank(work: Callable[[], T]) -> T:
    """Call ``work()`` on each rank and return this rank's result.

    If it raises ValueError or OSError on any rank, all ranks raise ValueError with the text of the
    first one, so that none is left waiting in a later collective. An OSError is not retried: it is
    about a file that the user named, or the caller handles it.
    """
    problem = None
    try:
        value = work()
    except (ValueError, OSError) as error:
        problem = error_text(error)
    problems = [p for p in gather_objects(problem) if p is not None]
    if problems:
        raise ValueError(problems[0])
    return value


def on_rank_0(work: Callable[[], T]) -> T:
    """Call ``work()`` on rank 0 and return its result on all ranks.

    If it raises ValueError, all ranks raise ConfigError with its text. An OSError ends rank 0, and
    the launcher starts the run again: writing the run's own files can succeed the next time.
    """
    value = problem = None
    if current().rank == 0:
        try:
            value = work()
        except ValueError as error:
            problem = str(error)
    value, problem = broadcast_object((value, problem))
    if problem is not None:
        raise ConfigError(problem)
    return cast(T, value)


def any_rank(flag: bool) -> bool:
    """True on all ranks if ``flag`` is true on any of them."""
    return bool(all_max(torch.tensor(float(flag))) > 0)


def barrier() -> None:
    """Wait for all ranks."""
    if not _is_single():
        with COMMUNICATION:
            dist.barrier()
