"""Nearest neighbours of images on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.data.sharded_table import ShardedTable
from dist_scan.storage.atomic import write_atomic


class NeighbourTable(ShardedTable):
    """K nearest others of each image: ids [N, K] int64 and scores [N, K] float64, by (score descending, id ascending)."""

    parts, kind, types = ("ids", "scores"), "neighbours", {"ids": "int64", "scores": "float64"}
    counts = ("num_rows", "num_shards", "num_neighbours")

    def _row_shape(self) -> tuple[int, ...]:
        return (self.num_neighbours,)

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        super().__init__(path, facts)
        self.num_neighbours = int(facts["num_neighbours"])

    @classmethod
    def create(
        cls, path: Path, num_rows: int, num_neighbours: int, num_shards: int, **how: Any
    ) -> NeighbourTable:
        """An empty table in a folder; `how` it is mined is kept with it."""
        return cls._create(
            path,
            {
                "num_rows": num_rows,
                "num_neighbours": num_neighbours,
                "num_shards": num_shards,
                **how,
            },
        )

    def write_shard(self, shard: int, ids: np.ndarray, scores: np.ndarray) -> None:
        """ids and scores [n, K]."""
        self._write(shard, ids=ids.astype(np.int64), scores=scores.astype(np.float64))

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scores) [n, K]."""
        ids = np.empty((len(index), self.num_neighbours), np.int64)
        scores = np.empty((len(index), self.num_neighbours), np.float64)
        for at, (i, s) in self._gather(
            index, lambda arrays, inner, mask: (arrays[0][inner], arrays[1][inner])
        ):
            ids[at], scores[at] = i, s
        return ids, scores

    def merge(self) -> None:
        """Write all rows into ids.npy [N, K] and scores.npy [N, K] beside the shards, a shard at a time."""
        for place, part in enumerate(self.parts):

            def write(file, place=place, part=part) -> None:
                facts = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(self.types[part])),
                    "fortran_order": False,
                    "shape": (self.num_rows, self.num_neighbours),
                }
                np.lib.format.write_array_header_1_0(file, facts)
                for s in range(self.num_shards):
                    file.write(np.ascontiguousarray(self._shards(s)[place]))

            write_atomic(self.path / f"{part}.npy", write)
