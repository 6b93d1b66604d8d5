"""Features of images on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.data.sharded_table import ShardedTable, load_npy, read_json_object
from dist_scan.storage.atomic import write_json

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).tiny)  # below it float16 has fewer digits


class FeatureTable(ShardedTable):
    """V cached views of D features per image, float16."""

    parts, kind, types = ("features",), "features", {"features": "float16"}
    counts = ("num_rows", "num_shards", "num_views", "dim")

    def _row_shape(self) -> tuple[int, ...]:
        return self.num_views, self.dim

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        super().__init__(path, facts)
        self.num_views, self.dim = int(facts["num_views"]), int(facts["dim"])

    @classmethod
    def create(
        cls, path: Path, num_rows: int, num_views: int, dim: int, num_shards: int, **how: Any
    ) -> FeatureTable:
        """An empty table in a folder; the number of shards is lowered to the number of rows. `how` it is made is kept with it."""
        return cls._create(
            path,
            {
                "num_rows": num_rows,
                "num_views": num_views,
                "dim": dim,
                "num_shards": num_shards,
                **how,
            },
        )

    @classmethod
    def from_npy(
        cls, npy: str | Path, path: Path, num_shards: int, keep: bool = False
    ) -> FeatureTable:
        """A table from a .npy of [N, D] or [N, V, D]; `keep` the shards that are there. Raises ValueError on another shape or kind of numbers."""
        array = cls._mapped(npy)
        table = cls.create(path, len(array), array.shape[1], array.shape[2], num_shards)
        for shard in table.missing_shards() if keep else range(table.num_shards):
            start, stop = table.shard_range(shard)
            rows = np.asarray(array[start:stop])
            largest = np.abs(rows).max(2)
            small = np.flatnonzero(((largest > 0) & (largest < SMALLEST)).any(1)) + start
            if len(small):
                raise ValueError(
                    f"'{npy}': every number of rows {small[:8].tolist()} is smaller than float16 keeps in full ({SMALLEST:.2g}); scale them up"
                )
            table.write_shard(shard, rows)
        return table

    @staticmethod
    def _mapped(npy: str | Path) -> np.ndarray:
        """[N, V, D] of a .npy, memory-mapped. Raises ValueError when it is none."""
        if not Path(npy).is_file():
            raise ValueError(
                f"'{npy}' does not exist; give the folder of a feature table, or a .npy of [N, D]"
            )
        try:
            array = load_npy(npy)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"'{npy}' is no readable .npy file: {error}") from None
        if (
            array.ndim not in (2, 3)
            or not np.issubdtype(array.dtype, np.floating)
            or 0 in array.shape
        ):
            raise ValueError(
                f"'{npy}' holds {array.dtype} {array.shape}; allowed: floating point [N, D] or [N, V, D], not empty"
            )
        return array[:, None] if array.ndim == 2 else array

    @classmethod
    def num_rows_and_views(cls, source: str | Path) -> tuple[int, int]:
        """(rows, views) of what `given` would give, before anything is converted. Raises ValueError when there is neither table nor .npy."""
        if Path(source).is_dir():
            table = cls.open(source)
            return table.num_rows, table.num_views
        return cls._mapped(source).shape[:2]

    @classmethod
    def open_or_convert(cls, source: str | Path, folder: Path, num_shards: int) -> FeatureTable:
        """The table in the folder `source`, or of the .npy `source`: that is converted into `folder`, once. Collective.

        Raises ValueError on all ranks when there is neither, when the .npy does not fit, or when `folder` was made from another file
        or into another number of shards.
        """
        from dist_scan.world.collectives import on_every_rank
        from dist_scan.world.world import current

        table = Path(source).is_dir()
        if not table:
            on_every_rank(
                lambda: (
                    cls._convert(Path(source), Path(folder), num_shards)
                    if current().rank == 0
                    else None
                )
            )
        return on_every_rank(lambda: cls.open(source if table else folder))

    @classmethod
    def _convert(cls, npy: Path, folder: Path, num_shards: int) -> None:
        """What it is made from is written first: without it a table that lies there is somebody else's."""
        cls._mapped(npy)
        facts = {
            "file": str(npy.resolve()),
            "size": npy.stat().st_size,
            "mtime_ns": npy.stat().st_mtime_ns,
            "shards": num_shards,
        }
        mark = folder / "source.json"
        if mark.is_file():
            if read_json_object(mark) != facts:
                raise ValueError(
                    f"{folder} was made from another file than '{npy}', from an earlier state of it, or into other than {num_shards} shards; "
                    "give another folder, or remove it"
                )
            if (folder / "table.json").is_file() and not cls.open(folder).missing_shards():
                return
        elif (folder / "table.json").exists():
            raise ValueError(
                f"{folder} holds a table that was not made from '{npy}'; give another folder, or that table itself as the features"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, facts)
        cls.from_npy(npy, folder, num_shards, keep=True)

    def write_shard(self, shard: int, rows: np.ndarray) -> None:
        """Rows [n, V, D]. Raises ValueError naming rows that are no numbers or do not fit float16."""
        if rows.shape[1:] != (self.num_views, self.dim):
            raise ValueError(
                f"{self.path}: rows are [{self.num_views}, {self.dim}], got {list(rows.shape[1:])}"
            )
        start = self.shard_range(shard)[0]
        flat = rows.reshape(len(rows), -1)
        bad = np.flatnonzero(~np.isfinite(flat).all(1))
        if len(bad):
            raise ValueError(
                f"features of rows {(bad[:8] + start).tolist()} ({len(bad)} in shard {shard}) are NaN or Inf; "
                "look at these images, or at what made the features"
            )
        large = np.flatnonzero(np.abs(flat).max(1, initial=0) > LARGEST)
        if len(large):
            raise ValueError(
                f"features of rows {(large[:8] + start).tolist()} are larger than float16 holds ({LARGEST:.0f}); scale them down"
            )
        self._write(shard, features=rows.astype(np.float16))

    def shard(self, shard: int) -> np.ndarray:
        """[n, V, D] float16, memory-mapped."""
        return self._shards(shard)[0]

    def rows(self, index: np.ndarray, view: int | np.ndarray = 0) -> np.ndarray:
        """[n, D] float16: one view of each row (a number for all, or one each)."""
        view = np.broadcast_to(np.asarray(view), len(index))
        out = np.empty((len(index), self.dim), np.float16)
        for at, values in self._gather(
            index, lambda arrays, inner, mask: arrays[0][inner, view[mask]]
        ):
            out[at] = values
        return out

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [D] float64 over rows and views; two passes, so nothing cancels. Collective: ranks share the reading,
        and add up in order of shards, so that every bit is the same for any number of them."""
        count = self.num_rows * self.num_views
        mean = self._over_shards(lambda rows: rows.sum(0, dtype=np.float64)) / count
        return mean, np.sqrt(self._over_shards(lambda rows: ((rows - mean) ** 2).sum(0)) / count)

    def _over_shards(self, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The sum of work([rows and views, D]) over all shards, each done by one rank."""
        from dist_scan.world.collectives import gather_objects
        from dist_scan.world.world import current

        mine = {
            s: work(self.shard(s).reshape(-1, self.dim))
            for s in range(current().rank, self.num_shards, current().world_size)
        }
        found = {s: value for part in gather_objects(mine) for s, value in part.items()}
        return sum(found[s] for s in range(self.num_shards))
