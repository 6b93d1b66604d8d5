"""Images in parquet files, in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.config import ConfigError
from dist_scan.data.sources.base import Sample, Source

LABEL_COLUMNS = ("label", "labels", "fine_label")


class ParquetSource(Source):
    """Rows of parquet files in the Hugging Face layout: `image` is {bytes, path} or bytes, with an optional label column."""

    def __init__(self, files: list[Path]) -> None:
        import pyarrow.parquet as pq

        self.files, self.starts, self.groups, self.sizes, self.columns = files, [0], [], [], []
        for number, file in enumerate(files):
            try:
                handle = pq.ParquetFile(file)
            except Exception as error:  # pyarrow has a dozen kinds
                raise ConfigError(f"source '{file}' is no readable parquet file: {error}") from None
            names = handle.schema_arrow.names
            if "image" not in names:
                raise ConfigError(
                    f"source '{file}' has no column 'image'; it has {', '.join(names)}. Rename the column of image bytes"
                )
            self.columns.append(_label_column(handle.schema_arrow, file))
            self.class_names = self.class_names or _class_names(
                handle.schema_arrow.metadata, self.columns[-1]
            )
            for group in range(handle.num_row_groups):
                self.groups.append((number, group))
                self.starts.append(self.starts[-1] + handle.metadata.row_group(group).num_rows)
            self.sizes.append(file.stat().st_size)
        self.rows = np.arange(self.starts[-1])

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        import pyarrow.parquet as pq

        place = np.searchsorted(self.starts, rows, side="right") - 1
        for group in np.unique(place):
            number, inner = self.groups[group]
            columns = [c for c in ("image", self.columns[number]) if c]
            try:
                table = pq.ParquetFile(self.files[number]).read_row_group(inner, columns=columns)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these two kinds
                raise ConfigError(
                    f"source '{self.files[number]}': row group {inner} cannot be read ({error}); fetch the file again"
                ) from None
            for row in (r for r, p in zip(rows, place) if p == group):
                yield self._sample(table, row - self.starts[group], row, number)

    def _sample(self, table: Any, at: int, row: int, number: int) -> Sample:
        image = table["image"][at].as_py()
        data, path = (
            (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        )
        label = table[self.columns[number]][at].as_py() if self.columns[number] else None
        return Sample(
            data or b"",
            -1 if label is None else int(label),
            path or f"{self.files[number].name}:{row}",
        )

    def _facts(self) -> Iterator[str]:
        return (f"{file.name}:{size}" for file, size in zip(self.files, self.sizes))


def _label_column(schema: Any, file: Path) -> str | None:
    """The first of LABEL_COLUMNS that is there. Raises ConfigError when it holds no class numbers."""
    import pyarrow as pa

    name = next((c for c in LABEL_COLUMNS if c in schema.names), None)
    if name is not None and not pa.types.is_integer(schema.field(name).type):
        raise ConfigError(
            f"source '{file}': column '{name}' is {schema.field(name).type}; allowed: whole numbers (or no such column). "
            "Write the classes as numbers, or rename the column"
        )
    return name


def _class_names(metadata: dict | None, label: str | None) -> list[str] | None:
    """Class names that Hugging Face datasets keep in the schema's metadata, if they do."""
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
