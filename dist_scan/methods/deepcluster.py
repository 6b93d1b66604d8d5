"""DeepCluster: cluster the features of all images, train on the cluster ids, and repeat.

Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018: Eq. 1
(classification of pseudo-labels), Eq. 2 (k-means), Sec. 3.3 (sampler against trivial solutions),
Sec. 3.4 (whitening, optimizer), Eq. 3 (NMI), appendix (power iteration clustering).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dist_scan.data.assignments import Assignments
from dist_scan.data.batch import Batch
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.order import clustered_order, released_order, uniform_over_clusters
from dist_scan.losses import classification_loss
from dist_scan.methods._clustering import (
    KMEANS_STREAM,
    TOP_LAYER_STREAM,
    ClusteringMethod,
    empty_folder,
    hashed_seed,
)
from dist_scan.methods.base import (
    Embed,
    MethodInputs,
    NetworkConfig,
    ParameterGroup,
    StepResult,
)
from dist_scan.search.agreement import assignment_nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import KMeansOptions, NeighbourOptions
from dist_scan.search.pic import pic
from dist_scan.search.whiten import fit_whitening, write_whitened_table

SAMPLERS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    "uniform": uniform_over_clusters,
    "released_order": released_order,
    "images": clustered_order,
}


class DeepClusterConfig(NetworkConfig):
    """The defaults are the paper's for ImageNet."""

    kind: Literal["deepcluster"] = "deepcluster"
    num_clusters: int = Field(default=10_000, ge=2)
    """kmeans: number of clusters. pic finds its own number of clusters; this is then the number of
    outputs of the top layer, and images of the smallest clusters beyond it are left out for an
    epoch and counted."""
    clustering: Literal["kmeans", "pic"] = "kmeans"
    """pic: power iteration clustering."""
    whiten_dim: int | None = Field(default=256, ge=1)
    """Dimensions of PCA whitening, after which rows get unit length; null: unit length only."""
    iterations: int = Field(default=20, ge=1)
    """Iterations of k-means, which starts from random images."""
    pic_neighbours: int = Field(default=5, ge=1)
    pic_sigma: float = Field(default=0.2, gt=0)
    pic_alpha: float = Field(default=1e-3, gt=0, le=1)
    pic_iterations: int = Field(default=200, ge=1)
    pic_teleport: Literal["paper", "released"] = "paper"
    sampler: Literal["uniform", "released_order", "images"] = "uniform"
    """uniform: every pseudo-label equally often (paper). released_order: as the released code
    visits images, which is not balanced. images: every image once."""
    top_lr_scale: float = Field(default=1.0, gt=0)
    """Learning rate of the top layer, as a factor on the schedule's."""
    top_momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD momentum of the top layer; the released code uses none."""
    reassign: int = Field(default=1, ge=1)
    """Number of epochs with one clustering and one top layer. Small sets need several: an epoch has
    too few steps to train a new top layer."""
    track: bool = False
    """Publish every clustering, not only the last one (4 bytes per image each), for evaluation."""


class Clustering(NamedTuple):
    """Assignment [N] int32 of all images, and statistics to log.

    Cluster ids have no gaps; -1 marks an image that is left out.
    """

    assignment: np.ndarray
    statistics: dict[str, float]


class DeepClusterMethod(ClusteringMethod):
    """Classifies the clusters by a top layer; ``used``: number of clusters, and of rows in use."""

    Config = DeepClusterConfig
    recipes = ("deepcluster",)
    publishes = ("backbone", "clusters")
    statistic_names = (
        "clusters",
        "empty_clusters",
        "split_clusters",
        "largest_cluster",
        "images_left_out",
        "nmi_previous",
    )
    config: DeepClusterConfig
    used: Tensor

    def __init__(self, config: DeepClusterConfig, inputs: MethodInputs) -> None:
        if config.whiten_dim is not None and config.whiten_dim > inputs.feature_dim:
            raise ValueError(
                f"whiten_dim: {config.whiten_dim} is more than the width of the features; "
                f"allowed: at most {inputs.feature_dim}, or null"
            )
        super().__init__(config, inputs)
        self.top = nn.Linear(inputs.feature_dim, config.num_clusters)
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))
        if config.track:
            self.track_history(every=config.reassign)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup([p for p in self.backbone.parameters() if p.requires_grad]),
            ParameterGroup(
                list(self.top.parameters()),
                self.config.top_lr_scale,
                sgd_momentum=self.config.top_momentum,
            ),
        ]

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        if epoch % self.config.reassign:
            return ()
        # Cluster the features of all images (Eq. 2).
        previous = self.assignment.whole().numpy()
        assignment, statistics = self._cluster(embed(self.backbone), epoch)
        # Compare with the previous clustering (Eq. 3).
        statistics["nmi_previous"] = assignment_nmi(previous, assignment) if epoch else np.nan
        self.last_statistics.copy_(
            torch.tensor([statistics[name] for name in self.statistic_names])
        )
        # Make the clusters the targets.
        self.used.fill_(int(assignment.max()) + 1)
        self.assignment.fill(torch.from_numpy(assignment))
        if self.history is not None:
            self.history.fill(torch.from_numpy(assignment), self.history.column(epoch))
        # Start a new top layer: N(0, 0.01), bias 0.
        seed = hashed_seed(self.inputs.seed, TOP_LAYER_STREAM, epoch)
        weight = torch.randn(self.top.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.top.weight.copy_(weight * 0.01)
            self.top.bias.zero_()
        return list(self.top.parameters())

    def epoch_rows(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        sample = SAMPLERS[self.config.sampler]
        return sample(rows, self.targets.numpy()[rows], self.inputs.seed, epoch)

    def _cluster(self, table: FeatureTable, epoch: int) -> Clustering:
        """Whiten the features, then cluster them by k-means or power iteration (Sec. 3.4)."""
        config = self.config
        folder = empty_folder(self.inputs.work_dir)
        # PCA whitening, which also scales rows to unit length.
        if config.whiten_dim is not None:
            whitening = fit_whitening(table, config.whiten_dim)
            table = write_whitened_table(
                table, whitening, folder / "whitened", stop_requested=self.inputs.stop_requested
            )
        if config.clustering == "pic":
            return self._power_iteration(table, folder)
        # k-means on unit rows (Eq. 2).
        result = kmeans(
            table,
            config.num_clusters,
            KMeansOptions(
                iterations=config.iterations,
                init="random",
                normalise=config.whiten_dim is None,
                seed=hashed_seed(self.inputs.seed, KMEANS_STREAM, epoch),
            ),
            stop_requested=self.inputs.stop_requested,
        )
        return self._use_largest(result.assignment, config.num_clusters, result.num_splits)

    def _power_iteration(self, table: FeatureTable, folder: Path) -> Clustering:
        """Power iteration clustering of the graph of nearest neighbours."""
        config = self.config
        # Whitened rows have unit length; the cosine metric normalises the others.
        graph = search_neighbours(
            table,
            folder / "neighbours",
            config.pic_neighbours,
            NeighbourOptions(metric="cosine" if config.whiten_dim is None else "l2"),
            stop_requested=self.inputs.stop_requested,
        )
        result = pic(
            graph,
            sigma=config.pic_sigma,
            alpha=config.pic_alpha,
            iterations=config.pic_iterations,
            teleport=config.pic_teleport,
            stop_requested=self.inputs.stop_requested,
        )
        return self._use_largest(result.assignment, result.num_clusters, num_splits=0)

    def _use_largest(
        self, assignment: np.ndarray, num_clusters: int, num_splits: int
    ) -> Clustering:
        """The clusters for which the top layer has an output, and what to log.

        num_splits: number of empty clusters that k-means refilled by a split.
        """
        sizes = np.bincount(assignment, minlength=num_clusters)
        renumbered = renumber_clusters(assignment, sizes, self.config.num_clusters)
        statistics = {
            "clusters": int(renumbered.max()) + 1,
            "empty_clusters": int((sizes == 0).sum()),
            "split_clusters": num_splits,
            "largest_cluster": float(sizes.max() / sizes.sum()),
            "images_left_out": int((renumbered < 0).sum()),
        }
        return Clustering(renumbered, statistics)

    def forward(self, batch: Batch) -> StepResult:
        features = self.backbone(batch.views[0])
        # The last ReLU belongs to the classifier: clusters are of the features before it.
        if getattr(self.backbone, "ends_before_relu", False):
            features = F.relu(features)
        # Classify the pseudo-labels (Eq. 1) with the rows of the top layer that are in use.
        targets = self.targets[batch.index].to(features.device)
        num_used = int(self.used)
        weight, bias = self.top.weight[:num_used], self.top.bias[:num_used]
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(features.to(weight.dtype), weight, bias)
            loss, accuracy = classification_loss(logits, targets)
        return StepResult(loss, {"pseudo_accuracy": accuracy})

    def publish(self, out: Path) -> None:
        """Write the backbone and the last assignment; images left out count as cluster 0."""
        super().publish(out)
        Assignments(self.targets.clamp(min=0).numpy(), max(int(self.used), 1)).save(out)


def renumber_clusters(assignment: np.ndarray, sizes: np.ndarray, max_clusters: int) -> np.ndarray:
    """The assignment [N] int32 with ids without gaps, in the old order; sizes [C] of its clusters.

    If more than ``max_clusters`` hold images, only the largest keep them (the first of equal size);
    the other images get -1.
    """
    # The clusters that keep their images, in the old order.
    non_empty = np.flatnonzero(sizes)
    largest_first = np.argsort(-sizes[non_empty], kind="stable")
    used = np.sort(non_empty[largest_first[:max_clusters]])
    # Their new ids; the others get -1.
    new_id = np.full(len(sizes), -1, np.int32)
    new_id[used] = np.arange(len(used), dtype=np.int32)
    return new_id[assignment]
