"""The one abstraction: a method is a loss over (views, targets) plus a rule that renews the targets.

A method is one file `dist_scan/methods/<kind>.py` with one class that has a `Config`; the engine finds it by its name and
knows nothing else about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dist_scan import methods
from dist_scan.config.kinds import Kind, KindConfig, kind_class
from dist_scan.data.batch import Batch, HeldOut
from dist_scan.heads.partition import HeadPartition
from dist_scan.models.batch_norm import check_groups
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.world.sharding import RowSharding


class MethodConfig(KindConfig):
    """Settings of a method; `kind` is the name of its file, and a method says so: kind: Literal["mine"] = "mine"."""

    def partitionable_heads(self) -> tuple[int, ...]:
        """Clusters of each head, where heads or their clusters may be split over ranks (heads/partition.py); else ()."""
        return ()

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Raise ValueError when the method cannot train on batches of global_batch images over so many ranks (before any work)."""


class NetworkConfig(MethodConfig):
    """Settings of a method that trains a network with batch norm."""

    bn_groups: int = Field(default=1, ge=1)
    """Batch norm sees the global batch in so many parts; 1: whole, on any number of ranks. Ranks and parts: one divides the other."""

    def check_batch(self, global_batch: int, world_size: int) -> None:
        """Batch norm's groups, the ranks and the batch must fit."""
        check_groups(self.bn_groups, world_size, global_batch)


class Step(NamedTuple):
    """What forward returns. `skip` (equal on all ranks): no update this step; it is counted."""

    loss: Tensor
    metrics: dict[str, Tensor] = {}
    """Scalars; the loop averages them over ranks."""
    keep: dict[str, Tensor] = {}
    """For end_step (keys to enqueue, predictions to remember); detached."""
    skip: bool = False


class ParameterGroup(NamedTuple):
    """Parameters with a learning rate of lr_scale times the schedule's; weight_decay None means the optimizer's."""

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    momentum: float | None = None
    """sgd's; None means the optimizer's."""


@dataclass(frozen=True)
class MethodInputs:
    """What a stage hands to a method when it is made."""

    num_images: int
    global_batch: int
    seed: int
    on_features: bool = False
    """Views are rows of a feature table, not images."""
    feature_dim: int = 0
    """Width of the backbone's features (or of the table's rows)."""
    backbone: nn.Module | None = None
    """Fresh or loaded, as the stage says; with on_features it is what made the features and is only published."""
    backbone_config: Any = None
    """Its models.backbone.BackboneConfig, so that a publication can be loaded again."""
    feature_mean: np.ndarray | None = None
    """Mean [D] of the table's features, when on_features."""
    feature_std: np.ndarray | None = None
    """Standard deviation [D] of the table's features, when on_features."""
    input_folders: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the artifacts that the stage refers to, by role (`model`: a published cluster model)."""
    epochs: int = 0
    work_dir: Path | None = None
    """Where tables of a whole-set moment lie while it lasts (the same on all ranks; not there until someone makes it)."""
    head_partition: HeadPartition = "batch"
    """What ranks share: the batch, or (on features) the heads or their clusters, and then each rank has the whole batch."""
    stop_requested: Callable[[], bool] = lambda: False
    """Whether someone asked this process to leave: long searches ask it and raise Stopped."""


Embed = Callable[..., Any]
"""embed(network, recipe='center') -> FeatureTable of the whole set, made by all ranks (collective); `network.num_features` wide.
recipe: a name, or the number of one of the stage's own recipes. Leaves the network in eval mode."""


class Method(nn.Module, Kind, ABC):
    """Everything remembered is a buffer (equal on all ranks) or a bank; no state appears later."""

    Config: ClassVar[type[MethodConfig]]
    recipes: ClassVar[tuple[str, ...]]
    """One augmentation recipe per view, by name; the stage's `recipes:` overrides them."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What its stage must give: images (cached features will not do), model (it starts from a published cluster model)."""
    uses_neighbours: ClassVar[bool] = False
    """The last view is of a random neighbour of the row instead of the row itself."""
    publishes: ClassVar[tuple[str, ...]] = ("backbone",)
    """What other stages may take from publish()'s folder: backbone, model (a cluster model), clusters (of the training images)."""

    sharded_state: Mapping[str, RowSharding] = MappingProxyType({})
    """Parameters and buffers of which each rank has only its rows, by state-dict name. When there are any, no gradient is averaged:
    each rank has the whole global batch, and the gradient of its loss is that of the global loss."""

    def __init__(self, config: MethodConfig, inputs: MethodInputs) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs

    @classmethod
    def recipes_for(cls, config: MethodConfig) -> tuple[str, ...]:
        """The recipes of a method whose number of views is a setting; else `recipes`."""
        return cls.recipes

    def epoch_views(self, epoch: int) -> tuple[int, ...] | None:
        """Which recipes make the views of this epoch, by number, also one several times; None: each once. Others are not decoded."""
        return None

    @abstractmethod
    def forward(self, batch: Batch) -> Step:
        """The loss of this rank's part; what is global (entropy, negatives, counts) goes through collectives."""

    def begin_epoch(self, epoch: int, embed: Embed) -> Sequence[nn.Parameter]:
        """Before an epoch; collective. Returns the parameters it re-initialised (their optimizer state is dropped, and a checkpoint
        is written: a run resumed inside the epoch does not repeat this). Raises Stopped only before it has changed anything."""
        return ()

    def epoch_rows(self, epoch: int, rows: np.ndarray) -> np.ndarray | None:
        """The rows [n] that an epoch visits, in order, drawn from `rows` [n]; None: each once, shuffled. Collective; asked after
        begin_epoch and again after a resume: a function of what is remembered, the same on all ranks."""
        return None

    @torch.no_grad()
    def end_step(self, batch: Batch, step: Step) -> None:
        """After the optimizer's update: EMA, queue, bank rows."""

    @torch.no_grad()
    def end_epoch(self, epoch: int, held_out: HeldOut | None) -> dict[str, float]:
        """After an epoch; collective. Choosing by held-out rows; returns what to log (equal on all ranks)."""
        return {}

    def early_stop_reason(self) -> str:
        """A reason to end training before the last epoch (a plateau), or ''. Asked after end_epoch; equal on all ranks."""
        return ""

    def warning(self) -> str:
        """What a person must hear of the epoch that ended (a collapse, with the remedy), or ''. Asked after end_epoch; equal on all ranks."""
        return ""

    def memory_banks(self) -> Mapping[str, MemoryBank]:
        """Rows per image, sharded over ranks; saved by shard and re-dealt when the number of ranks changes."""
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the optimizer updates."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def prepare_publish(self) -> None:
        """Just before publish; collective: bring what it writes to rank 0."""

    @abstractmethod
    def publish(self, out: Path) -> None:
        """Write what the stage hands on into `out` (called on rank 0 only)."""


def method_class(kind: str) -> type[Method]:
    """The method in dist_scan/methods/<kind>.py. Raises ConfigError if there is none."""
    cls = kind_class(methods, kind)
    assert issubclass(cls, Method)
    return cls
