"""The cluster of every image: written by k-means and trained heads, read by evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_scan.storage.arrays import write_npz

FILE = "assignments.npz"


@dataclass(frozen=True)
class Assignments:
    """Cluster of each of N images, its probability, and the most probable clusters."""

    cluster: np.ndarray
    """[N] int32."""
    num_clusters: int
    probability: np.ndarray | None = None
    """[N] float32: probability of `cluster`."""
    top: np.ndarray | None = None
    """[N, T] int32: the most probable clusters, in descending order."""

    def save(self, path: Path) -> None:
        """Write into a folder."""
        arrays: dict[str, np.ndarray] = {
            "cluster": self.cluster.astype(np.int32),
            "num_clusters": np.array(self.num_clusters, np.int64),
        }
        if self.probability is not None:
            arrays["probability"] = self.probability.astype(np.float32)
        if self.top is not None:
            arrays["top"] = self.top.astype(np.int32)
        write_npz(path / FILE, arrays)

    @classmethod
    def load(cls, path: Path) -> Assignments:
        """Read from a folder. Raises ValueError if the folder has no assignments.npz."""
        file = path / FILE
        if not file.is_file():
            raise ValueError(f"{path}: no {FILE}; give the folder of a kmeans or assign stage")
        with np.load(file) as arrays:
            num_clusters = int(arrays["num_clusters"])
            return cls(
                arrays["cluster"], num_clusters, arrays.get("probability"), arrays.get("top")
            )


def save_history(path: Path, epochs: np.ndarray, cluster: np.ndarray) -> None:
    """Write the clusters of every image over the epochs into a folder, for evaluation.

    cluster: [N, E], the cluster of each image at the start of each of `epochs` [E]; -1: none.
    """
    arrays = {"epoch": np.asarray(epochs), "cluster": cluster.T.astype(np.int32)}
    write_npz(path / "history.npz", arrays, compressed=True)
