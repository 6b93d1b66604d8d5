"""Settings of the report stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_scan.config.stage import Images, Ref, StageConfig, Stages
from dist_scan.stages.evaluate import EvaluateConfig


class ReportConfig(StageConfig):
    """Settings of the report."""

    kind: Literal["report"] = "report"
    images: Images = "train"
    evaluate: Ref
    best: str
    """The subject of `evaluate` whose clusters are shown and exported; set in advance."""
    features: Ref | None = None
    """Features for the prototypes of clusters (default: no clusters are shown)."""
    neighbours: Ref | None = None
    """Show sample images with these neighbours."""
    seed_images: int = Field(default=0, ge=0)
    """Seed with which the sample images are drawn."""

    def check_settings(self, name: str, earlier: Stages) -> None:
        """Raise ValueError unless `best` is one of the evaluated subjects."""
        source = earlier[self.evaluate]
        subjects = source.subjects if isinstance(source, EvaluateConfig) else {}
        if self.best not in subjects:
            raise ValueError(
                f"stages.{name}.best: '{self.best}' is not a subject of '{self.evaluate}'; "
                f"allowed: {', '.join(subjects)}"
            )
