"""Imported by the fork server: the loader's compiled code, made once for all the runs of tests/faults (5 s of processor time a rank)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source

with tempfile.TemporaryDirectory() as _folder:
    _data = DataConfig(
        train=SplitConfig(source="sklearn:digits", limit=8), stored="raw", resolution=16, size=16
    )
    write_beton(open_source(_data.train), Path(_folder) / "x.beton", _data, 1, show=False)
    for _views in ((CropSpec("center", 16),), (CropSpec("random_resized", 16),) * 2):
        list(
            BetonLoader(
                Path(_folder) / "x.beton", _views, seed=0, batch_size=4, num_threads=1
            ).batches(np.arange(8), 0)
        )
