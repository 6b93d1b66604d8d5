"""All heads of a heads stage on cached features: their consensus as an assignment, and every head's own for the per-head table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_scan.config.stage import Ref, StageConfig
from dist_scan.data.assignments import Assignments
from dist_scan.data.feature_table import FeatureTable
from dist_scan.heads.selection import PublishedHeads
from dist_scan.models.cluster_model import load_cluster_model
from dist_scan.stages.base import Stage
from dist_scan.storage.arrays import write_npz
from dist_scan.world.collectives import barrier, gather_rows

TOP = 5


class ConsensusConfig(StageConfig):
    """A subject of evaluation beside the chosen head's (an assign stage)."""

    kind: Literal["consensus"] = "consensus"
    model: Ref
    """A stage that trained heads (scan, temi) on a frozen backbone and chose among them by held-out rows."""
    features: Ref
    """View 0 of this embed stage, made by the same backbone."""
    num_clusters: int | None = Field(default=None, ge=2)
    """Which, when the heads have several numbers of clusters; left out, the first."""
    head: int | None = Field(default=None, ge=0)
    """One head by its number in the report's table, in place of the consensus."""
    batch: int = Field(default=4096, ge=1)

    def publishes(self) -> tuple[str, ...]:
        return ("clusters",)

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """The number of clusters and the head are there."""
        method = getattr(earlier.get(self.model), "method", None)
        numbers, count = getattr(method, "num_clusters", None), getattr(method, "num_heads", None)
        if numbers is None or count is None:
            raise ValueError(
                f"stages.{name}.model: '{self.model}' trains no heads; name a stage whose method is scan or temi"
            )
        if getattr(earlier[self.model], "images", None) is not None and getattr(
            method, "train_backbone", False
        ):
            raise ValueError(
                f"stages.{name}.model: '{self.model}' trains its network too, so cached features are not its own; use an assign stage"
            )
        numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        if self.num_clusters is not None and self.num_clusters not in numbers:
            raise ValueError(
                f"stages.{name}.num_clusters: {self.num_clusters}; allowed: {', '.join(map(str, numbers))}"
            )
        if self.head is not None and self.head >= count * len(numbers):
            raise ValueError(
                f"stages.{name}.head: {self.head}; allowed: 0 to {count * len(numbers) - 1}"
            )


class ConsensusStage(Stage):
    """Writes assignments.npz and heads.npz (`cluster` [H, N] int32, `sizes` [H])."""

    Config = ConsensusConfig

    @torch.inference_mode()
    def run(self) -> None:
        """Each rank takes a contiguous run of whole batches (so any number of ranks gives the same bits); rank 0 writes."""
        c, config = self.context, self.config
        heads = PublishedHeads(c.inputs["model"], c.world.device)
        number = (
            heads.sizes[config.head]
            if config.head is not None
            else config.num_clusters or heads.sizes[0]
        )
        width, every, probability, top = min(TOP, number), [], [], []
        for features in self._features():
            logits = [heads.logits(h, features) for h in range(len(heads.sizes))]
            every.append(torch.stack([x.argmax(1) for x in logits], 1).cpu())
            mean = (
                heads.consensus(number, features)
                if config.head is None
                else logits[config.head].softmax(1)
            )
            values, order = mean.topk(width, 1)
            probability.append(values.cpu())
            top.append(order.cpu())
        every, top = _all(every, len(heads.sizes), torch.int64), _all(top, width, torch.int64)
        probability = _all(probability, width, torch.float32)
        if c.world.rank == 0:
            Assignments(top[:, 0].numpy(), number, probability[:, 0].numpy(), top.numpy()).save(
                c.out
            )
            parts = {"cluster": every.T.numpy().astype(np.int32), "sizes": np.array(heads.sizes)}
            write_npz(c.out / "heads.npz", parts)
        barrier()

    def _features(self) -> Iterator[Tensor]:
        """Of this rank's rows, as the heads see them."""
        c, table = self.context, FeatureTable.open(self.context.inputs["features"])
        norm = load_cluster_model(c.inputs["model"]).norm.to(c.world.device)
        starts = np.array_split(
            np.arange(0, table.num_rows, self.config.batch), c.world.world_size
        )[c.world.rank]
        for start in starts:
            rows = np.arange(start, min(start + self.config.batch, table.num_rows))
            yield norm(torch.from_numpy(table.rows(rows, 0)).to(c.world.device).float())


def _all(parts: list[Tensor], width: int, kind: torch.dtype) -> Tensor:
    return gather_rows(torch.cat(parts) if parts else torch.empty(0, width, dtype=kind))
