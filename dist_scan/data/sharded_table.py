"""Tables with a row per image, in a fixed number of contiguous shards: the base of FeatureTable and NeighbourTable.

A shard is a .npy file that is renamed in whole; rows of shard s are [s*N//S, (s+1)*N//S). Reading is by memory map.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dist_scan.storage.atomic import write_atomic, write_json


def read_json_object(file: Path) -> dict[str, Any]:
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


def load_npy(file: str | Path) -> np.ndarray:
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
        self.path, self.metadata = Path(path), facts
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
        facts = read_json_object(file)
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
                array = load_npy(file)
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
