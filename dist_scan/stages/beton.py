"""Images in, one checked .beton out. The pipeline puts this stage first, once for each split of `data:`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dist_scan.config import DataConfig
from dist_scan.config.stage import StageConfig
from dist_scan.data.sources.open import open_source
from dist_scan.stages.base import Stage
from dist_scan.world.collectives import on_rank_0
from dist_scan.world.processes import available_cores

FILE = "images.beton"


class BetonConfig(StageConfig):
    """Made from `data:` by the pipeline; users do not write it."""

    kind: Literal["beton"] = "beton"
    split: Literal["train", "val"]
    data: DataConfig


class BetonStage(Stage):
    """Writes images.beton, its sidecars, and the list of images that could not be read."""

    Config = BetonConfig

    def run(self) -> None:
        """Rank 0 writes, in parallel processes."""
        on_rank_0(self._write)

    def _write(self) -> None:
        from dist_scan.data.beton.write import write_beton

        config, run = self.config, self.context.run
        source = open_source(config.data.splits()[config.split])
        workers = run.runtime.workers or available_cores()
        report = write_beton(source, self.context.out / FILE, config.data, workers)
        if report.num_bad:
            self.context.log(
                f"{self.context.name}: {report.num_bad} of {report.num_bad + report.num_images} images could not be read; listed in {report.bad_path}"
            )


def beton_path(folder: Path) -> Path:
    """The .beton inside a beton stage's folder."""
    return folder / FILE
