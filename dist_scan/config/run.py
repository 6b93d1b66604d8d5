"""Settings of one run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from dist_scan.config.base import StrictModel
from dist_scan.config.data import DataConfig
from dist_scan.config.runtime import RuntimeConfig
from dist_scan.config.slurm import SlurmConfig
from dist_scan.config.stage import BETON, StageConfig, Stages, beton_stage

STAGE_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # becomes the name of a folder


class RunConfig(StrictModel):
    """One run: data, stages in order, and how this machine runs them.

    dist_scan/run_config.py has the subclass that knows the settings of every kind of stage.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: DataConfig
    stages: dict[str, StageConfig]
    runtime: RuntimeConfig = RuntimeConfig()
    slurm: SlurmConfig = SlurmConfig()
    """What launch/slurm.py requests from Slurm; not part of any fingerprint."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.runtime.run_dir or Path("runs") / self.name)

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        """References between stages point backwards, and each stage fits what it refers to."""
        earlier: dict[str, StageConfig | None] = {
            beton_stage(split): None for split in self.data.splits()
        }
        for name, stage in self.stages.items():
            if not re.fullmatch(STAGE_NAME, name) or name in earlier:
                raise ValueError(
                    f"stages: '{name}' cannot be a stage's name; "
                    "allowed: letters, digits, _ and -, not beton_train or beton_val"
                )
            for role, target in stage.inputs().items():
                if target not in earlier:
                    raise ValueError(_unknown_reference(name, role, target, earlier))
            stage.check_inputs(name, earlier)
            stage.check(name, earlier)
            earlier[name] = stage
        return self


def _unknown_reference(name: str, role: str, target: str, earlier: Stages) -> str:
    """The message for a reference to a stage that does not come before this one."""
    if target.startswith(BETON):
        split = target.removeprefix(BETON)
        return f"stages.{name}.{role}: '{split}', but data.{split} is not set; add it"
    allowed = [other for other, stage in earlier.items() if stage is not None]
    return (
        f"stages.{name}.{role}: '{target}' is not an earlier stage; "
        f"allowed: {', '.join(allowed) or 'none (this is the first)'}. "
        f"Name one, or move it before '{name}'."
    )
