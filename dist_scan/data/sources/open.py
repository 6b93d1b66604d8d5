"""Open the source of images that a split of the configuration names."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import numpy as np

from dist_scan.config.base import ConfigError
from dist_scan.config.data import SplitConfig
from dist_scan.data.sources.base import IMAGE_ENDINGS, Source
from dist_scan.data.sources.digits import DigitsSource
from dist_scan.data.sources.folder import FolderSource
from dist_scan.data.sources.tar import TarSource

DIGITS = "sklearn:digits"


def open_source(split: SplitConfig) -> Source:
    """The source of a split. Raises ConfigError if it is missing, empty or of another format."""
    if split.source == DIGITS or split.format == "digits":
        if split.format not in ("auto", "digits") or split.source != DIGITS:
            raise ConfigError(
                f"source '{split.source}': format '{split.format}' does not fit; "
                f"allowed: format auto, or source {DIGITS} with format digits"
            )
        source: Source = DigitsSource()
    else:
        source = _open_files(split)
    if split.classes is not None and not isinstance(source, FolderSource):
        raise ConfigError(
            f"source '{split.source}': classes '{split.classes}' selects folders of images, "
            "and this is not a folder of images; remove it"
        )
    if len(source) == 0:
        raise ConfigError(
            f"source '{split.source}' has no images; allowed endings: {', '.join(IMAGE_ENDINGS)}"
        )
    if split.limit is not None and split.limit < len(source):
        source.rows = source.rows[np.arange(split.limit) * len(source.rows) // split.limit]
    return source


def _open_files(split: SplitConfig) -> Source:
    """A source of files: a folder of images, parquet files or tar shards."""
    files = _find_files(split.source)
    if len(files) == 1 and files[0].is_dir():
        kind, files = _look_inside(files[0], split.format)
    else:
        kind = {".parquet": "parquet", ".tar": "tar"}.get(files[0].suffix, "unknown")
    if kind == "unknown" or split.format not in ("auto", kind):
        raise ConfigError(
            f"source '{split.source}': format '{split.format}' does not fit these files; "
            f"allowed: a folder of images, *.parquet, *.tar, or {DIGITS}"
        )
    if kind == "folder":
        return FolderSource(files[0], _read_classes(split.classes))
    if kind == "tar":
        return TarSource(files)
    # Importing pyarrow takes half a second.
    from dist_scan.data.sources.parquet import ParquetSource

    return ParquetSource(files)


def _find_files(source: str) -> list[Path]:
    """The file or folder `source`, or the files that match it as a glob (sorted)."""
    if os.path.exists(source):
        return [Path(source)]
    files = sorted(Path(path) for path in glob.glob(source))
    if not files:
        raise ConfigError(
            f"source '{source}' does not exist; give an image folder, parquet files, tar shards "
            f"(a glob is allowed), or {DIGITS}, as in data.train.source=PATH"
        )
    return files


def _look_inside(folder: Path, wanted: str) -> tuple[str, list[Path]]:
    """(kind, files) of a folder: its parquet files or tar shards if it has any, else itself."""
    for kind in ("parquet", "tar"):
        files = sorted(folder.glob(f"*.{kind}"))
        if files and wanted in ("auto", kind):
            return kind, files
    return "folder", [folder]


def _read_classes(path: str | None) -> list[str] | None:
    """The first word of each line of a file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ConfigError(
            f"classes: the file '{path}' does not exist; "
            "give a text file with the name of a class folder on each line"
        )
    return [line.split()[0] for line in Path(path).read_text().splitlines() if line.strip()]
