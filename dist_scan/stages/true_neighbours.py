"""Diagnostic, needs labels: a neighbour table with its false neighbours removed, the upper bound of SCAN's ablation (SCAN paper, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from dist_scan.config.stage import Images, Ref, StageConfig
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import barrier


class TrueNeighboursConfig(StageConfig):
    """Never part of a result without labels: what stands on it knows them."""

    kind: Literal["true_neighbours"] = "true_neighbours"
    images: Images = "train"
    neighbours: Ref
    num_shards: int = Field(default=16, ge=1)

    def publishes(self) -> tuple[str, ...]:
        return ("neighbours",)

    def check(self, name: str, earlier: Mapping[str, StageConfig | None]) -> None:
        """The table is of these images."""
        split = earlier[self.neighbours].images_split(earlier)
        if split not in (None, self.images):
            raise ValueError(
                f"stages.{name}.images: '{self.images}', but '{self.neighbours}' holds neighbours of {split}; set images: {split}"
            )


class TrueNeighboursStage(Stage):
    """Writes a neighbour table of the same width."""

    Config = TrueNeighboursConfig

    def run(self) -> None:
        """Rank 0 works. Raises ValueError when nothing has a label."""
        from dist_scan.data.beton.format import read_labels
        from dist_scan.data.neighbour_table import NeighbourTable
        from dist_scan.stages.beton import beton_path

        c = self.context
        if c.world.rank == 0:
            labels = read_labels(beton_path(c.inputs["images"]))
            if not (labels >= 0).any():
                raise ValueError(
                    f"stages.{c.name}: no image of '{self.config.images}' has a label; this diagnostic needs them, take the stage out"
                )
            table = NeighbourTable.open(c.inputs["neighbours"])
            out = NeighbourTable.create(
                c.out,
                table.num_rows,
                table.num_neighbours,
                self.config.num_shards,
                diagnostic="false neighbours removed",
            )
            for shard in range(out.num_shards):
                rows = np.arange(*out.shard_range(shard))
                out.write_shard(shard, *only_true(rows, *table.rows(rows), labels))
        barrier()


def only_true(
    rows: np.ndarray, ids: np.ndarray, scores: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ids and scores [n, K] of `rows` [n] in which the neighbours of the row's own label come again and again, nearest first, so that a
    uniform draw over columns is one over them (to one column's share). A row with no such neighbour has itself, with score 1."""
    true = (labels[ids] == labels[rows][:, None]) & (labels[rows] >= 0)[:, None]
    first, count = np.argsort(~true, axis=1, kind="stable"), true.sum(1)
    columns = np.take_along_axis(
        first, np.arange(ids.shape[1])[None] % np.maximum(count, 1)[:, None], axis=1
    )
    none = (count == 0)[:, None]
    return (
        np.where(none, rows[:, None], np.take_along_axis(ids, columns, axis=1)),
        np.where(none, 1.0, np.take_along_axis(scores, columns, axis=1)),
    )
