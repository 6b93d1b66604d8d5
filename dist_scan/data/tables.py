"""Tables with a row per image, in a fixed number of contiguous shards: FeatureTable [N, V, D] and NeighbourTable [N, K].

A shard is a .npy file that is renamed in whole; rows of shard s are [s*N//S, (s+1)*N//S). Reading is by memory map.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dist_scan.storage.artifacts import write_atomic, write_json

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).tiny)  # below it float16 has fewer digits


def _facts(file: Path) -> dict[str, Any]:
    """A JSON object of a file. Raises ValueError naming a file that holds none."""
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); put it back, or remove its folder and make that again"
        ) from None
    if not isinstance(facts, dict):
        raise ValueError(
            f"{file} holds {type(facts).__name__} instead of an object; put it back, or remove its folder and make that again"
        )
    return facts


def _load(file: str | Path) -> np.ndarray:
    """A .npy, memory-mapped. Raises ValueError for an archive of several (.npz)."""
    array = np.load(file, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise ValueError(f"it is an archive of {array.files}: save one of them with numpy.save")
    return array


class ShardedTable(ABC):
    """What both kinds share: a folder with table.json and shards of one or more arrays."""

    parts: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]
    types: ClassVar[dict[str, str]]
    counts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _row_shape(self) -> tuple[int, ...]: ...

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = Path(path), facts
        self.num_rows, self.num_shards = int(facts["num_rows"]), int(facts["num_shards"])
        self._shards = cache(self._open_shard)

    @classmethod
    def _create(cls, path: Path, facts: dict[str, Any]) -> Any:
        if facts["num_rows"] < 1 or facts["num_shards"] < 1:
            raise ValueError(
                f"a table needs at least one row and one shard, got {facts['num_rows']} and {facts['num_shards']}"
            )
        facts["num_shards"] = min(facts["num_shards"], facts["num_rows"])
        Path(path).mkdir(parents=True, exist_ok=True)
        write_json(Path(path) / "table.json", {"kind": cls.kind, **facts})
        return cls(path, facts)

    @classmethod
    def open(cls, path: Path) -> Any:
        """The table in a folder. Raises ValueError when there is none, or one of another kind."""
        inside = (
            [] if (Path(path) / "table.json").is_file() else list(Path(path).glob("*/table.json"))
        )
        path = (
            inside[0].parent if len(inside) == 1 else path
        )  # a stage's folder, whose one table lies under its fingerprint
        file = Path(path) / "table.json"
        if not file.is_file():
            raise ValueError(
                f"{path} holds no {cls.kind} table (no table.json); give the folder of one, or a .npy"
            )
        facts = _facts(file)
        if facts.get("kind") != cls.kind:
            raise ValueError(f"{path} holds a table of {facts.get('kind')}, not of {cls.kind}")
        wrong = {
            name: facts.get(name)
            for name in cls.counts
            if type(facts.get(name)) is not int or facts[name] < 1
        }
        if wrong or facts["num_shards"] > facts["num_rows"]:
            raise ValueError(
                f"{file} is damaged: {wrong or {'num_shards': facts['num_shards'], 'num_rows': facts['num_rows']}}; "
                "allowed: whole numbers from 1 on, no more shards than rows. Put the file back, or make the table again"
            )
        table = cls(path, facts)
        for shard in set(range(table.num_shards)) - set(table.missing_shards()):
            table._shards(shard)  # headers and sizes, before any work stands on them
        return table

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and one past the last row of a shard."""
        return shard * self.num_rows // self.num_shards, (
            shard + 1
        ) * self.num_rows // self.num_shards

    def _file(self, shard: int, part: str) -> Path:
        return self.path / f"{part}-{shard:05d}.npy"

    def missing_shards(self) -> list[int]:
        """Shards that are not written yet; a half-written one is not there."""
        return [
            s
            for s in range(self.num_shards)
            if not all(self._file(s, p).is_file() for p in self.parts)
        ]

    def _write(self, shard: int, **arrays: np.ndarray) -> None:
        start, stop = self.shard_range(shard)
        for part, array in arrays.items():
            if len(array) != stop - start:
                raise ValueError(
                    f"shard {shard} of {self.path} has rows {start}..{stop - 1}, {len(array)} were given"
                )
            write_atomic(
                self._file(shard, part), lambda f, a=array: np.save(f, np.ascontiguousarray(a))
            )

    def _open_shard(self, shard: int) -> tuple[np.ndarray, ...]:
        start, stop = self.shard_range(shard)
        out = []
        for part in self.parts:
            file = self._file(shard, part)
            try:
                array = _load(file)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(
                    f"{file} is missing or cut ({error}); remove it and run the stage that makes it again"
                ) from None
            if array.shape != (stop - start, *self._row_shape()) or array.dtype != self.types[part]:
                raise ValueError(
                    f"{file} holds {array.dtype} {array.shape} instead of {self.types[part]} {(stop - start, *self._row_shape())}; "
                    "remove it and run the stage that makes it again"
                )
            out.append(array)
        return tuple(out)

    def _gather(self, index: np.ndarray, pick) -> Any:
        """pick(shard's arrays, rows inside it) for each shard touched, put together in the order of index."""
        index = np.asarray(index, np.int64)
        if len(index) and (index.min() < 0 or index.max() >= self.num_rows):
            raise ValueError(
                f"{self.path}: rows {index.min()}..{index.max()} were asked for; allowed: 0..{self.num_rows - 1}"
            )
        starts = np.array([self.shard_range(s)[0] for s in range(self.num_shards)])
        shard_of = np.searchsorted(starts, index, side="right") - 1
        return [
            (
                np.flatnonzero(shard_of == s),
                pick(self._shards(int(s)), index[shard_of == s] - starts[s], shard_of == s),
            )
            for s in np.unique(shard_of)
        ]


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
            array = _load(npy)
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
    def size_of(cls, source: str | Path) -> tuple[int, int]:
        """(rows, views) of what `given` would give, before anything is converted. Raises ValueError when there is neither table nor .npy."""
        if Path(source).is_dir():
            table = cls.open(source)
            return table.num_rows, table.num_views
        return cls._mapped(source).shape[:2]

    @classmethod
    def given(cls, source: str | Path, folder: Path, num_shards: int) -> FeatureTable:
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
            if _facts(mark) != facts:
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

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
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
