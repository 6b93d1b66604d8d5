"""MMDC: outputs on the unit sphere are pulled to fixed codes that a linear assignment deals out; rotations are learned by the way
(Shiran and Weinshall, ICPR 2020). FIDELITY.md 2 lists where the released code differs from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_scan.data.assignments import Assignments, save_history
from dist_scan.data.batch import Batch
from dist_scan.data.feature_table import FeatureTable
from dist_scan.losses import at_least_fp32, classification_loss, mmdc_loss
from dist_scan.methods.base import Embed, Method, MethodInputs, NetworkConfig, ParameterGroup, Step
from dist_scan.models.backbone import save_backbone
from dist_scan.models.batch_norm import convert_batch_norm
from dist_scan.models.cluster_model import ClusterModel, save_cluster_model
from dist_scan.models.layers import FeatureNorm
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.models.sphere_codes import SphereCodes
from dist_scan.search.kmeans import kmeans
from dist_scan.search.matching import match_blocks, relabel
from dist_scan.search.options import KMeansOptions
from dist_scan.world.collectives import gather_rows
from dist_scan.world.world import current

WEAK, STRONG, ROTATED = 0, 1, 2  # the recipes' places


class MMDCConfig(NetworkConfig):
    """With `rotation` a round is two epochs of the stage: the paper's 400 epochs are `epochs: 800`, and so with milestones and refine_from."""

    kind: Literal["mmdc"] = "mmdc"
    num_clusters: int = Field(ge=2)
    means: Literal["one_hot", "random"] = "one_hot"
    """Of the mixture's components. random: uniform in a cube around 0, normalised."""
    code_dim: int | None = Field(default=None, ge=2)
    """Dimensions of the sphere; num_clusters when left out."""
    sigma: float = Field(default=0.0, ge=0)
    """Spread of the codes around their means; 0: every code is its mean."""
    sigma_meaning: Literal["variance", "released"] = "variance"
    """variance: the covariance is sigma times the identity (paper). released: sigma is the standard deviation."""
    matching_block: int = Field(default=128, ge=2)
    """Images among which targets are permuted: contiguous parts of the global batch, whatever the number of ranks; the last may be
    smaller. Part of the method: the paper matches inside batches of 128."""
    rotation: bool = True
    """Every second epoch tells four rotations of each image apart, with a head of its own (the paper: not on MNIST)."""
    rotation_first: bool = False
    """released: the rotation epoch of a round comes first. The paper's Algorithm 1 clusters first."""
    refine_from: int | None = Field(default=None, ge=0)
    """Epoch of the stage (counted from 0) from which targets are renewed by k-means on all outputs at the start of each round, instead
    of being permuted in the batch; null: never."""
    refine_restarts: int = Field(default=10, ge=1)
    track: bool = False
    """Publish the nearest mean of every image in each round, not only the model (4 bytes an image each), for evaluation. It costs no pass: the
    outputs are those that targets are matched to, so images met late in an epoch are seen by a network that has learned more."""

    @model_validator(mode="after")
    def _fit(self) -> MMDCConfig:
        if self.rotation and self.refine_from is not None and self.refine_from % 2:
            raise ValueError(
                f"refine_from: {self.refine_from} is the second epoch of a round; allowed with rotation: even numbers"
            )
        if self.rotation_first and not self.rotation:
            raise ValueError(
                "rotation_first: there is no rotation epoch; set rotation: true, or leave it out"
            )
        if self.means == "one_hot" and self.code_dim not in (None, self.num_clusters):
            raise ValueError(
                f"code_dim: {self.code_dim} dimensions do not hold {self.num_clusters} one-hot means; leave it out, or set means: random"
            )
        return self


class CodeNetwork(nn.Module):
    """images [B, 3, S, S] -> outputs [B, dim] of unit length."""

    def __init__(self, backbone: nn.Module, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone, self.head, self.num_features = backbone, small_linear(feature_dim, dim), dim

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(self.head(self.backbone(images))), dim=1)


class MMDCMethod(Method):
    """Bank `target_id`: the code of each image. Ids below N are the drawn codes, a permutation of 0..N-1 until refinement begins;
    N + c is the mean of component c. No code is stored: each is a function of (seed, id)."""

    Config = MMDCConfig
    recipes = ("mmdc_center", "mmdc", "mmdc_rotation")
    needs = ("images",)
    publishes = ("backbone", "model", "clusters")

    @classmethod
    def recipes_for(cls, config: MMDCConfig) -> tuple[str, ...]:
        """Without rotation two views: weak (matched), strong (trained on)."""
        return cls.recipes if config.rotation else cls.recipes[:ROTATED]

    def __init__(self, config: MMDCConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        variance = config.sigma if config.sigma_meaning == "variance" else config.sigma**2
        self.codes = SphereCodes(
            inputs.num_images,
            config.num_clusters,
            config.code_dim or config.num_clusters,
            config.means,
            variance,
            inputs.seed,
        )
        self.network = CodeNetwork(
            convert_batch_norm(inputs.backbone, config.bn_groups),
            inputs.feature_dim,
            self.codes.dim,
        )
        self.rotation_head = small_linear(inputs.feature_dim, 4) if config.rotation else None
        self.target_id = MemoryBank(inputs.num_images, dtype=torch.int64)
        self.target_id.fill(torch.arange(inputs.num_images))
        self.history = (
            MemoryBank(
                inputs.num_images, (-(-inputs.epochs // self.epochs_a_round),), torch.int32, fill=-1
            )
            if config.track
            else None
        )
        self.kept: Tensor | None = None
        self.last_ids = torch.arange(
            inputs.num_images
        )  # the whole bank; on every rank after prepare_publish()

    @property
    def epochs_a_round(self) -> int:
        """One of codes, and one of rotations if there are any."""
        return 2 if self.config.rotation else 1

    def rotates(self, epoch: int) -> bool:
        """Whether this epoch is one of rotations."""
        return self.config.rotation and epoch % 2 == (0 if self.config.rotation_first else 1)

    def refines(self, epoch: int) -> bool:
        """Whether targets come from k-means in this epoch."""
        return self.config.refine_from is not None and epoch >= self.config.refine_from

    def epoch_views(self, epoch: int) -> tuple[int, ...]:
        """Four cuts to rotate, or weak and strong; the weak view is for matching only."""
        if self.rotates(epoch):
            return (ROTATED,) * 4
        return (STRONG,) if self.refines(epoch) else (WEAK, STRONG)

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        """At the start of a round of refinement: k-means on all outputs, its clusters numbered like the targets before."""
        if self.refines(epoch) and not (self.config.rotation and epoch % 2):
            outputs, k, n = (
                embed(self.network, WEAK),
                self.config.num_clusters,
                self.inputs.num_images,
            )
            found = kmeans(
                outputs,
                k,
                KMeansOptions(
                    iterations=300,
                    restarts=self.config.refine_restarts,
                    seed=self.inputs.seed + 1000 * epoch,
                ),
                stop=self.inputs.stop_requested,
                progress=current().rank == 0,
                checkpoint_path=self.inputs.work_dir and self.inputs.work_dir / "refinement.npz",
            )
            previous = self.codes.component(self.target_id.whole().numpy())
            self.target_id.fill(n + torch.from_numpy(relabel(found.assignment, previous, k)))
            if self.history is not None:
                self._track_table(outputs, epoch)
        return ()

    def _track_table(self, outputs: FeatureTable, epoch: int) -> None:
        for s, mine in self.history.shards.items():
            rows = np.arange(int(self.history.starts[s]), int(self.history.starts[s + 1]))
            mine[:, epoch // self.epochs_a_round] = self.nearest_mean(
                torch.from_numpy(outputs.rows(rows, 0))
            )

    def nearest_mean(self, outputs: Tensor) -> Tensor:
        """Which mean lies closest to each output [b, dim] of unit length: [b] int32, on the CPU."""
        return torch.from_numpy(
            (outputs.double().cpu().numpy() @ self.codes.means.T).argmax(1).astype(np.int32)
        )

    def forward(self, batch: Batch) -> Step:
        return self._rotation_step(batch) if self.rotates(batch.epoch) else self._code_step(batch)

    def _rotation_step(self, batch: Batch) -> Step:
        """Cross-entropy over 0, 90, 180, 270 degrees, counter-clockwise; each copy has a cut of its own."""
        images = torch.cat(
            [torch.rot90(view, turns, (2, 3)) for turns, view in enumerate(batch.views)]
        )
        turns = torch.arange(4, device=images.device).repeat_interleave(len(batch.index))
        logits = self.rotation_head(self.network.backbone(images))
        loss, accuracy = classification_loss(logits, turns)
        return Step(loss + _idle(self.network.head), {"rotation_accuracy": accuracy})

    def _code_step(self, batch: Batch) -> Step:
        """Mean squared error over batch and dimensions (the squared distance over dim) of the strong view's outputs to their targets."""
        ids, metrics, keep = self.target_id.read(batch.index), {}, {}
        if not self.refines(batch.epoch):
            outputs = self._weak_outputs(batch.views[0])
            matched = self._match(outputs, ids)
            moved = self.codes.component(ids.numpy()) != self.codes.component(matched.numpy())
            ids, metrics, keep = (
                matched,
                {"targets_moved": torch.tensor(moved.mean())},
                {"target_id": matched, "nearest": self.nearest_mean(outputs)},
            )
        outputs = self.network(batch.views[-1])
        loss = mmdc_loss(outputs, self._places(ids).to(outputs))
        return Step(loss + _idle(self.rotation_head), metrics, keep)

    @torch.no_grad()
    def _weak_outputs(self, weak: Tensor) -> Tensor:
        """[b, dim], in eval mode."""
        self.network.eval()
        outputs = self.network(weak)
        self.network.train()
        return outputs

    def _match(self, outputs: Tensor, ids: Tensor) -> Tensor:
        """This rank's new ids [b]: a permutation inside blocks of the global batch, by the outputs [b, dim] in eval mode."""
        start = len(ids) * current().rank
        everyone, outputs = gather_rows(ids), gather_rows(outputs)
        own = range(start, start + len(ids))
        order = match_blocks(
            outputs.double().cpu().numpy(),
            self.codes.codes(everyone.numpy()),
            self.config.matching_block,
            own,
        )
        return everyone[torch.from_numpy(order[own.start : own.stop])]

    def _places(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.codes.codes(ids.numpy()))

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        """Targets move for good once the update is made."""
        if step.keep:
            self.target_id.write(batch.index, step.keep["target_id"])
            if self.history is not None:
                self.history.write(
                    batch.index, step.keep["nearest"], batch.epoch // self.epochs_a_round
                )

    def memory_banks(self) -> dict[str, MemoryBank]:
        return {"target_id": self.target_id} | ({"history": self.history} if self.history else {})

    def parameter_groups(self) -> list[ParameterGroup]:
        """No weight decay on biases and batch norm, as released."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            ParameterGroup([p for p in parameters if p.ndim > 1]),
            ParameterGroup([p for p in parameters if p.ndim <= 1], weight_decay=0.0),
        ]

    def prepare_publish(self) -> None:
        self.last_ids = self.target_id.whole()
        self.kept = self.history.whole() if self.history is not None else None

    def publish(self, out: Path) -> None:
        """A cluster model whose largest logit is the nearest mean (the product with unit means; logits are not of unit length), the
        backbone, and the components of the last targets."""
        means = torch.from_numpy(self.codes.means).to(self.network.head.weight)
        head = nn.Linear(self.inputs.feature_dim, self.config.num_clusters).to(means)
        with torch.no_grad():
            head.weight.copy_(means @ self.network.head.weight)
            head.bias.copy_(means @ self.network.head.bias)
        norm = FeatureNorm("none", self.inputs.feature_dim)
        save_cluster_model(
            out, ClusterModel(self.network.backbone, norm, head, self.inputs.backbone_config)
        )
        save_backbone(out, self.network.backbone, self.inputs.backbone_config)
        Assignments(self.codes.component(self.last_ids.numpy()), self.config.num_clusters).save(out)
        if self.kept is not None:
            epochs = np.arange(self.kept.shape[1]) * self.epochs_a_round + int(
                self.config.rotation_first
            )
            save_history(out, epochs, self.kept.numpy())


def small_linear(in_dim: int, out_dim: int) -> nn.Linear:
    """Weights N(0, 0.01), bias 0, as released."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _idle(head: nn.Module | None) -> Tensor | float:
    """Zero with a gradient: DDP wants one of every parameter. So momentum and weight decay move the other task's head too, as released
    (zeroed gradients, not none)."""
    return 0.0 if head is None else 0.0 * sum(p.sum() for p in head.parameters())
