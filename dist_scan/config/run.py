"""Settings of one run, and its `runtime:` block, which may change between two starts of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from dist_scan.config.base import Name, StrictModel
from dist_scan.config.data import DataConfig
from dist_scan.config.slurm import SlurmConfig
from dist_scan.config.stage import BETON, StageConfig, Stages, beton_stage

STAGE_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # becomes the name of a folder


class RuntimeConfig(StrictModel):
    """How and where the stages run; not part of any fingerprint, since results do not change."""

    run_dir: str | None = None
    """Folder of the run (default: runs/<name>)."""
    cache_dir: str | None = None
    """Folder of .beton files, which several runs can share (default: the run's stages folder)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one."""
    loader_threads: int = Field(default=0, ge=0)
    """Loader threads per rank; 0: as many as cores this rank may use."""
    checkpoint_s: float | None = Field(default=None, gt=0)
    """Seconds between checkpoints (default: Young's formula and the measured cost of a save)."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints kept of each training."""
    feature_cache: Literal["auto", "device", "host", "mapped"] = "auto"
    """Where training on cached features reads its rows: GPU memory, host memory or the files.

    auto: the first with free memory for twice the size of the features.
    """
    head_partition: Literal["auto", "batch", "heads", "clusters"] = "auto"
    """How training of SCAN's heads on cached features is split over ranks.

    batch: data parallel. heads, clusters: each rank has the whole batch and some of the heads, or
    some clusters of every head. auto: chosen by the numbers of ranks, heads, clusters and
    features; the log gives the reason.
    """
    log_every: int = Field(default=10, ge=1)
    """Steps between two rows of metrics.jsonl."""
    profile: int = Field(default=0, ge=0)
    """Steps of each training to profile (--profile sets 300).

    Writes a trace for Perfetto and names the bottleneck.
    """
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds after which a collective fails and the run ends."""
    step_limit_s: float = Field(default=300.0, gt=0)
    """Seconds after which a training step counts as hung.

    Then all stacks are written and the ranks start again. For the first step section_limit_s
    applies.
    """
    section_limit_s: float = Field(default=1800.0, gt=0)
    """Seconds without progress after which any other work counts as hung.

    Such work is a save, a load, a shard, an iteration, or the end of an epoch.
    """
    relaunches: int = Field(default=20, ge=0)
    """How often a launcher restarts the ranks within one job after faults.

    It gives up earlier if a start makes no progress.
    """


class RunConfig(StrictModel):
    """One run: data, stages in order, and how this machine runs them.

    dist_scan/run_config.py has the subclass that knows the settings of every kind of stage.
    """

    name: Name
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
        """Raise ValueError unless each stage refers to earlier stages that fit its settings."""
        earlier: dict[str, StageConfig | None] = {
            beton_stage(split): None for split in self.data.splits()
        }
        for name, stage in self.stages.items():
            if not re.fullmatch(STAGE_NAME, name) or name in earlier:
                raise ValueError(
                    f"stages: '{name}' cannot be a stage's name; "
                    "allowed: letters, digits, _ and -, beginning with a letter or digit, "
                    "but not the name of an earlier stage, beton_train or beton_val"
                )
            for role, target in stage.inputs().items():
                if target not in earlier:
                    raise ValueError(_unknown_reference(name, role, target, earlier))
            stage.check_inputs(name, earlier)
            stage.check_settings(name, earlier)
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
