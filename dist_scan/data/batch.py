"""What a feed hands to a method: this rank's part of one step, and rows kept aside for choosing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step.

    index: [b] int64, dataset rows (CPU). views: per view [b, 3, S, S] float images, or [b, D] features when the stage
    reads a feature table. With `uses_neighbours` the last view is that of a random neighbour of each row. Rank r holds rows
    [r*b, (r+1)*b) of the global batch, so `all_rows` gives the global batch in the order one rank would see.
    """

    index: Tensor
    views: tuple[Tensor, ...]
    epoch: int
    step: int
    """Optimizer steps since the stage began."""


@dataclass(frozen=True)
class HeldOut:
    """Rows kept from training, for choosing (SCAN's heads). `batches()` yields this rank's contiguous shard of M rows, as
    Batches with one view (centre crop or features); gather_rows over ranks gives all M in order. `neighbours` [A, K] int64
    are positions among the M rows; rows 0..A-1 are the anchors. Only anchors are held out; their neighbours may be seen.
    """

    batches: Callable[[], Iterator[Batch]]
    neighbours: np.ndarray
