"""A neighbour table without false neighbours: the upper bound in SCAN's ablation (Sec. 3.2).

A diagnostic that uses labels; never use it for unsupervised results.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from dist_scan.config.stage import Images, Ref, StageConfig, Stages
from dist_scan.data.beton.format import read_labels
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import on_rank_0


class TrueNeighboursConfig(StageConfig):
    """Settings of a table of neighbours that have the image's label."""

    kind: Literal["true_neighbours"] = "true_neighbours"
    images: Images = "train"
    neighbours: Ref
    num_shards: int = Field(default=16, ge=1)

    def publishes(self) -> tuple[str, ...]:
        """A neighbour table."""
        return ("neighbours",)

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless the neighbours were searched in these images."""
        source = earlier[self.neighbours]
        split = None if source is None else source.images_split(earlier)
        if split not in (None, self.images):
            raise ValueError(
                f"stages.{name}.images: '{self.images}', but '{self.neighbours}' has neighbours of "
                f"{split}; set images: {split}"
            )


class TrueNeighboursStage(Stage[TrueNeighboursConfig]):
    """Writes a neighbour table of the same width."""

    Config = TrueNeighboursConfig

    def run(self) -> None:
        """Rank 0 writes the table. Raises ValueError if no image has a label."""
        on_rank_0(self._write)

    def _write(self) -> None:
        context, config = self.context, self.config
        labels = read_labels(context.beton())
        if not (labels >= 0).any():
            raise ValueError(
                f"stages.{context.name}: no image of '{config.images}' has a label; this "
                "diagnostic needs labels, remove the stage"
            )
        source = NeighbourTable.open(context.inputs["neighbours"])
        table = NeighbourTable.create(
            context.out,
            source.shape,
            config.num_shards,
            diagnostic="false neighbours removed",
        )
        for shard in range(table.num_shards):
            rows = np.arange(*table.shard_range(shard))
            table.write_shard(shard, *keep_true(rows, *source.rows(rows), labels))


def keep_true(
    rows: np.ndarray, ids: np.ndarray, scores: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ids and scores [n, K] of the neighbours of `rows` [n] that have the row's label.

    They are repeated in order to fill the K columns, so that a uniform draw of a column draws each
    of them equally often (up to the last, incomplete repetition). A row without such neighbours has
    itself, with score 1. labels [N]: -1 is no label.
    """
    row_labels = labels[rows][:, None]
    is_true = (labels[ids] == row_labels) & (row_labels >= 0)
    num_true = is_true.sum(1, keepdims=True)
    # Columns of the true neighbours first, in their order; then the same columns repeated.
    true_first = np.argsort(~is_true, axis=1, kind="stable")
    repeated = np.arange(ids.shape[1])[None] % np.maximum(num_true, 1)
    columns = np.take_along_axis(true_first, repeated, axis=1)
    return (
        np.where(num_true == 0, rows[:, None], np.take_along_axis(ids, columns, axis=1)),
        np.where(num_true == 0, 1.0, np.take_along_axis(scores, columns, axis=1)),
    )
