"""A table on disk with the features of every image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.data.sharded_table import (
    METADATA_FILE,
    ShardedTable,
    load_npy,
    read_json_object,
)
from dist_scan.storage.atomic import error_reason, write_json

# dist_scan.world imports torch. It is imported inside the collective methods, because commands read
# a table's size before they fork the ranks, and a process with torch's threads must not be forked.

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)  # below it float16 has fewer digits


class FeatureTable(ShardedTable):
    """V cached views of D features per image: [N, V, D] float16."""

    kind = "features"
    dtypes = {"features": "float16"}
    dims = ("num_rows", "num_views", "dim")

    def __init__(self, path: str | Path, metadata: dict[str, Any]) -> None:
        super().__init__(path, metadata)
        self.num_views, self.dim = self.shape[1:]

    @classmethod
    def from_npy(
        cls, npy: str | Path, path: str | Path, num_shards: int, resume: bool = False
    ) -> FeatureTable:
        """A table from a .npy of [N, D] or [N, V, D]; `resume` keeps the shards already written.

        Raises ValueError for another shape or dtype, or values that float16 cannot represent.
        """
        array = _open_npy(npy)
        table = cls.create(path, array.shape, num_shards)
        for shard in table.missing_shards() if resume else range(table.num_shards):
            start, stop = table.shard_range(shard)
            rows = np.asarray(array[start:stop])
            largest = np.abs(rows).max(2)
            is_tiny = ((largest > 0) & (largest < SMALLEST_NORMAL)).any(1)
            table._refuse_rows(
                shard,
                is_tiny,
                f"below float16's smallest normal number, {SMALLEST_NORMAL:.2g}; scale them up",
            )
            table.write_shard(shard, rows)
        return table

    @classmethod
    def num_rows_and_views(cls, source: str | Path) -> tuple[int, int]:
        """(N, V) of a table's folder, or of a .npy before it is converted.

        Raises ValueError if `source` is neither.
        """
        if Path(source).is_dir():
            table = cls.open(source)
            return table.num_rows, table.num_views
        num_rows, num_views, _ = _open_npy(source).shape
        return num_rows, num_views

    @classmethod
    def open_or_convert(
        cls, source: str | Path, folder: str | Path, num_shards: int
    ) -> FeatureTable:
        """The table in the folder `source`; a .npy `source` is converted once, into `folder`.

        Collective. Raises ValueError on all ranks if `source` is neither, if the .npy cannot be
        converted, or if `folder` has a table of another file or with another number of shards.
        """
        from dist_scan.world.collectives import on_every_rank
        from dist_scan.world.world import current

        if Path(source).is_dir():
            return on_every_rank(lambda: cls.open(source))

        def convert() -> None:
            if current().rank == 0:
                cls._convert(Path(source), Path(folder), num_shards)

        on_every_rank(convert)
        return on_every_rank(lambda: cls.open(folder))

    @classmethod
    def _convert(cls, npy: Path, folder: Path, num_shards: int) -> None:
        """Convert a .npy into `folder`, or complete an interrupted conversion of the same file."""
        _open_npy(npy)
        npy_identity = {
            "file": str(npy.resolve()),
            "size": npy.stat().st_size,
            "mtime_ns": npy.stat().st_mtime_ns,
            "shards": num_shards,
        }
        # The identity is written before the table: a table without one was made by something else.
        identity_file = folder / "source.json"
        table_file = folder / METADATA_FILE
        if identity_file.is_file():
            if read_json_object(identity_file) != npy_identity:
                raise ValueError(
                    f"{folder} was made from another file than '{npy}', from an earlier state of "
                    f"it, or with another number of shards than {num_shards}; give another folder, "
                    "or remove it"
                )
            if table_file.is_file() and not cls.open(folder).missing_shards():
                return
        elif table_file.exists():
            raise ValueError(
                f"{folder} has a table that was not made from '{npy}'; "
                "give another folder, or that table itself as the features"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(identity_file, npy_identity)
        cls.from_npy(npy, folder, num_shards, resume=True)

    def write_shard(self, shard: int, rows: np.ndarray) -> None:
        """Write rows [n, V, D]. Raises ValueError if some are not finite or overflow float16."""
        if rows.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{self.path}: rows are {list(self.shape[1:])}, got {list(rows.shape[1:])}"
            )
        flat = rows.reshape(len(rows), -1)
        remedy = "check these images and the network that made the features"
        self._refuse_rows(shard, ~np.isfinite(flat).all(1), f"NaN or Inf; {remedy}")
        self._refuse_rows(
            shard,
            np.abs(flat).max(1, initial=0) > LARGEST,
            f"larger than float16's largest number, {LARGEST:.0f}; scale them down",
        )
        self._write(shard, features=rows)

    def _refuse_rows(self, shard: int, is_invalid: np.ndarray, problem: str) -> None:
        """Raise ValueError if a row of the shard is invalid [n]; names the first ones."""
        invalid = np.flatnonzero(is_invalid)
        if len(invalid):
            rows = (invalid[:8] + self.shard_range(shard)[0]).tolist()
            raise ValueError(
                f"features of rows {rows} ({len(invalid)} in shard {shard}) are {problem}"
            )

    def shard(self, shard: int) -> np.ndarray:
        """[n, V, D] float16, memory-mapped."""
        return self.shard_arrays(shard)[0]

    def rows(self, index: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """[n, D] float16: one view of each row of `index` [n].

        view: one number for all rows, or one for each row [n].
        """
        view = np.broadcast_to(np.asarray(view), len(index))
        features = np.empty((len(index), self.dim), np.float16)
        for positions, shard, inner in self._locate(index):
            features[positions] = self.shard(shard)[inner, view[positions]]
        return features

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [D] float64 over rows and views, in two passes.

        Collective. Each shard is read by one rank, and sums are added in the order of the shards,
        so the result is the same to the bit for any number of ranks.
        """
        count = self.num_rows * self.num_views
        mean = self._sum_over_shards(lambda rows: rows.sum(0, dtype=np.float64)) / count
        variance = self._sum_over_shards(lambda rows: ((rows - mean) ** 2).sum(0)) / count
        return mean, np.sqrt(variance)

    def _sum_over_shards(self, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[D] float64: sum over all shards of reduce([n * V, D])."""
        from dist_scan.world.collectives import gather_objects
        from dist_scan.world.world import current

        local_shards = range(current().rank, self.num_shards, current().world_size)
        local_sums = {s: reduce(self.shard(s).reshape(-1, self.dim)) for s in local_shards}
        sums: dict[int, np.ndarray] = {}
        for sums_of_rank in gather_objects(local_sums):
            sums.update(sums_of_rank)
        total = np.zeros(self.dim)
        for shard in range(self.num_shards):
            total += sums[shard]
        return total


def _open_npy(npy: str | Path) -> np.ndarray:
    """[N, V, D] of a .npy, memory-mapped. Raises ValueError if it is not a .npy of features."""
    if not Path(npy).is_file():
        raise ValueError(
            f"'{npy}' does not exist; give the folder of a feature table, or a .npy of [N, D]"
        )
    try:
        array = load_npy(npy)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"'{npy}' is not a readable .npy file: {error_reason(error)}") from None
    is_float = np.issubdtype(array.dtype, np.floating)
    if array.ndim not in (2, 3) or not is_float or 0 in array.shape:
        raise ValueError(
            f"'{npy}' has {array.dtype} {array.shape}; "
            "allowed: floating point [N, D] or [N, V, D], not empty"
        )
    return array[:, None] if array.ndim == 2 else array
