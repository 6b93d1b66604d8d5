"""Reading the settings of a run: RunConfig with the settings of every kind of stage filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict

from dist_scan import stages as stage_package
from dist_scan.config import RunConfig, StageConfig, read_settings, validate_settings
from dist_scan.config.kinds import AnyKind


class CompleteRunConfig(RunConfig):
    """RunConfig whose stages are validated as the settings of their kind."""

    model_config = ConfigDict(title="RunConfig")
    stages: dict[str, Annotated[StageConfig, AnyKind(stage_package)]]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides, validate. Raises ConfigError."""
    path = Path(path)
    return validate_settings(CompleteRunConfig, read_settings(path, overrides), str(path))
