"""Base of FeatureTable and NeighbourTable: arrays with a row per image, in contiguous shards.

A table is a folder with `table.json` (its metadata) and one .npy file per array and shard. Shard s
of S has the rows [s * N // S, (s + 1) * N // S). A shard is written elsewhere and renamed, so that
it is complete when it exists. Tables are read by memory map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from dist_scan.data.order import check_rows
from dist_scan.storage.arrays import write_npy
from dist_scan.storage.atomic import error_reason, write_json

METADATA_FILE = "table.json"


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if there is none."""
    remedy = "restore it, or remove its folder and rebuild the table"
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error_reason(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} has a {type(value).__name__} instead of an object; {remedy}")
    return value


def load_npy(file: str | Path) -> np.ndarray:
    """Array of a .npy file, memory-mapped. Raises ValueError for an archive of arrays (.npz)."""
    array = np.load(file, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise ValueError(f"it is an archive of {array.files}: save one of them with numpy.save")
    return array


class ShardedTable:
    """A folder of shards of one or more arrays with the same number of rows."""

    kind: ClassVar[str]
    """Recorded in table.json."""
    dtypes: ClassVar[dict[str, str]]
    """dtype of each array, by its name. The name begins the names of the shards' files."""
    dims: ClassVar[tuple[str, ...]]
    """Names in table.json of the dimensions of all arrays; the first is num_rows."""

    def __init__(self, path: str | Path, metadata: dict[str, Any]) -> None:
        self.path = Path(path)
        self.metadata = metadata
        self.shape: tuple[int, ...] = tuple(metadata[name] for name in self.dims)
        self.num_rows = self.shape[0]
        self.num_shards: int = metadata["num_shards"]
        self.shard_arrays = cache(self._open_shard)

    @classmethod
    def create(
        cls, path: str | Path, shape: tuple[int, ...], num_shards: int, **provenance: Any
    ) -> Self:
        """An empty table of this shape (see `dims`) in a folder; at most one shard per row.

        `provenance` (how the rows are made) is recorded in the table's metadata.
        """
        dims = dict(zip(cls.dims, shape, strict=True))
        return cls._create(path, {**dims, "num_shards": num_shards, **provenance})

    @classmethod
    def _create(cls, path: str | Path, metadata: dict[str, Any]) -> Self:
        if metadata["num_rows"] < 1 or metadata["num_shards"] < 1:
            raise ValueError(
                f"a table needs at least one row and one shard, got {metadata['num_rows']} "
                f"and {metadata['num_shards']}"
            )
        metadata["num_shards"] = min(metadata["num_shards"], metadata["num_rows"])
        Path(path).mkdir(parents=True, exist_ok=True)
        write_json(Path(path) / METADATA_FILE, {"kind": cls.kind, **metadata})
        return cls(path, metadata)

    @classmethod
    def open_or_create(cls, out: Path, metadata: dict[str, Any]) -> Self:
        """The table in `out`; it is made on every disk that has none. Collective.

        Raises ValueError on all ranks when `out` holds a table with other metadata.
        """
        from dist_scan.world.collectives import on_every_rank
        from dist_scan.world.world import current

        def create_if_missing() -> None:
            if not (out / METADATA_FILE).exists():
                cls._create(out, metadata)

        def check_metadata() -> None:
            found = {name: table.metadata.get(name) for name in metadata}
            if found != metadata:
                raise ValueError(
                    f"{out} holds a table made from other features or with other settings: {found} "
                    f"instead of {metadata}; give another folder, or remove it"
                )

        # Rank 0 first: on a shared file system the other ranks then find its table.
        on_every_rank(lambda: create_if_missing() if current().rank == 0 else None)
        on_every_rank(create_if_missing)
        table = on_every_rank(lambda: cls.open(out))
        on_every_rank(check_metadata)
        return table

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The table in a folder, or in the only folder inside it that has one (a stage's folder).

        Raises ValueError if there is none of this kind, or it is damaged.
        """
        path = Path(path)
        if not (path / METADATA_FILE).is_file():
            inside = list(path.glob(f"*/{METADATA_FILE}"))
            if len(inside) > 1:
                names = ", ".join(sorted(file.parent.name for file in inside))
                raise ValueError(f"{path} holds {len(inside)} tables; give one of them: {names}")
            if not inside:
                raise ValueError(
                    f"{path} has no {cls.kind} table (no {METADATA_FILE}); "
                    "give the folder of one, or a .npy"
                )
            path = inside[0].parent
        table = cls(path, cls._read_metadata(path / METADATA_FILE))
        # Check headers and sizes of the shards before anything is computed from them.
        for shard in set(range(table.num_shards)) - set(table.missing_shards()):
            table.shard_arrays(shard)
        return table

    @classmethod
    def _read_metadata(cls, file: Path) -> dict[str, Any]:
        metadata = read_json_object(file)
        if metadata.get("kind") != cls.kind:
            raise ValueError(f"{file.parent} has a table of {metadata.get('kind')}, not {cls.kind}")
        values = {name: metadata.get(name) for name in (*cls.dims, "num_shards")}
        invalid = {n: v for n, v in values.items() if type(v) is not int or v < 1}
        if not invalid and metadata["num_shards"] > metadata["num_rows"]:
            invalid = {name: metadata[name] for name in ("num_shards", "num_rows")}
        if invalid:
            raise ValueError(
                f"{file} is damaged: {invalid}; allowed: integers of at least 1, at most one "
                "shard per row. Restore the file, or rebuild the table"
            )
        return metadata

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and one past the last row of a shard."""
        start = shard * self.num_rows // self.num_shards
        return start, (shard + 1) * self.num_rows // self.num_shards

    def missing_shards(self) -> list[int]:
        """Shards that are not written yet, or not all arrays of them."""

        def is_complete(shard: int) -> bool:
            return all(self._file(shard, name).is_file() for name in self.dtypes)

        return [shard for shard in range(self.num_shards) if not is_complete(shard)]

    def _file(self, shard: int, name: str) -> Path:
        return self.path / f"{name}-{shard:05d}.npy"

    def _write(self, shard: int, **arrays: np.ndarray) -> None:
        """Write all arrays of a shard."""
        start, stop = self.shard_range(shard)
        for name, array in arrays.items():
            if len(array) != stop - start:
                raise ValueError(
                    f"shard {shard} of {self.path} has rows {start}..{stop - 1}, got {len(array)}"
                )
            write_npy(self._file(shard, name), np.ascontiguousarray(array, self.dtypes[name]))

    def _open_shard(self, shard: int) -> tuple[np.ndarray, ...]:
        """The arrays of a shard. Raises ValueError if one is missing or damaged."""
        start, stop = self.shard_range(shard)
        shape = (stop - start, *self.shape[1:])
        remedy = "remove it and run the stage that makes it again"
        arrays = []
        for name, dtype in self.dtypes.items():
            file = self._file(shard, name)
            try:
                array = load_npy(file)
            except (OSError, ValueError, EOFError) as error:
                reason = error_reason(error)
                raise ValueError(f"{file} is missing or truncated ({reason}); {remedy}") from None
            if array.shape != shape or array.dtype != dtype:
                found = f"{array.dtype} {array.shape}"
                raise ValueError(f"{file} has {found} instead of {dtype} {shape}; {remedy}")
            arrays.append(array)
        return tuple(arrays)

    def _locate(self, index: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """(positions in `index`, shard, rows inside it) for each shard that `index` [n] touches."""
        index = np.asarray(index, np.int64)
        check_rows(index, self.num_rows, self.path)
        starts = np.array([self.shard_range(s)[0] for s in range(self.num_shards)])
        shard_of = np.searchsorted(starts, index, side="right") - 1
        for shard in np.unique(shard_of).tolist():
            positions = np.flatnonzero(shard_of == shard)
            yield positions, shard, index[positions] - starts[shard]
