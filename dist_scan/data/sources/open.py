"""Open the source of images that a configuration names."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import numpy as np

from dist_scan.config import ConfigError, SplitConfig
from dist_scan.data.sources.base import IMAGE_ENDINGS, Source
from dist_scan.data.sources.digits import DigitsSource
from dist_scan.data.sources.folder import FolderSource
from dist_scan.data.sources.tar import TarSource


def open_source(split: SplitConfig) -> Source:
    """The source a split asks for. Raises ConfigError when it is missing, empty or of another format."""
    if split.source == "sklearn:digits" or split.format == "digits":
        if split.format not in ("auto", "digits") or split.source != "sklearn:digits":
            raise ConfigError(
                f"source '{split.source}': format '{split.format}' does not fit it; allowed: format auto, or source sklearn:digits with format digits"
            )
        source: Source = DigitsSource()
    else:
        source = _open_files(split)
    if split.classes is not None and not isinstance(source, FolderSource):
        raise ConfigError(
            f"source '{split.source}': classes '{split.classes}' chooses among folders of images, and this is none; remove it"
        )
    if len(source) == 0:
        raise ConfigError(
            f"source '{split.source}' holds no images; allowed endings: {', '.join(IMAGE_ENDINGS)}"
        )
    if split.limit is not None and split.limit < len(source):
        source.rows = source.rows[np.arange(split.limit) * len(source.rows) // split.limit]
    return source


def _open_files(split: SplitConfig) -> Source:
    files = (
        [Path(split.source)]
        if os.path.exists(split.source)
        else sorted(Path(p) for p in glob.glob(split.source))
    )
    if not files:
        raise ConfigError(
            f"source '{split.source}' does not exist; give an image folder, parquet files, tar shards (a glob is allowed), "
            "or sklearn:digits, as in data.train.source=PATH"
        )
    if len(files) == 1 and files[0].is_dir():
        inside = [(kind, sorted(files[0].glob(f"*.{kind}"))) for kind in ("parquet", "tar")]
        kind, files = next(
            ((k, f) for k, f in inside if f and split.format in ("auto", k)), ("folder", files)
        )
    else:
        kind = {".parquet": "parquet", ".tar": "tar"}.get(files[0].suffix, "?")
    if kind == "?" or split.format not in ("auto", kind):
        raise ConfigError(
            f"source '{split.source}': format '{split.format}' does not fit what is there; allowed: a folder of images, "
            "*.parquet, *.tar, or sklearn:digits"
        )
    if kind == "folder":
        return FolderSource(files[0], _class_list(split.classes))
    if kind == "tar":
        return TarSource(files)
    from dist_scan.data.sources.parquet import (
        ParquetSource,  # only who reads parquet waits for pyarrow
    )

    return ParquetSource(files)


def _class_list(path: str | None) -> list[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise ConfigError(
            f"classes: the file '{path}' does not exist; give a text file with a class folder's name on each line"
        )
    return [line.split()[0] for line in Path(path).read_text().splitlines() if line.strip()]
