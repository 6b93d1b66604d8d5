"""Matrix products of the heads.

Features to one head's logits, and gradients by logits back to weights and features. Shapes as in
the package's docstring.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

RecomputeLogits = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Indices of pairs -> the logits of their anchors and of their neighbours, [rows, C] each."""


def head_slices(sizes: Sequence[int]) -> list[slice]:
    """Rows of each head in the weight."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes)]


def as_one_tensor(first: Tensor, second: Tensor) -> Tensor | None:
    """Two views [b, D] as one tensor [2b, D] without a copy; None if they are not halves of one."""
    same_kind = first.shape == second.shape and first.dtype == second.dtype
    if not (same_kind and first.is_contiguous() and second.is_contiguous()):
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    if second.storage_offset() != first.storage_offset() + first.numel():
        return None
    # Strides are given explicitly: that of a dimension of size 1 may be anything.
    b, dim = first.shape
    return first.as_strided((2 * b, dim), (dim, 1))


def concatenate_views(first: Tensor, second: Tensor) -> Tensor:
    """Two views [b, D] as one tensor [2b, D], copied only if they are not halves of one."""
    whole = as_one_tensor(first, second)
    return torch.cat([first, second]) if whole is None else whole


class FeaturePair:
    """Features of anchors and neighbours [b, D], as one tensor [2b, D] or as two.

    As one tensor, each head takes one product forward and one back. Separate tensors would have to
    be concatenated first: if max_head_size <= b they stay separate instead and take two products,
    which is faster because the gradient of a small head is cheap to write twice.
    """

    def __init__(
        self, anchors: Tensor, neighbours: Tensor, dtype: torch.dtype, max_head_size: int
    ) -> None:
        if anchors.shape != neighbours.shape:
            raise ValueError(
                f"anchors {list(anchors.shape)} and neighbours {list(neighbours.shape)}; "
                "allowed: one neighbour for each anchor, of the same width"
            )
        self.num_pairs = len(anchors)
        separate = (anchors.to(dtype), neighbours.to(dtype))
        whole = as_one_tensor(*separate)
        if whole is None and max_head_size > self.num_pairs:
            whole = torch.cat(separate)
        self.parts: tuple[Tensor, ...] = separate if whole is None else (whole,)

    def logits(
        self, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Logits [2b, C] of a head, anchors above neighbours."""
        if out is None:
            out = LOGITS_BUFFER.empty((2 * self.num_pairs, len(weight)), weight)
        for part, rows in zip(self.parts, self._rows_of_parts(out)):
            if bias is None:
                torch.mm(part, weight.T, out=rows)
            else:
                torch.addmm(bias, part, weight.T, out=rows)
        return out

    def _rows_of_parts(self, logits: Tensor) -> Sequence[Tensor]:
        return (logits,) if len(self.parts) == 1 else logits.tensor_split(2)

    def recompute_logits(self, weight: Tensor, bias: Tensor) -> RecomputeLogits:
        """A function from indices of pairs to their logits of a head."""
        anchors, neighbours = self.parts[0], self.parts[-1]
        neighbour_offset = self.num_pairs if len(self.parts) == 1 else 0

        def logits_of_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
            return (
                torch.addmm(bias, anchors[pairs], weight.T),
                torch.addmm(bias, neighbours[pairs + neighbour_offset], weight.T),
            )

        return logits_of_pairs

    def weight_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out [C, D] = dlogits^T features."""
        for i, (part, rows) in enumerate(zip(self.parts, self._rows_of_parts(dlogits))):
            torch.addmm(out, rows.T, part, beta=min(i, 1), out=out)


class HeadGradients:
    """Gradients by weight [S, D], bias [S] and, on request, by the features [H, X, D] of each head.

    Filled head by head from the gradients by the logits.
    """

    def __init__(
        self,
        x: FeaturePair,
        weight: Tensor,
        bias: Tensor,
        sizes: Sequence[int],
        with_features: bool,
    ) -> None:
        self.x = x
        self.weight = weight
        self.sizes = list(sizes)
        self.slices = head_slices(sizes)
        self.dweight = GRADIENT_BUFFER.empty(weight.shape, weight)
        self.dbias = torch.empty_like(bias)
        self.dx: Tensor | None = None
        if with_features:
            self.dx = weight.new_empty(len(sizes), 2 * x.num_pairs, weight.shape[1])
        self._by_head = list(zip(self.dweight.split(self.sizes), self.dbias.split(self.sizes)))

    def store(self, head: int, dlogits: Tensor, dbias: Tensor | None = None) -> None:
        """Store the gradients of a head, from those by its logits [X, C].

        dbias [C]: their sum over rows, if it is known.
        """
        head_dweight, head_dbias = self._by_head[head]
        self.x.weight_gradient(dlogits, head_dweight)
        head_dbias.copy_(dlogits.sum(0) if dbias is None else dbias)
        if self.dx is not None:
            torch.mm(dlogits, self.weight[self.slices[head]], out=self.dx[head])


class ScratchBuffer:
    """Reusable CPU buffer; avoids page faults.

    A gradient of 80 MB in fresh memory takes 20,000 page faults, a tenth of a step. The buffer is
    handed out to one tensor at a time and only once no tensor or view uses it any more.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0)
        self._user: Callable[[], np.ndarray | None] = lambda: None
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """like.new_empty(shape), in the buffer if it is free; the buffer grows as needed."""
        # NumPy has no bfloat16.
        if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
            return like.new_empty(shape)
        with self._lock:
            if self._user() is not None:
                return like.new_empty(shape)
            size = math.prod(shape)
            if self.memory.size < size or torch.from_numpy(self.memory).dtype != like.dtype:
                # Free the old memory before allocating the new.
                self.memory = np.empty(0)
                self.memory = torch.empty(size, dtype=like.dtype).numpy()
            # PyTorch references this very array for as long as a tensor uses its memory.
            array = self.memory[:size]
            self._user = weakref.ref(array)
        return torch.from_numpy(array).view(*shape)

    def release(self) -> None:
        """Free the memory, unless a tensor still uses it."""
        self.memory = np.empty(0)


GRADIENT_BUFFER = ScratchBuffer()
LOGITS_BUFFER = ScratchBuffer()


def release_buffers() -> None:
    """Free both buffers: the heads of the next stage may be smaller, or there may be none."""
    GRADIENT_BUFFER.release()
    LOGITS_BUFFER.release()
