"""What a feed passes to a method: one rank's part of a step, and rows to select a head by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step.

    Rank r has rows [r * b, (r + 1) * b) of the global batch, so that `all_rows` of a tensor gives
    the global batch in the order in which one rank would see it.
    """

    index: Tensor
    """[b] int64 dataset rows, on the CPU."""
    views: tuple[Tensor, ...]
    """One tensor per view: float32 images [b, 3, S, S], or features [b, D] of a feature table.

    For a method that asks for neighbours, the last view is that of a random neighbour of each row.
    """
    epoch: int
    step: int
    """Optimizer steps since the stage began."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out anchors and their neighbours, M rows in all, to select a head by.

    The anchors are not trained on; their neighbours may be.
    """

    batches: Callable[[], Iterator[Batch]]
    """Yields this rank's contiguous shard of the M rows, as Batches with one view (centre crop or
    features); `gather_rows` over ranks gives all M in order."""
    neighbours: np.ndarray
    """[A, K] int64 positions among the M rows. Rows 0..A-1 are the anchors."""
