"""MMDC: outputs on the unit sphere are pulled to fixed codes, assigned by Hungarian matching.

Shiran and Weinshall, Multi-Modal Deep Clustering: Unsupervised Partitioning of Images, ICPR 2020:
Sec. III-A (codes from a Gaussian mixture), Eq. 1 (loss), Algorithm 1 (matching inside batches,
epochs of rotation prediction between), refinement of the targets by k-means.

The loss and the order of parameter updates follow the released code where the paper leaves them
open: squared distance divided by the dimension, and zero gradients for the head of the other task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_scan.data.assignments import Assignments
from dist_scan.data.batch import Batch
from dist_scan.data.feature_table import FeatureTable
from dist_scan.losses import classification_loss, mmdc_loss, on_unit_sphere
from dist_scan.methods._clustering import AssignmentHistory
from dist_scan.methods.base import (
    Embed,
    Method,
    MethodConfig,
    MethodInputs,
    NetworkConfig,
    ParameterGroup,
    StepResult,
)
from dist_scan.methods.rotnet import NUM_ROTATIONS
from dist_scan.models.backbone import save_backbone
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import FeatureNorm
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.models.sphere_codes import SphereCodes
from dist_scan.search.kmeans import kmeans
from dist_scan.search.matching import match_blocks, match_clusters
from dist_scan.search.options import KMeansOptions
from dist_scan.world.collectives import gather_rows
from dist_scan.world.world import current

WEAK, STRONG, ROTATED = 0, 1, 2
"""Index of each recipe in ``MMDCMethod.recipes``."""


class MMDCConfig(NetworkConfig):
    """A round is an epoch of codes and, with ``rotation``, an epoch of rotations.

    The paper counts rounds, the stage counts epochs: the paper's 400 are ``epochs: 800``, and so
    with milestones and refine_from.
    """

    kind: Literal["mmdc"] = "mmdc"
    num_clusters: int = Field(ge=2)
    means: Literal["one_hot", "random"] = "one_hot"
    """Means of the mixture's components. random: uniform in a cube around 0, then normalised."""
    code_dim: int | None = Field(default=None, ge=2)
    """Dimension of the codes; null: num_clusters."""
    sigma: float = Field(default=0.0, ge=0)
    """Spread of the codes around their means; 0: every code is its mean."""
    sigma_meaning: Literal["variance", "released"] = "variance"
    """variance: the covariance is sigma times the identity (paper). released: sigma is the standard
    deviation."""
    matching_block: int = Field(default=128, ge=2)
    """Number of images among which targets are permuted: contiguous parts of the global batch, for
    any number of ranks; the last part may be smaller. It belongs to the method: the paper matches
    inside batches of 128."""
    rotation: bool = True
    """Train every second epoch to predict rotations, with a head of its own (the paper: not on
    MNIST)."""
    rotation_first: bool = False
    """Begin a round with the epoch of rotations, as the released code does; the paper's Algorithm 1
    begins with the codes."""
    refine_from: int | None = Field(default=None, ge=0)
    """First epoch of the stage (counted from 0) in which targets come from k-means on all outputs,
    at the start of each round, instead of matching inside batches; null: never."""
    refine_restarts: int = Field(default=10, ge=1)
    """Restarts of that k-means."""
    track: bool = False
    """Publish the nearest mean of every image in each round, not only the model (4 bytes per image
    each), for evaluation. This needs no pass over the data: the outputs are those that targets are
    matched to, so images late in an epoch are seen by a network that has learned more."""

    @model_validator(mode="after")
    def _check_combination(self) -> MMDCConfig:
        if self.rotation and self.refine_from is not None and self.refine_from % 2:
            raise ValueError(
                f"refine_from: {self.refine_from} is the second epoch of a round; "
                "allowed with rotation: even numbers"
            )
        if self.rotation_first and not self.rotation:
            raise ValueError(
                "rotation_first: there is no rotation epoch; set rotation: true, or leave it out"
            )
        if self.means == "one_hot" and self.code_dim not in (None, self.num_clusters):
            raise ValueError(
                f"code_dim: {self.code_dim} dimensions do not hold {self.num_clusters} one-hot "
                "means; leave it out, or set means: random"
            )
        return self


class CodeNetwork(nn.Module):
    """Images [B, 3, S, S] -> outputs [B, dim] of unit length."""

    def __init__(self, backbone: nn.Module, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = linear_as_released(feature_dim, dim)
        self.num_features = dim

    def forward(self, images: Tensor) -> Tensor:
        return on_unit_sphere(self.head(self.backbone(images)))


class MMDCMethod(Method):
    """Memory bank ``target_id``: the code of each image.

    Ids below N are the drawn codes, a permutation of 0..N-1 until refinement begins; id N + c is
    the mean of component c. Codes are not stored: each is a function of (seed, id).
    """

    Config = MMDCConfig
    recipes = ("mmdc_center", "mmdc", "mmdc_rotation")
    needs = ("images",)
    publishes = ("backbone", "model", "clusters")
    config: MMDCConfig

    @classmethod
    def recipes_for(cls, config: MethodConfig) -> tuple[str, ...]:
        assert isinstance(config, MMDCConfig)
        return cls.recipes if config.rotation else cls.recipes[:ROTATED]

    def __init__(self, config: MMDCConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.codes = SphereCodes(
            inputs.num_images,
            config.num_clusters,
            config.code_dim or config.num_clusters,
            config.means,
            config.sigma if config.sigma_meaning == "variance" else config.sigma**2,
            inputs.seed,
        )
        self.network = CodeNetwork(inputs.network(config), inputs.feature_dim, self.codes.dim)
        self.rotation_head = None
        if config.rotation:
            self.rotation_head = linear_as_released(inputs.feature_dim, NUM_ROTATIONS)
        self.target_id = MemoryBank(inputs.num_images, dtype=torch.int64)
        self.target_id.fill(torch.arange(inputs.num_images))
        self.memory_banks["target_id"] = self.target_id
        self.history: AssignmentHistory | None = None
        if config.track:
            epochs_per_round = 2 if config.rotation else 1
            self.history = AssignmentHistory(
                inputs.num_images, inputs.epochs, epochs_per_round, int(config.rotation_first)
            )
            self.memory_banks["history"] = self.history
        # All target ids [N], on every rank after prepare_publish.
        self.last_ids = torch.arange(inputs.num_images)

    def is_rotation_epoch(self, epoch: int) -> bool:
        """True if the epoch trains to predict rotations."""
        first = 0 if self.config.rotation_first else 1
        return self.config.rotation and epoch % 2 == first

    def is_refined(self, epoch: int) -> bool:
        """True if the targets of the epoch come from k-means."""
        return self.config.refine_from is not None and epoch >= self.config.refine_from

    def epoch_views(self, epoch: int) -> tuple[int, ...]:
        if self.is_rotation_epoch(epoch):
            return (ROTATED,) * NUM_ROTATIONS
        # The weak view is used for matching only.
        return (STRONG,) if self.is_refined(epoch) else (WEAK, STRONG)

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        is_start_of_round = not (self.config.rotation and epoch % 2)
        if self.is_refined(epoch) and is_start_of_round:
            self._refine(epoch, embed(self.network, WEAK))
        return ()

    def _refine(self, epoch: int, outputs: FeatureTable) -> None:
        """Cluster all outputs; targets become the means, numbered like the previous targets."""
        work_dir = self.inputs.work_dir
        # k-means on the outputs of all images.
        result = kmeans(
            outputs,
            self.config.num_clusters,
            KMeansOptions(
                iterations=300,
                restarts=self.config.refine_restarts,
                seed=self.inputs.seed + 1000 * epoch,
            ),
            stop_requested=self.inputs.stop_requested,
            checkpoint_path=work_dir / "refinement.npz" if work_dir else None,
        )
        # Give the clusters the numbers of the components that they agree with most.
        previous = self.codes.component(self.target_id.whole().numpy())
        mapping = match_clusters(previous, result.assignment, self.config.num_clusters)
        # The target of an image is now the mean of its component.
        self.target_id.fill(self.inputs.num_images + torch.from_numpy(mapping[result.assignment]))
        if self.history is not None:
            column = self.history.column(epoch)
            for shard, rows in self.history.shards.items():
                start, stop = self.history.starts[shard : shard + 2].tolist()
                shard_outputs = torch.from_numpy(outputs.rows(np.arange(start, stop), 0))
                rows[:, column] = self.nearest_mean(shard_outputs)

    def nearest_mean(self, outputs: Tensor) -> Tensor:
        """Component [b] int32 with the mean nearest to each output [b, dim], on the CPU."""
        similarity = outputs.double().cpu().numpy() @ self.codes.means.T
        return torch.from_numpy(similarity.argmax(1).astype(np.int32))

    def forward(self, batch: Batch) -> StepResult:
        if self.is_rotation_epoch(batch.epoch):
            return self._rotation_step(batch)
        return self._code_step(batch)

    def _rotation_step(self, batch: Batch) -> StepResult:
        """Predict the rotation; the four copies of an image have crops of their own."""
        assert self.rotation_head is not None
        # Rotate view k by k quarter turns, counter-clockwise.
        images = torch.cat([torch.rot90(view, k, (2, 3)) for k, view in enumerate(batch.views)])
        rotation = torch.arange(NUM_ROTATIONS, device=images.device)
        rotation = rotation.repeat_interleave(len(batch.index))
        # Classify the rotation.
        logits = self.rotation_head(self.network.backbone(images))
        loss, accuracy = classification_loss(logits, rotation)
        return StepResult(loss + zero_loss(self.network.head), {"rotation_accuracy": accuracy})

    def _code_step(self, batch: Batch) -> StepResult:
        """Match targets to the weak view's outputs, then pull the strong view's outputs to them."""
        target_ids = self.target_id.read(batch.index)
        metrics: dict[str, Tensor] = {}
        for_end_step: dict[str, Tensor] = {}
        if not self.is_refined(batch.epoch):
            # Algorithm 1: permute the targets inside blocks of the batch by Hungarian matching.
            outputs = self._eval_outputs(batch.views[0])
            previous_ids, target_ids = target_ids, self._match(outputs, target_ids)
            has_moved = self._component(previous_ids) != self._component(target_ids)
            metrics["targets_moved"] = torch.tensor(has_moved.mean())
            for_end_step = {"target_id": target_ids, "nearest": self.nearest_mean(outputs)}
        # Eq. 1: squared distance of outputs and targets, divided by the dimension.
        outputs = self.network(batch.views[-1])
        targets = torch.from_numpy(self.codes.codes(target_ids.numpy())).to(outputs)
        loss = mmdc_loss(outputs, targets)
        return StepResult(loss + zero_loss(self.rotation_head), metrics, for_end_step)

    @torch.no_grad()
    def _eval_outputs(self, images: Tensor) -> Tensor:
        """Outputs [b, dim] of the network in eval mode."""
        self.network.eval()
        outputs = self.network(images)
        self.network.train()
        return outputs

    def _match(self, outputs: Tensor, target_ids: Tensor) -> Tensor:
        """New target ids [b] of this rank: a permutation inside blocks of the global batch."""
        start = len(target_ids) * current().rank
        local = range(start, start + len(target_ids))
        # Outputs and targets of the global batch.
        all_ids, all_outputs = gather_rows(target_ids), gather_rows(outputs)
        # Only the blocks that hold rows of this rank are matched.
        order = match_blocks(
            all_outputs.double().cpu().numpy(),
            self.codes.codes(all_ids.numpy()),
            self.config.matching_block,
            local,
        )
        return all_ids[torch.from_numpy(order[local.start : local.stop])]

    def _component(self, target_ids: Tensor) -> np.ndarray:
        return self.codes.component(target_ids.numpy())

    def end_step(self, batch: Batch, step: StepResult) -> None:
        # Targets move only if the update was made.
        if step.for_end_step:
            self.target_id.write(batch.index, step.for_end_step["target_id"])
            if self.history is not None:
                column = self.history.column(batch.epoch)
                self.history.write(batch.index, step.for_end_step["nearest"], column)

    def parameter_groups(self) -> list[ParameterGroup]:
        """No weight decay on biases and batch norm, as in the released code."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            ParameterGroup([p for p in parameters if p.ndim > 1]),
            ParameterGroup([p for p in parameters if p.ndim <= 1], weight_decay=0.0),
        ]

    def prepare_publish(self) -> None:
        self.last_ids = self.target_id.whole()
        if self.history is not None:
            self.history.gather()

    def publish(self, out: Path) -> None:
        """Write a cluster model, the backbone, and the components of the last targets."""
        assert self.inputs.backbone_config is not None
        # The largest logit is the nearest mean: logits are products with means of unit length.
        means = torch.from_numpy(self.codes.means).to(self.network.head.weight)
        head = nn.Linear(self.inputs.feature_dim, self.config.num_clusters).to(means)
        with torch.no_grad():
            head.weight.copy_(means @ self.network.head.weight)
            head.bias.copy_(means @ self.network.head.bias)
        norm = FeatureNorm("none", self.inputs.feature_dim)
        backbone, config = self.network.backbone, self.inputs.backbone_config
        save_cluster_model(out, ClusterModel(backbone, norm, head, config))
        save_backbone(out, backbone, config)
        Assignments(self._component(self.last_ids), self.config.num_clusters).save(out)
        if self.history is not None:
            self.history.save(out)


def linear_as_released(in_dim: int, out_dim: int) -> nn.Linear:
    """Linear layer with weights N(0, 0.01) and bias 0, as in the released code."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def zero_loss(head: nn.Module | None) -> Tensor | float:
    """Zero, with a zero gradient for every parameter of the head that the step does not use.

    DDP needs a gradient for all parameters. As in the released code, momentum and weight decay
    then move the head of the other task too.
    """
    return 0.0 if head is None else 0.0 * sum(p.sum() for p in head.parameters())
