"""Parts that methods share which cluster the training images and learn from the assignment."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.assignments import save_history
from dist_scan.data.hashing import hash_keys
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.world.collectives import barrier
from dist_scan.world.world import current

TOP_LAYER_STREAM, KMEANS_STREAM = 501, 502
"""Hash streams: one per use of randomness."""


class AssignmentHistory(MemoryBank):
    """Every clustering of a run: a cluster per image and clustering, int32; -1: none.

    There is a clustering every ``every`` epochs, beginning with epoch ``first``.
    """

    def __init__(self, num_images: int, epochs: int, every: int = 1, first: int = 0) -> None:
        num_clusterings = -(-epochs // every)
        super().__init__(num_images, (num_clusterings,), torch.int32, fill=-1)
        self.every = every
        self.epochs = first + np.arange(num_clusterings) * every
        self.gathered: Tensor | None = None

    def column(self, epoch: int) -> int:
        """Index of the clustering that an epoch uses."""
        return epoch // self.every

    def gather(self) -> None:
        """Bring all rows to every rank. Collective; before ``save``."""
        self.gathered = self.whole()

    def save(self, folder: Path) -> None:
        """Write history.npz into a folder, for evaluation."""
        assert self.gathered is not None, "gather() comes first"
        save_history(folder, self.epochs, self.gathered.numpy())


def hashed_seed(*keys: int) -> int:
    """Seed for a random generator from the run's seed, a stream and further keys."""
    return int(hash_keys(*keys) >> 33)


def empty_folder(folder: Path | None) -> Path:
    """The folder, after rank 0 has removed all that is in it. Collective."""
    assert folder is not None, "the stage gives a work_dir"
    if current().rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    return folder


def known_values(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Values by name, without those that are NaN."""
    return {name: value for name, value in zip(names, values.tolist()) if not np.isnan(value)}
