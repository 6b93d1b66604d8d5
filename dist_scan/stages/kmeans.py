"""Exact k-means on a FeatureTable: a baseline on pixels and on pretext features."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_scan.config.stage import Ref, StageConfig, Stages
from dist_scan.data.feature_table import FeatureTable
from dist_scan.search.kmeans import kmeans
from dist_scan.search.options import KMeansOptions
from dist_scan.search.whiten import fit_whitening, write_whitened_table
from dist_scan.stages.base import Stage
from dist_scan.storage.artifacts import WORK
from dist_scan.world.collectives import barrier


class KMeansConfig(StageConfig):
    """Settings of Lloyd's algorithm on view 0 of every image (no subsampling)."""

    kind: Literal["kmeans"] = "kmeans"
    features: Ref
    num_clusters: int = Field(ge=2)
    normalise: bool = True
    """Scale rows to unit length first, as the papers' baselines do."""
    whiten_dim: int | None = Field(default=None, ge=1)
    """PCA-whiten rows to this many dimensions first, as DeepCluster does; null: do not. The
    centroids are then means of whitened rows."""
    iterations: int = Field(default=100, ge=1)
    tolerance: float = Field(default=0.0, ge=0)
    """Stop when the objective improves by less than this fraction in an iteration; 0: when no
    assignment changes."""
    restarts: int = Field(default=5, ge=1)
    init: Literal["kmeans++", "random"] = "kmeans++"
    spherical: bool = False

    def publishes(self) -> tuple[str, ...]:
        """Assignments."""
        return ("clusters",)

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless whitened rows are also normalised."""
        if self.whiten_dim is not None and not self.normalise:
            raise ValueError(
                f"stages.{name}.normalise: false, but whitened rows have unit length; "
                "remove it, or whiten_dim"
            )

    def check_size(self, name: str, num_images: int) -> None:
        """Raise ValueError unless there is at least one image per cluster."""
        if self.num_clusters > num_images:
            raise ValueError(
                f"stages.{name}.num_clusters: {self.num_clusters} clusters of {num_images} images; "
                f"allowed: at most {num_images}. Lower it, or give more images"
            )


class KMeansStage(Stage[KMeansConfig]):
    """Writes assignments.npz and centroids.npy."""

    Config = KMeansConfig
    version = 3

    def run(self) -> None:
        """Cluster, from the last saved iteration if there is one. Collective."""
        context, config = self.context, self.config
        work = context.out / WORK
        table = FeatureTable.open(context.inputs["features"])
        if config.whiten_dim is not None:
            table = write_whitened_table(
                table,
                fit_whitening(table, config.whiten_dim),
                work / "whitened",
                stop_requested=lambda: context.stop.requested,
            )
        options = KMeansOptions(
            iterations=config.iterations,
            tolerance=config.tolerance,
            init=config.init,
            restarts=config.restarts,
            spherical=config.spherical,
            normalise=config.normalise,
            seed=context.run.seed,
        )
        result = kmeans(
            table,
            config.num_clusters,
            options,
            stop_requested=lambda: context.stop.requested,
            checkpoint_path=work / "kmeans.npz",
        )
        if context.world.rank == 0:
            result.save(context.out)
        barrier()
