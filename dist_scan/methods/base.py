"""Base class of all methods: a loss over (views, targets), and hooks that update the targets.

A method is one file ``dist_scan/methods/<kind>.py`` with one class that has a ``Config``. A config
selects it by ``method: {kind: <kind>}``; there is no list to edit, and the engine knows a method
only through the hooks below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from dist_scan import methods
from dist_scan.config.kinds import Kind, KindConfig, kind_class
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.data.feature_table import FeatureTable
from dist_scan.heads.partition import HeadPartition
from dist_scan.models.backbone import BackboneConfig, save_backbone
from dist_scan.models.batch_norm import check_groups, convert_batch_norm
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.world.sharding import RowSharding


class MethodConfig(KindConfig):
    """Settings of a method."""

    def partitionable_heads(self) -> tuple[int, ...]:
        """Clusters of each head, if heads or their clusters may be split over ranks; else ()."""
        return ()

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Raise ValueError if the method cannot train on such batches over so many ranks."""


class NetworkConfig(MethodConfig):
    """Settings of a method that trains a network with batch norm."""

    bn_groups: int = Field(default=1, ge=1)
    """Number of parts of the global batch that batch norm normalises separately; 1: the whole batch
    together, on any number of ranks. One of bn_groups and the number of ranks divides the other."""

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Raise ValueError unless groups, ranks and batch divide one another."""
        check_groups(self.bn_groups, world_size, global_batch)


class StepResult(NamedTuple):
    """What ``Method.forward`` returns for one optimizer step."""

    loss: Tensor
    metrics: dict[str, Tensor] = {}
    """Scalars to log; the training loop averages them over ranks."""
    for_end_step: dict[str, Tensor] = {}
    """Detached tensors that ``end_step`` needs, such as keys to enqueue."""
    skip: bool = False
    """Make no update in this step. Equal on all ranks; skipped steps are counted."""


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike. None means: the optimizer's own setting."""

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    """Factor on the learning rate of the schedule."""
    weight_decay: float | None = None
    sgd_momentum: float | None = None


@dataclass(frozen=True)
class MethodInputs:
    """What a stage passes to the constructor of a method."""

    num_images: int
    global_batch: int
    seed: int
    on_features: bool = False
    """Views are rows of a feature table, not images."""
    feature_dim: int = 0
    """Width of the backbone's features, or of the table's rows."""
    backbone: nn.Module | None = None
    """Fresh or loaded. With on_features: the network that made the features, only published."""
    backbone_config: BackboneConfig | None = None
    """Configuration of the backbone; published with it so that it can be rebuilt."""
    feature_mean: np.ndarray | None = None
    """Mean [D] of the table's features, with on_features."""
    feature_std: np.ndarray | None = None
    """Standard deviation [D] of the table's features, with on_features."""
    input_folders: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the artifacts that the stage refers to, by role (``model``: a cluster model)."""
    epochs: int = 0
    work_dir: Path | None = None
    """Folder for temporary tables of ``begin_epoch``, the same on all ranks; it need not exist."""
    head_partition: HeadPartition = "batch"
    """What ranks divide among them: the batch or, on features, the heads or the clusters of each
    head. In the last two cases every rank reads the whole global batch."""
    stop_requested: Callable[[], bool] = lambda: False
    """True once this process was asked to stop; long searches poll it and raise StopRequested."""

    def network(self, config: NetworkConfig) -> nn.Module:
        """The backbone, its batch norm over ``config.bn_groups`` parts of the global batch."""
        assert self.backbone is not None, "a stage that gives images gives a backbone"
        return convert_batch_norm(self.backbone, config.bn_groups)


class Embed(Protocol):
    """Computes features of all images with a network of width ``network.num_features``.

    Collective. ``recipe`` is the name of a recipe, or the index of one of the stage's own recipes.
    Leaves the network in eval mode.
    """

    def __call__(self, network: nn.Module, recipe: str | int = "center") -> FeatureTable: ...


class Method(nn.Module, Kind, ABC):
    """A trainable method. All its state is in parameters, buffers and memory banks.

    Buffers are equal on all ranks; memory banks hold a row per image, sharded over ranks. No state
    may be created after the constructor, or a resumed run would miss it.
    """

    Config: ClassVar[type[MethodConfig]]
    recipes: ClassVar[tuple[str, ...]]
    """Name of the augmentation recipe of each view; ``recipes:`` of the stage overrides it."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the stage must give: "images" (not cached features), "model" (a cluster model)."""
    uses_neighbours: ClassVar[bool] = False
    """The last view shows a random neighbour of the image instead of the image itself."""
    publishes: ClassVar[tuple[str, ...]] = ("backbone",)
    """What other stages may read from the folder that ``publish`` fills: "backbone", "model" (a
    cluster model), "clusters" (assignments of the training images)."""
    sharded_state: Mapping[str, RowSharding] = MappingProxyType({})
    """Parameters and buffers, by name in the state dict, of which each rank holds only some rows.
    If there are any, gradients are not averaged: each rank has the whole global batch, and the
    gradient of its loss is that of the global loss."""

    config: MethodConfig
    memory_banks: dict[str, MemoryBank]
    """Memory banks by name, for checkpoints. The constructor of a method with a bank registers it:
    ``self.memory_banks[name] = bank``. The number of ranks may change between save and load."""

    def __init__(self, config: MethodConfig, inputs: MethodInputs) -> None:
        super().__init__()
        self.config = config
        self.inputs = inputs
        self.memory_banks = {}

    @classmethod
    def recipes_for(cls, config: MethodConfig) -> tuple[str, ...]:
        """Recipe names of a method whose number of views depends on its settings."""
        return cls.recipes

    def epoch_views(self, epoch: int) -> tuple[int, ...] | None:
        """Recipe index of each view in this epoch; None: every recipe once.

        An index may occur several times. Recipes that do not occur are not decoded.
        """
        return None

    @abstractmethod
    def forward(self, batch: Batch) -> StepResult:
        """Loss of this rank's part of the batch.

        Whatever concerns the global batch (entropy, negatives, counts) uses collectives. The mean
        of the ranks' losses is the global loss.
        """

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        """Update the targets from the whole data set before an epoch. Collective.

        Returns the parameters that were re-initialised: the optimizer drops their state, and a
        checkpoint is written, so a run that resumes inside the epoch does not call this again.
        StopRequested may be raised only before any state has changed.
        """
        return ()

    def load_targets(self) -> None:
        """Read what ``forward`` needs from memory banks. Collective.

        Called after ``begin_epoch``, and also when a run resumes inside an epoch.
        """

    def epoch_rows(self, epoch: int, rows: np.ndarray) -> np.ndarray | None:
        """Image rows [n] that the epoch visits, in order, out of ``rows`` [n]. Collective.

        None: every row once, shuffled. Called after ``load_targets``; must depend on saved state
        only, and be equal on all ranks.
        """
        return None

    def end_step(self, batch: Batch, step: StepResult) -> None:
        """Update moving averages, queues and memory banks after the optimizer's update.

        Called without gradients, as ``end_epoch`` is.
        """

    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        """Select by held-out rows after an epoch; returns what to log, equal on all ranks.

        Collective.
        """
        return {}

    def early_stop_reason(self) -> str:
        """Why training should end after this epoch (a plateau, say), or "". Equal on all ranks."""
        return ""

    def warning(self) -> str:
        """Warning about the epoch that ended, with a remedy, or "". Equal on all ranks."""
        return ""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Parameters for the optimizer."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def prepare_publish(self) -> None:
        """Gather what ``publish`` writes. Collective; called just before it."""

    @abstractmethod
    def publish(self, out: Path) -> None:
        """Write the results into the folder ``out``. Called on rank 0 only."""


class NetworkMethod(Method):
    """A method that trains the stage's backbone and publishes it, with its projector if any."""

    needs = ("images",)
    config: NetworkConfig
    backbone: nn.Module
    projector: nn.Module | None

    def __init__(self, config: NetworkConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.backbone = inputs.network(config)
        self.projector = None

    def publish(self, out: Path) -> None:
        assert self.inputs.backbone_config is not None
        save_backbone(out, self.backbone, self.inputs.backbone_config, self.projector)


def method_class(kind: str) -> type[Method]:
    """The class in ``dist_scan/methods/<kind>.py``. Raises ConfigError if there is none."""
    cls = kind_class(methods, kind)
    assert issubclass(cls, Method)
    return cls
