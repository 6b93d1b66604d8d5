"""Imported by the fork server of the tests: compiles the data loader's code once for all ranks.

Compiling takes 5 s of processor time in every process that does it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source


def compile_loader() -> None:
    """Load a few images with one centre crop, and with two random crops."""
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder) / "x.beton"
        split = SplitConfig(source="sklearn:digits", limit=8)
        config = DataConfig(train=split, stored="raw", resolution=16, size=16)
        write_beton(open_source(config.train), beton, config, 1, show_progress=False)
        for crops in ((CropSpec("center", 16),), (CropSpec("random_resized", 16),) * 2):
            loader = BetonLoader(beton, crops, seed=0, batch_size=4, num_threads=1)
            list(loader.batches(np.arange(8), 0))


compile_loader()
