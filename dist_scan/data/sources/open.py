"""Open the source of images that a split of the configuration names.

To add a kind of source: write a subclass of `Source` (base.py), add the ending of its files to
`_find_files`, its class to `_make_source` and its name to `SplitConfig.format` (config/data.py).
"""

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
    kind, files = _find_files(split)
    if kind == "unknown":
        raise ConfigError(
            f"source '{split.source}': '{files[0].suffix}' is not the ending of a known format; "
            f"allowed: a folder of images, *.parquet, *.tar, or {DIGITS}"
        )
    if split.format not in ("auto", kind):
        raise ConfigError(
            f"source '{split.source}': format '{split.format}' is wrong, its format is '{kind}'; "
            "remove the setting, or give another source"
        )
    source = _make_source(kind, files, split.classes)
    if split.classes is not None and kind != "folder":
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


def _find_files(split: SplitConfig) -> tuple[str, list[Path]]:
    """(kind, files) of a split; a folder may have parquet files or tar shards, or be the source."""
    if split.source == DIGITS:
        return "digits", []
    files = [Path(split.source)]
    if not os.path.exists(split.source):
        files = sorted(Path(path) for path in glob.glob(split.source))
    if not files:
        raise ConfigError(
            f"source '{split.source}' does not exist; give an image folder, parquet files, tar "
            f"shards (a glob is allowed), or {DIGITS}, as in data.train.source=PATH"
        )
    if len(files) > 1 or not files[0].is_dir():
        return {".parquet": "parquet", ".tar": "tar"}.get(files[0].suffix, "unknown"), files
    for kind in ("parquet", "tar"):
        inside = sorted(files[0].glob(f"*.{kind}"))
        if inside and split.format in ("auto", kind):
            return kind, inside
    return "folder", files


def _make_source(kind: str, files: list[Path], classes: str | None) -> Source:
    if kind == "digits":
        return DigitsSource()
    if kind == "folder":
        return FolderSource(files[0], _read_classes(classes))
    if kind == "tar":
        return TarSource(files)
    # Importing pyarrow takes half a second.
    from dist_scan.data.sources.parquet import ParquetSource

    return ParquetSource(files)


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
