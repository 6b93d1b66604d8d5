"""A cluster for every image: what k-means and trained heads publish and evaluation reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_scan.storage.atomic import write_atomic


@dataclass(frozen=True)
class Assignments:
    """cluster [N] int32; probability [N] float32 of that cluster and top [N, T] int32 (most probable first), if there are any."""

    cluster: np.ndarray
    num_clusters: int
    probability: np.ndarray | None = None
    top: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """Write into a folder."""
        parts = {
            "cluster": self.cluster.astype(np.int32),
            "num_clusters": np.int64(self.num_clusters),
        }
        if self.probability is not None:
            parts["probability"] = self.probability.astype(np.float32)
        if self.top is not None:
            parts["top"] = self.top.astype(np.int32)
        write_atomic(Path(path) / "assignments.npz", lambda f: np.savez(f, **parts))

    @classmethod
    def load(cls, path: Path) -> Assignments:
        """Read from a folder. Raises ValueError when it holds none."""
        file = Path(path) / "assignments.npz"
        if not file.is_file():
            raise ValueError(f"{path}: holds no assignments.npz; give a kmeans or assign stage")
        with np.load(file) as parts:
            return cls(
                parts["cluster"],
                int(parts["num_clusters"]),
                parts.get("probability"),
                parts.get("top"),
            )


def save_history(path: Path, epochs: np.ndarray, cluster: np.ndarray) -> None:
    """Write into a folder the clusters [N, E] of every image at the start of each of `epochs` [E] (-1: none), for evaluation."""
    write_atomic(
        Path(path) / "history.npz",
        lambda f: np.savez_compressed(
            f, epoch=np.asarray(epochs), cluster=cluster.T.astype(np.int32)
        ),
    )
