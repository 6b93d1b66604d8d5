"""Images in parquet files, in the layout of Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_scan.config.base import ConfigError
from dist_scan.data.sources.base import Sample, Source

LABEL_COLUMNS = ("label", "labels", "fine_label")


class ParquetSource(Source):
    """Parquet files with a column `image`, {bytes, path} or bytes, and an optional label column."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.sizes: list[int] = []
        self.label_columns: list[str | None] = []
        self.groups: list[tuple[int, int]] = []
        """(file, row group inside it) of each row group."""
        self.starts = [0]
        """First row of each row group, and the number of all rows at the end."""
        for number, file in enumerate(files):
            try:
                parquet = pq.ParquetFile(file)
            except Exception as error:  # pyarrow raises a dozen types
                raise ConfigError(
                    f"source '{file}' is not a readable parquet file: {error}"
                ) from None
            # Columns of this file
            schema = parquet.schema_arrow
            if "image" not in schema.names:
                raise ConfigError(
                    f"source '{file}' has no column 'image', only {', '.join(schema.names)}. "
                    "Rename the column of image bytes"
                )
            self.sizes.append(file.stat().st_size)
            label_column = _label_column(schema, file)
            self.label_columns.append(label_column)
            self.class_names = self.class_names or _class_names(schema, label_column)
            # Its row groups
            for group in range(parquet.num_row_groups):
                self.groups.append((number, group))
                self.starts.append(self.starts[-1] + parquet.metadata.row_group(group).num_rows)
        self.rows = np.arange(self.starts[-1])

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        for group in np.unique(group_of):
            number, inner = self.groups[group]
            columns = [name for name in ("image", self.label_columns[number]) if name]
            try:
                table = pq.ParquetFile(self.files[number]).read_row_group(inner, columns=columns)
            except (OSError, ValueError) as error:  # bases of all of pyarrow's errors
                raise ConfigError(
                    f"source '{self.files[number]}': row group {inner} cannot be read ({error}); "
                    "copy or download the file again"
                ) from None
            for row in np.asarray(rows)[group_of == group].tolist():
                yield self._sample(table, row - self.starts[group], row, number)

    def _sample(self, table: pa.Table, position: int, row: int, number: int) -> Sample:
        """The image at a position of a row group's table."""
        image = table["image"][position].as_py()
        if not isinstance(image, dict):
            image = {"bytes": image}
        column = self.label_columns[number]
        label = table[column][position].as_py() if column else None
        return Sample(
            image.get("bytes") or b"",
            -1 if label is None else int(label),
            image.get("path") or f"{self.files[number].name}:{row}",
        )

    def _description(self) -> Iterator[str]:
        return (f"{file.name}:{size}" for file, size in zip(self.files, self.sizes))


def _label_column(schema: pa.Schema, file: Path) -> str | None:
    """The first of LABEL_COLUMNS in a file. Raises ConfigError if its type is not an integer."""
    name = next((column for column in LABEL_COLUMNS if column in schema.names), None)
    if name is not None and not pa.types.is_integer(schema.field(name).type):
        raise ConfigError(
            f"source '{file}': column '{name}' is {schema.field(name).type}; allowed: integers "
            "(or no such column). Number the classes, or rename the column"
        )
    return name


def _class_names(schema: pa.Schema, label_column: str | None) -> list[str] | None:
    """Class names from the schema's metadata, where Hugging Face datasets store them."""
    try:
        info = json.loads(schema.metadata[b"huggingface"])["info"]
        return list(info["features"][label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return None
