"""New images, stored with the storage settings of the run."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_scan.config import ConfigError, DataConfig, SplitConfig
from dist_scan.config.data import STORAGE_SETTINGS
from dist_scan.data.beton.format import read_metadata, sidecar
from dist_scan.data.beton.write import storage_fingerprint, write_beton
from dist_scan.data.sources.open import open_source
from dist_scan.prediction.options import PredictOptions


@dataclass(frozen=True)
class StoredImages:
    """A .beton of the images that can be read.

    Args:
        beton: the file.
        index [N]: row of each of its images in the source, where unreadable images count too.
        num_bad: number of images that cannot be read.
    """

    beton: Path
    index: np.ndarray
    num_bad: int


def store_images(options: PredictOptions, data: DataConfig) -> StoredImages:
    """Encode the images with the run's storage settings, or use a .beton that has them.

    Lists the unreadable images in `options.bad_images`. Raises ConfigError if no image can be
    read, or if a .beton has other storage settings.
    """
    is_beton = options.images.endswith(".beton")
    beton = Path(options.images) if is_beton else _encode(options, data)
    metadata, settings = read_metadata(beton), data.model_dump()
    different = [
        f"{key} {metadata[key]} instead of {settings[key]}"
        for key in STORAGE_SETTINGS
        if metadata[key] != settings[key]
    ]
    if different:
        raise ConfigError(
            f"'{beton}' has other storage settings than the run's images ({', '.join(different)}); "
            "give the images themselves, or build it with these settings"
        )
    bad_rows = _read_bad_rows(sidecar(beton, "bad.csv"))
    if bad_rows:
        shutil.copyfile(sidecar(beton, "bad.csv"), options.bad_images)
    else:
        options.bad_images.unlink(missing_ok=True)
    all_rows = np.arange(metadata["num_images"] + len(bad_rows))
    return StoredImages(beton, np.setdiff1d(all_rows, bad_rows), len(bad_rows))


def _encode(options: PredictOptions, data: DataConfig) -> Path:
    """A .beton in the work folder; one that an earlier call finished for these images is used."""
    source = open_source(SplitConfig(source=options.images))
    beton = options.work_dir / "images.beton"
    config = data.model_copy(update={"max_bad_share": 1.0})
    fingerprint = storage_fingerprint(source.fingerprint(), config)
    if beton.is_file() and read_metadata(beton)["fingerprint"] == fingerprint:
        return beton
    beton.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_beton(source, beton, config, options.workers)
    except ConfigError:
        shutil.copyfile(sidecar(beton, "bad.csv"), options.bad_images)
        raise ConfigError(
            f"none of the {len(source)} images of '{options.images}' can be read; "
            f"the reasons are in {options.bad_images}"
        ) from None
    return beton


def _read_bad_rows(path: Path) -> list[int]:
    """Rows in the source of the images that could not be read."""
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing beside the .beton; copy all files that begin with its name, "
            "or give the images themselves"
        )
    with open(path, newline="", encoding="utf-8") as file:
        return [int(row["row"]) for row in csv.DictReader(file)]
