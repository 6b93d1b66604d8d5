"""A table on disk with the nearest neighbours of every image."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_scan.data.sharded_table import ShardedTable
from dist_scan.storage.atomic import write_atomic


class NeighbourTable(ShardedTable):
    """K nearest other images of each image: ids [N, K] int64 and scores [N, K] float64.

    A row is sorted by (score descending, id ascending).
    """

    kind = "neighbours"
    dtypes = {"ids": "int64", "scores": "float64"}
    dims = ("num_rows", "num_neighbours")

    def __init__(self, path: str | Path, metadata: dict[str, Any]) -> None:
        super().__init__(path, metadata)
        self.num_neighbours = self.shape[1]

    def write_shard(self, shard: int, ids: np.ndarray, scores: np.ndarray) -> None:
        """ids and scores [n, K]."""
        self._write(shard, ids=ids, scores=scores)

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scores) [n, K] of the rows `index` [n]."""
        ids = np.empty((len(index), self.num_neighbours), np.int64)
        scores = np.empty((len(index), self.num_neighbours), np.float64)
        for positions, shard, inner in self._locate(index):
            shard_ids, shard_scores = self.shard_arrays(shard)
            ids[positions] = shard_ids[inner]
            scores[positions] = shard_scores[inner]
        return ids, scores

    def merge(self) -> None:
        """Write all rows to ids.npy [N, K] and scores.npy [N, K] in the folder, shard by shard."""
        for place, name in enumerate(self.dtypes):
            write_atomic(self.path / f"{name}.npy", partial(self._write_merged, place, name))

    def _write_merged(self, place: int, name: str, file: BinaryIO) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(self.dtypes[name])),
            "fortran_order": False,
            "shape": self.shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(self.num_shards):
            file.write(np.ascontiguousarray(self.shard_arrays(shard)[place]).data)
