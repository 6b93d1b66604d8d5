"""DeepCluster: cluster all features, train on the cluster ids, again each epoch (Caron et al., ECCV 2018; FIDELITY.md 3)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dist_scan.data.assignments import Assignments, save_history
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.hashing import hash_keys
from dist_scan.data.order import labelled_order, released_order, uniform_over_labels
from dist_scan.losses import classification_loss
from dist_scan.methods.base import Embed, Method, MethodInputs, NetworkConfig, ParameterGroup, Step
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.search.agreement import assignment_nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import mine_neighbours
from dist_scan.search.options import KMeansOptions, NeighbourOptions
from dist_scan.search.pic import pic
from dist_scan.search.whiten import fit_table_whitening, write_whitened_table
from dist_scan.world.collectives import barrier
from dist_scan.world.world import current

TOP, SEED = 501, 502  # streams of the hash
SAMPLERS: dict[str, Callable] = {
    "uniform": uniform_over_labels,
    "released_order": released_order,
    "images": labelled_order,
}
FACTS = (
    "clusters",
    "empty_clusters",
    "split_clusters",
    "largest_cluster",
    "images_left_out",
    "nmi_previous",
)


class DeepClusterConfig(NetworkConfig):
    """Defaults are the paper's for ImageNet."""

    kind: Literal["deepcluster"] = "deepcluster"
    num_clusters: int = Field(default=10_000, ge=2)
    """k of k-means. With pic, which finds its own number: the most that the top layer holds; images of the smallest clusters beyond it
    sit an epoch out and are counted."""
    clustering: Literal["kmeans", "pic"] = "kmeans"
    whiten_dim: int | None = Field(default=256, ge=1)
    """PCA whitening to so many dimensions before rows get unit length; null: unit length only."""
    iterations: int = Field(default=20, ge=1)
    """Of k-means, from random images."""
    pic_neighbours: int = Field(default=5, ge=1)
    pic_sigma: float = Field(default=0.2, gt=0)
    pic_alpha: float = Field(default=1e-3, gt=0, le=1)
    pic_iterations: int = Field(default=200, ge=1)
    pic_teleport: Literal["paper", "released"] = "paper"
    sampler: Literal["uniform", "released_order", "images"] = "uniform"
    """uniform: over pseudo-labels (paper). released_order: what the released code visits, which is not balanced. images: each once."""
    top_lr_scale: float = Field(default=1.0, gt=0)
    """The top layer's learning rate as a share of the schedule's."""
    top_momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of the top layer's own SGD: none, as released."""
    reassign: int = Field(default=1, ge=1)
    """Epochs on one clustering, with one top layer. Small sets need several: an epoch has too few steps for a new top layer."""
    track: bool = False
    """Publish every clustering, not only the last one (4 bytes an image each), for evaluation."""


class Clustering(NamedTuple):
    """assignment [N] int32, -1 for an image that sits out; ids run over clusters that hold images."""

    assignment: np.ndarray
    facts: dict[str, float]


class DeepClusterMethod(Method):
    """The epoch's assignment is a bank: a run resumed inside an epoch trains on. Only the first `used` rows of the top layer take part."""

    Config = DeepClusterConfig
    recipes = ("deepcluster",)
    needs = ("images",)
    publishes = ("backbone", "clusters")

    def __init__(self, config: DeepClusterConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        if config.whiten_dim is not None and config.whiten_dim > inputs.feature_dim:
            raise ValueError(
                f"whiten_dim: {config.whiten_dim} of {inputs.feature_dim} features; allowed: at most {inputs.feature_dim}, or null"
            )
        self.backbone = convert_batch_norm(inputs.backbone, config.bn_groups)
        self.top = nn.Linear(inputs.feature_dim, config.num_clusters)
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))
        self.register_buffer("facts", torch.full((len(FACTS),), float("nan"), dtype=torch.float64))
        snapshots = -(-inputs.epochs // config.reassign) if config.track else 0
        self.assignment = MemoryBank(inputs.num_images, dtype=torch.int32, fill=-1)
        self.history = (
            MemoryBank(inputs.num_images, (snapshots,), torch.int32, fill=-1) if snapshots else None
        )
        self.targets = torch.full(
            (inputs.num_images,), -1
        )  # the whole bank, on every rank: read again after a resume
        self.kept: Tensor | None = None

    def memory_banks(self) -> dict[str, MemoryBank]:
        return {"assignment": self.assignment} | ({"history": self.history} if self.history else {})

    def parameter_groups(self) -> list[ParameterGroup]:
        body = [p for p in self.backbone.parameters() if p.requires_grad]
        return [
            ParameterGroup(body),
            ParameterGroup(
                list(self.top.parameters()),
                self.config.top_lr_scale,
                momentum=self.config.top_momentum,
            ),
        ]

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        """Embed all, cluster, and start a new top layer: N(0, 0.01), bias 0."""
        if epoch % self.config.reassign:
            return ()
        before = self.assignment.whole().numpy()
        found = self._cluster(embed(self.backbone), epoch)
        found.facts["nmi_previous"] = (
            assignment_nmi(before, found.assignment) if epoch else float("nan")
        )
        self.facts.copy_(torch.tensor([found.facts[name] for name in FACTS]))
        self.used.fill_(int(found.assignment.max()) + 1)
        self.assignment.fill(torch.from_numpy(found.assignment))
        if self.history is not None:
            self.history.fill(torch.from_numpy(found.assignment), epoch // self.config.reassign)
        fresh = torch.Generator().manual_seed(seed_of(self.inputs.seed, TOP, epoch))
        with torch.no_grad():
            self.top.weight.copy_(torch.randn(self.top.weight.shape, generator=fresh) * 0.01)
            self.top.bias.zero_()
        return list(self.top.parameters())

    def epoch_rows(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Balanced over pseudo-labels, as the sampler says."""
        self.targets = self.assignment.whole().long()
        return SAMPLERS[self.config.sampler](
            rows, self.targets.numpy()[rows], self.inputs.seed, epoch
        )

    def _cluster(self, table: FeatureTable, epoch: int) -> Clustering:
        folder, stop = emptied(self.inputs.work_dir), self.inputs.stop_requested
        if self.config.whiten_dim is not None:
            table = write_whitened_table(
                table,
                fit_table_whitening(table, self.config.whiten_dim),
                folder / "whitened",
                stop=stop,
            )
        if self.config.clustering == "pic":
            return self._power_iteration(table, folder)
        found = kmeans(
            table,
            self.config.num_clusters,
            KMeansOptions(
                iterations=self.config.iterations,
                init="random",
                normalise=self.config.whiten_dim is None,
                seed=seed_of(self.inputs.seed, SEED, epoch),
            ),
            stop=stop,
            progress=current().rank == 0,
        )
        return _compact(
            found.assignment, self.config.num_clusters, self.config.num_clusters, found.num_splits
        )

    def _power_iteration(self, table: FeatureTable, folder: Path) -> Clustering:
        c, loud = self.config, current().rank == 0
        metric = "cosine" if c.whiten_dim is None else "l2"
        graph = mine_neighbours(
            table,
            folder / "neighbours",
            c.pic_neighbours,
            NeighbourOptions(metric=metric),
            stop=self.inputs.stop_requested,
            progress=loud,
        )
        found = pic(
            graph,
            sigma=c.pic_sigma,
            alpha=c.pic_alpha,
            iterations=c.pic_iterations,
            teleport=c.pic_teleport,
            stop=self.inputs.stop_requested,
            progress=loud,
        )
        return _compact(found.assignment, found.num_clusters, c.num_clusters, 0)

    def forward(self, batch: Batch) -> Step:
        features = self.backbone(batch.views[0])
        if getattr(
            self.backbone, "ends_before_relu", False
        ):  # clusters are of what comes before it, the classifier stands after it
            features = F.relu(features)
        used, targets = int(self.used), self.targets[batch.index].to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(
                features.to(self.top.weight.dtype), self.top.weight[:used], self.top.bias[:used]
            )
            loss, accuracy = classification_loss(logits, targets)
        return Step(loss, {"pseudo_accuracy": accuracy})

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        """What the clustering of this epoch was like."""
        return {name: value for name, value in zip(FACTS, self.facts.tolist()) if value == value}

    def prepare_publish(self) -> None:
        self.targets = self.assignment.whole().long()
        self.kept = self.history.whole() if self.history is not None else None

    def publish(self, out: Path) -> None:
        """The backbone, and the last epoch's assignment (images that sat out count as cluster 0)."""
        save_backbone(out, self.backbone, self.inputs.backbone_config)
        Assignments(self.targets.clamp(min=0).numpy(), max(int(self.used), 1)).save(out)
        if self.kept is not None:
            save_history(
                out, np.arange(self.kept.shape[1]) * self.config.reassign, self.kept.numpy()
            )


def seed_of(*keys: int) -> int:
    return int(hash_keys(*keys) >> 33)


def emptied(folder: Path) -> Path:
    """The folder with nothing in it (rank 0 looks after it)."""
    if current().rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    return folder


def _compact(assignment: np.ndarray, num_clusters: int, most: int, num_split: int) -> Clustering:
    """Ids without gaps, in the old order. Of more than `most` clusters the smallest (of equals the last) are left out: -1."""
    sizes = np.bincount(assignment, minlength=num_clusters)
    held = np.flatnonzero(sizes)
    kept = np.sort(held[np.argsort(-sizes[held], kind="stable")[:most]])
    new = np.full(num_clusters, -1, np.int32)
    new[kept] = np.arange(len(kept), dtype=np.int32)
    left_out = int(sizes.sum() - sizes[kept].sum())
    facts = {
        "clusters": len(kept),
        "empty_clusters": num_clusters - len(held),
        "split_clusters": num_split,
        "largest_cluster": float(sizes.max() / sizes.sum()),
        "images_left_out": left_out,
    }
    return Clustering(new[assignment], facts)
