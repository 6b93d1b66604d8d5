"""The products of the head step: features to a head's logits, and gradients by logits back to weights and features. Legend as in head_step."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

LogitsOf = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows -> their anchors' and neighbours' logits [rows, C], made again


class Rows:
    """Features of anchors and neighbours [b, D]. Apart: each view is a product of its own, and none is copied; worth it where a head's weights are
    few (their gradient is then written twice). Else they are put one above the other."""

    def __init__(self, anchors: Tensor, neighbours: Tensor, dtype: torch.dtype, apart: bool):
        both = anchors.to(dtype), neighbours.to(dtype)
        self.parts, self.b = both if apart else (torch.cat(both),), len(anchors)

    def logits(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[2b, C] of a head, anchors above neighbours."""
        out = weight.new_empty(2 * self.b, len(weight))
        for part, rows in zip(self.parts, out.tensor_split(len(self.parts))):
            torch.mm(part, weight.T, out=rows) if bias is None else torch.addmm(bias, part, weight.T, out=rows)
        return out

    def again(self, weight: Tensor, bias: Tensor) -> LogitsOf:
        """For a head: rows -> their logits, anchors' and neighbours'."""
        first, second, skip = self.parts[0], self.parts[-1], self.b if len(self.parts) == 1 else 0
        return lambda rows: (torch.addmm(bias, first[rows], weight.T), torch.addmm(bias, second[rows + skip], weight.T))

    def weight_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out [C, D] = dlogits^T features."""
        for i, (part, rows) in enumerate(zip(self.parts, dlogits.tensor_split(len(self.parts)))):
            torch.addmm(out, rows.T, part, beta=min(i, 1), out=out)


class Spare:
    """Memory on the CPU, handed out again once no tensor holds it: 80 MB of fresh pages for a gradient are 20,000 faults, a tenth of a step."""

    def __init__(self) -> None:
        self.kept = np.empty(0)
        self.held: Callable[[], Any] = lambda: None

    def like(self, x: Tensor) -> Tensor:
        """What torch.empty_like gives. From here if it is of the size and type of the last, and that, with all its views, is gone."""
        if x.device.type != "cpu" or self.held() is not None:
            return torch.empty_like(x)
        if self.kept.size != x.numel() or torch.from_numpy(self.kept).dtype != x.dtype:
            self.kept = torch.empty(x.numel(), dtype=x.dtype).numpy()
        lent = self.kept[:]  # PyTorch holds on to this very object for as long as it uses the memory
        self.held = weakref.ref(lent)
        return torch.from_numpy(lent).view(x.shape)


SPARE = Spare()


class Back:
    """The products back, head by head: gradients by weight [S, D], bias [S] and, when wanted, each head's by the features [H, X, D]."""

    def __init__(self, x: Rows, weight: Tensor, bias: Tensor, sizes: Sequence[int], features_too: bool):
        self.x, self.weight, self.at = x, weight, head_slices(sizes)
        self.dweight, self.dbias = SPARE.like(weight), torch.empty_like(bias)
        self.dx = weight.new_empty(len(sizes), 2 * x.b, weight.shape[1]) if features_too else None

    def take(self, head: int, dlogits: Tensor, dbias: Tensor | None = None) -> None:
        """A head's gradient by its logits [X, C]; dbias [C]: their sum over rows, where it is known."""
        at = self.at[head]
        self.x.weight_gradient(dlogits, self.dweight[at])
        self.dbias[at] = dlogits.sum(0) if dbias is None else dbias
        if self.dx is not None:
            torch.mm(dlogits, self.weight[at], out=self.dx[head])


def head_slices(sizes: Sequence[int]) -> list[slice]:
    """Rows of each head in the weight."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes)]
