"""Functions shared by the stages that write assignments.npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_scan.data.assignments import Assignments
from dist_scan.engine.predictor import NUM_TOP, top_clusters
from dist_scan.world.collectives import barrier, gather_rows
from dist_scan.world.world import World


def rank_batches(num_rows: int, batch: int, world: World) -> list[np.ndarray]:
    """This rank's batches of row numbers: contiguous over ranks, in order.

    The batches are the same for any number of ranks, so results are bitwise equal.
    """
    starts = np.array_split(np.arange(0, num_rows, batch), world.world_size)[world.rank]
    return [np.arange(start, min(start + batch, num_rows)) for start in starts]


def gather_batches(batches: list[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """Tensors [b, width] of all batches of all ranks as one [N, width]. Collective."""
    return gather_rows(torch.cat([torch.empty(0, width, dtype=dtype), *batches]))


class TopClusters:
    """Collects the most probable clusters of this rank's images, batch by batch."""

    def __init__(self, num_clusters: int) -> None:
        self.num_clusters = num_clusters
        self.probability: list[Tensor] = []
        self.clusters: list[Tensor] = []

    def add(self, probability: Tensor) -> None:
        """Add the images of a batch by their probabilities [b, num_clusters]."""
        top_probability, top = top_clusters(probability)
        self.probability.append(top_probability)
        self.clusters.append(top)

    def save(self, out: Path, world: World) -> None:
        """Write assignments.npz for the images of all ranks. Collective."""
        width = min(NUM_TOP, self.num_clusters)
        probability = gather_batches(self.probability, width, torch.float32)
        top = gather_batches(self.clusters, width, torch.int64)
        if world.rank == 0:
            assignments = Assignments(
                top[:, 0].numpy(), self.num_clusters, probability[:, 0].numpy(), top.numpy()
            )
            assignments.save(out)
        barrier()
