"""The products of the head step: features to a head's logits, and gradients by logits back to weights and features. Legend as in head_step."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

RecomputeLogits = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # rows -> their anchors' and neighbours' logits [rows, C], made again


def as_one_tensor(first: Tensor, second: Tensor) -> Tensor | None:
    """[2b, D] of two views [b, D] without a copy, where the second lies behind the first, as the halves of one tensor do; else None."""
    alike = (
        first.shape == second.shape
        and first.dtype == second.dtype
        and first.is_contiguous()
        and second.is_contiguous()
    )
    one_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if not (
        alike and one_memory and second.storage_offset() == first.storage_offset() + first.numel()
    ):
        return None
    return first.as_strided(
        (2 * len(first), first.shape[1]), (first.shape[1], 1)
    )  # the stride of a dimension of size 1 may be anything


def concatenate_views(first: Tensor, second: Tensor) -> Tensor:
    """[2b, D] of two views, copied only where they do not lie one above the other."""
    whole = as_one_tensor(first, second)
    return torch.cat([first, second]) if whole is None else whole


class FeaturePair:
    """Features of anchors and neighbours [b, D], one above the other: each head is one product there and one back. Where they would have to be copied
    for that they may stay apart: two products, worth it where a head's weights are few (their gradient is then written twice)."""

    def __init__(
        self, anchors: Tensor, neighbours: Tensor, dtype: torch.dtype, apart: bool
    ) -> None:
        if anchors.shape != neighbours.shape:
            raise ValueError(
                f"anchors {list(anchors.shape)} and neighbours {list(neighbours.shape)}; allowed: one neighbour for each anchor, of one width"
            )
        both, self.b = (anchors.to(dtype), neighbours.to(dtype)), len(anchors)
        whole = as_one_tensor(*both)
        self.parts = (whole,) if whole is not None else both if apart else (torch.cat(both),)

    def logits(
        self, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """[2b, C] of a head, anchors above neighbours."""
        out = LOGITS_BUFFER.empty((2 * self.b, len(weight)), weight) if out is None else out
        for part, rows in zip(self.parts, self._parts_of(out)):
            torch.mm(part, weight.T, out=rows) if bias is None else torch.addmm(
                bias, part, weight.T, out=rows
            )
        return out

    def _parts_of(self, logits: Tensor) -> Sequence[Tensor]:
        return (logits,) if len(self.parts) == 1 else logits.tensor_split(2)

    def again(self, weight: Tensor, bias: Tensor) -> RecomputeLogits:
        """For a head: rows -> their logits, anchors' and neighbours'."""
        first, second, skip = self.parts[0], self.parts[-1], self.b if len(self.parts) == 1 else 0
        return lambda rows: (
            torch.addmm(bias, first[rows], weight.T),
            torch.addmm(bias, second[rows + skip], weight.T),
        )

    def weight_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out [C, D] = dlogits^T features."""
        for i, (part, rows) in enumerate(zip(self.parts, self._parts_of(dlogits))):
            torch.addmm(out, rows.T, part, beta=min(i, 1), out=out)


class ScratchBuffer:
    """Memory on the CPU, handed out again once no tensor holds it: 80 MB of fresh pages for a gradient are 20,000 faults, a tenth of a step."""

    def __init__(self) -> None:
        self.kept = np.empty(0)
        self.held: Callable[[], Any] = lambda: None
        self.lock = threading.Lock()  # two threads must not be lent the same

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """What like.new_empty(shape) gives. From here if what was lent last, with all its views, is gone; no larger than ever asked for."""
        if like.device.type != "cpu" or like.dtype not in (
            torch.float32,
            torch.float64,
        ):  # numpy knows no bfloat16
            return like.new_empty(shape)
        with self.lock:
            if self.held() is not None:
                return like.new_empty(shape)
            size = math.prod(shape)
            if self.kept.size < size or torch.from_numpy(self.kept).dtype != like.dtype:
                self.kept = np.empty(0)  # before the new: not both at once
                self.kept = torch.empty(size, dtype=like.dtype).numpy()
            lent = self.kept[
                :size
            ]  # PyTorch holds on to this very object for as long as it uses the memory
            self.held = weakref.ref(lent)
        return torch.from_numpy(lent).view(*shape)

    def clear(self) -> None:
        """Give back what is not lent."""
        self.kept = np.empty(0)


GRADIENT_BUFFER, LOGITS_BUFFER = ScratchBuffer(), ScratchBuffer()


def release_buffers() -> None:
    """Both give back what is not lent: the heads of the next stage may be smaller, or there may be none."""
    GRADIENT_BUFFER.clear()
    LOGITS_BUFFER.clear()


class HeadGradients:
    """The products back, head by head: gradients by weight [S, D], bias [S] and, when wanted, each head's by the features [H, X, D]."""

    def __init__(
        self, x: FeaturePair, weight: Tensor, bias: Tensor, sizes: Sequence[int], features_too: bool
    ) -> None:
        self.x, self.weight, self.sizes, self.at = x, weight, list(sizes), head_slices(sizes)
        self.dweight, self.dbias = (
            GRADIENT_BUFFER.empty(weight.shape, weight),
            torch.empty_like(bias),
        )
        self.of_heads = list(zip(self.dweight.split(self.sizes), self.dbias.split(self.sizes)))
        self.dx = weight.new_empty(len(sizes), 2 * x.b, weight.shape[1]) if features_too else None

    def store(self, head: int, dlogits: Tensor, dbias: Tensor | None = None) -> None:
        """A head's gradient by its logits [X, C]; dbias [C]: their sum over rows, where it is known."""
        dweight, own_dbias = self.of_heads[head]
        self.x.weight_gradient(dlogits, dweight)
        own_dbias.copy_(dlogits.sum(0) if dbias is None else dbias)
        if self.dx is not None:
            torch.mm(dlogits, self.weight[self.at[head]], out=self.dx[head])


def head_slices(sizes: Sequence[int]) -> list[slice]:
    """Rows of each head in the weight."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes)]
