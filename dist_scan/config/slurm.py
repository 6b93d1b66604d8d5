"""Settings of the `slurm:` block: what launch/slurm.py requests; not part of any fingerprint."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from dist_scan.config.base import StrictModel

_TASKS = "set slurm.nodes, slurm.gpus_per_node or slurm.processes_per_node instead"
_RESTART = "stopping and restarting a run depends on it"
RESERVED_OPTIONS = {
    "nodes": _TASKS,
    "ntasks": _TASKS,
    "ntasks-per-node": _TASKS,
    "ntasks-per-gpu": _TASKS,
    "array": "one run folder is one job",
    "output": "`status` and --follow read it",
    "open-mode": "a requeued job appends to its log",
    "signal": "use notice_s",
    "requeue": _RESTART,
    "no-requeue": _RESTART,
    "no-kill": _RESTART,
    "kill-on-bad-exit": _RESTART,
    "wrap": "the launcher writes the batch script",
    "wait": "use --follow",
    "parsable": "submitit reads sbatch's output",
    "test-only": "use --dry-run",
    "error": "standard output and error go into one log, which `status` reads",
    "time": "use slurm.time, which is checked against notice_s",
    "clusters": "`status`, `cancel` and the requeue use the cluster of the submission",
    "quiet": "submitit reads sbatch's output",
}
"""Long options that the launcher sets itself, with the reason or what to use instead."""
TIME_PATTERN = r"([0-9]+|[0-9]+:[0-9]{2}(:[0-9]{2})?|[0-9]+-[0-9]{1,2}(:[0-9]{2}){0,2})"
"""sbatch's formats of a time limit."""


def _check_line(text: str) -> str:
    if not text.strip() or "\n" in text or "\r" in text:
        raise ValueError(f"{text!r} must be one line that is not empty")
    return text


Line = Annotated[str, AfterValidator(_check_line)]
"""Text that becomes a line, or a part of one, of the batch script."""


class SlurmConfig(StrictModel):
    """Options of launch/slurm.py; flags have the same names (--gpus-per-node 8).

    An option that is not set has the cluster's default.
    """

    nodes: int = Field(default=1, ge=1)
    """Number of nodes."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """One process per GPU."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """Without GPUs: processes on each node (default 1)."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores per process, for loader threads and arithmetic."""
    mem: Line | None = None
    """Memory per node, as sbatch reads it (240G)."""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time: str | None = Field(default=None, json_schema_extra={"pattern": f"^{TIME_PATTERN}$"})
    """Time limit of one job, as sbatch reads it (minutes, M:SS, H:MM:SS, D-HH:MM:SS).

    Before the limit the run saves its state; the job is requeued and continues.
    """
    constraint: Line | None = None
    exclude: Line | None = None
    reservation: Line | None = None
    dependency: Line | None = None
    """As sbatch reads it: afterok:1234."""
    mail_user: Line | None = None
    mail_type: Line | None = None
    """As sbatch reads it: END,FAIL,REQUEUE."""
    notice_s: int = Field(default=120, ge=1)
    """Seconds before the time limit or a preemption at which the run must save and exit."""
    setup: tuple[Line, ...] = ()
    """Shell lines before the run, on the first node: module load ..., source ..."""
    python: Line | None = None
    """Python interpreter on the nodes (default: the one that submits).

    With `container`: the interpreter inside it, often just `python`.
    """
    container: Line | None = None
    """An image for srun --container-image (pyxis)."""
    container_mounts: Line | None = None
    """As pyxis reads it: /data:/data,/runs:/runs."""
    sbatch: dict[str, str | int | bool] = {}
    """Any other sbatch option by its long name: {exclusive: true, licenses: "foo:1"}."""
    srun: dict[str, str | int | bool] = {}
    """Any other srun option by its long name: {cpu-bind: none}."""

    @property
    def tasks_per_node(self) -> int:
        """Processes on each node."""
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.tasks_per_node

    @field_validator("sbatch", "srun")
    @classmethod
    def _check_options(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for option, setting in value.items():
            _check_option_name(option)
            if "\n" in str(setting):
                raise ValueError(f"'{option}': {setting!r} must be one line")
        return value

    @field_validator("time")
    @classmethod
    def _check_time(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(TIME_PATTERN, value):
            raise ValueError(
                f"{value!r}; allowed: minutes, M:SS, H:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS"
            )
        return value

    @model_validator(mode="after")
    def _check_notice(self) -> Self:
        limit = limit_in_seconds(self.time) if self.time else 0
        if limit and self.notice_s >= limit:
            raise ValueError(
                f"notice_s: {self.notice_s} s before a limit of {limit} s (time '{self.time}') "
                "leaves no time to work; lower notice_s or raise time"
            )
        return self


def _check_option_name(option: str) -> None:
    """Raise ValueError unless it is a long option of sbatch or srun that users may set."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
        raise ValueError(
            f"'{option}' is not a long option; write it as on the command line "
            "without the leading dashes, like cpu-bind"
        )
    # Slurm accepts every prefix of an option's name.
    matching = [name for name in RESERVED_OPTIONS if name.startswith(option)]
    if matching:
        own = option if option in matching else matching[0]
        prefix = "" if own == option else f" (Slurm reads it as {own})"
        raise ValueError(
            f"'{option}'{prefix} is set by the launcher and cannot be given here "
            f"({RESERVED_OPTIONS[own]})"
        )


def limit_in_seconds(time: str) -> int:
    """Seconds of sbatch's --time: minutes, M:SS, H:MM:SS, D-HH[:MM[:SS]]; 0 means no limit."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))
