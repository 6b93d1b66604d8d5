"""Stores the images of one split as a .beton file; the pipeline runs this stage first."""

from __future__ import annotations

from typing import Literal

from dist_scan.config import DataConfig
from dist_scan.config.data import Split
from dist_scan.config.stage import StageConfig
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source
from dist_scan.stages.base import BETON, Stage
from dist_scan.world.collectives import on_rank_0


class BetonConfig(StageConfig):
    """Settings of a .beton file; the pipeline makes them from `data:`."""

    kind: Literal["beton"] = "beton"
    split: Split
    data: DataConfig


class BetonStage(Stage[BetonConfig]):
    """Writes images.beton, its sidecar files, and the list of images that could not be read."""

    Config = BetonConfig
    version = 2

    def run(self) -> None:
        """Rank 0 writes, with several worker processes."""
        on_rank_0(self._write)

    def _write(self) -> None:
        context, config = self.context, self.config
        source = open_source(config.data.splits()[config.split])
        workers = context.run.runtime.loader_threads
        report = write_beton(source, context.out / BETON, config.data, workers)
        if report.num_unreadable:
            total = report.num_unreadable + report.num_images
            context.log(
                f"{context.name}: {report.num_unreadable} of {total} images "
                f"could not be read; they are listed in {report.unreadable_list}"
            )
