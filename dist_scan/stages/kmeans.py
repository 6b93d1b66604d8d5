"""FeatureTable -> a cluster for every image by exact k-means: the baseline on pixels and on pretext features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from dist_scan.config.stage import Ref, StageConfig
from dist_scan.data.assignments import Assignments
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import barrier


class KMeansConfig(StageConfig):
    """Lloyd's algorithm on view 0 of every image; never a subsample."""

    kind: Literal["kmeans"] = "kmeans"
    features: Ref
    num_clusters: int = Field(ge=2)
    normalise: bool = True
    """Rows to unit length first, as the papers' baselines do."""
    whiten_dim: int | None = Field(default=None, ge=1)
    """PCA whitening to so many dimensions before that, as DeepCluster clusters its features; null: none. The centroids are of whitened rows."""
    iterations: int = Field(default=100, ge=1)
    tolerance: float = Field(default=0.0, ge=0)
    """Stop when the objective gains less than this share in an iteration; 0: when no assignment changes."""
    restarts: int = Field(default=5, ge=1)
    init: Literal["kmeans++", "random"] = "kmeans++"
    spherical: bool = False

    def publishes(self) -> tuple[str, ...]:
        return ("clusters",)

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """Whitened rows have unit length."""
        if self.whiten_dim is not None and not self.normalise:
            raise ValueError(
                f"stages.{name}.normalise: false, but whitened rows get unit length; leave it out, or whiten_dim"
            )

    def check_size(self, name: str, num_images: int, stages: Mapping[str, StageConfig]) -> None:
        """Every cluster needs an image."""
        if self.num_clusters > num_images:
            raise ValueError(
                f"stages.{name}.num_clusters: {self.num_clusters} clusters of {num_images} images; "
                f"allowed: at most {num_images}. Lower it, or give more images"
            )


class KMeansStage(Stage):
    """Writes assignments.npz and centroids.npy."""

    Config = KMeansConfig
    version = 2  # 2: greedy k-means++

    def run(self) -> None:
        """Collective."""
        from dist_scan.data.feature_table import FeatureTable
        from dist_scan.search.kmeans import kmeans
        from dist_scan.search.options import KMeansOptions
        from dist_scan.search.whiten import fit_whitening, write_whitened_table
        from dist_scan.storage.arrays import write_npy
        from dist_scan.storage.artifacts import WORK

        c, s = self.context, self.config
        table = FeatureTable.open(c.inputs["features"])
        if s.whiten_dim is not None:
            table = write_whitened_table(
                table,
                fit_whitening(table, s.whiten_dim),
                c.out / WORK / "whitened",
                stop_requested=lambda: c.stop.requested,
            )
        result = kmeans(
            table,
            s.num_clusters,
            KMeansOptions(
                iterations=s.iterations,
                tolerance=s.tolerance,
                init=s.init,
                restarts=s.restarts,
                spherical=s.spherical,
                normalise=s.normalise,
                seed=c.run.seed,
            ),
            stop_requested=lambda: c.stop.requested,
            show_progress=c.world.rank == 0,
            checkpoint_path=c.out / WORK / "kmeans.npz",
        )
        if c.world.rank == 0:
            Assignments(result.assignment, s.num_clusters).save(c.out)
            write_npy(c.out / "centroids.npy", result.centroids)
        barrier()
