"""Shared parts of the methods that cluster the training images and learn from the assignment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.assignments import save_history
from dist_scan.data.batch import HeldOut
from dist_scan.data.hashing import hash_keys
from dist_scan.methods.base import MethodInputs, NetworkConfig, NetworkMethod
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


class ClusteringMethod(NetworkMethod):
    """Trains a network on assignments of all images, which are kept in a memory bank.

    A run that resumes inside an epoch therefore need not cluster again.
    """

    statistic_names: ClassVar[tuple[str, ...]]
    """Names of the values in the buffer ``last_statistics``, which are logged."""
    last_statistics: Tensor

    def __init__(
        self, config: NetworkConfig, inputs: MethodInputs, num_heads: int | None = None
    ) -> None:
        super().__init__(config, inputs)
        shape = () if num_heads is None else (num_heads,)
        self.assignment = MemoryBank(inputs.num_images, shape, torch.int32, fill=-1)
        self.memory_banks["assignment"] = self.assignment
        self.history: AssignmentHistory | None = None
        self.register_buffer(
            "last_statistics", torch.full((len(self.statistic_names),), torch.nan).double()
        )
        # Targets of all images, on every rank; `load_targets` reads them from the bank.
        self.targets = torch.full((inputs.num_images, *shape), -1)

    def track_history(self, every: int = 1) -> None:
        """Keep every clustering in a memory bank, to publish them."""
        self.history = AssignmentHistory(self.inputs.num_images, self.inputs.epochs, every)
        self.memory_banks["history"] = self.history

    def load_targets(self) -> None:
        self.targets = self.assignment.whole().long()

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        values = zip(self.statistic_names, self.last_statistics.tolist())
        return {name: value for name, value in values if not np.isnan(value)}

    def prepare_publish(self) -> None:
        self.load_targets()
        if self.history is not None:
            self.history.gather()

    def publish(self, out: Path) -> None:
        super().publish(out)
        if self.history is not None:
            self.history.save(out)


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
