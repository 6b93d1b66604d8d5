"""The strict base of all settings, and the two blocks that are no part of a run's meaning: `runtime:` and `slurm:`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class ConfigError(ValueError):
    """A mistake of the user's, told without a traceback (exit code 2)."""


class StrictModel(BaseModel):
    """Base of all settings: unknown keys refused, no coercion, frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RuntimeConfig(StrictModel):
    """What may change between two starts of one run without changing its meaning (left out of every fingerprint)."""

    run_dir: str | None = None
    """Where the run lives; runs/<name> when left out."""
    cache_dir: str | None = None
    """Where .beton files and other shareable artefacts lie; RUN/stages when left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU of this rank when there is one."""
    workers: int = Field(default=0, ge=0)
    """Loader threads per rank; 0 means the cores this rank may use."""
    checkpoint_s: float | None = Field(default=None, gt=0)
    """Seconds between checkpoints; left out: from the measured cost of a save (Young's formula)."""
    keep_checkpoints: int = Field(default=2, ge=1)
    bank: Literal["auto", "device", "host", "mapped"] = "auto"
    """Where training on cached features reads its rows: GPU memory, host memory or the files. auto: the first they fit into twice."""
    heads: Literal["auto", "batch", "heads", "clusters"] = "auto"
    """What ranks share when SCAN's heads train on cached features: the batch (data parallel), or the heads or every head's clusters, each
    rank with the whole batch. auto: from the numbers of ranks, heads, clusters and features; the log says why."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two rows of metrics.jsonl."""
    profile: int = Field(default=0, ge=0)
    """Steps of each training to look at closely: a trace for Perfetto, and what it waits for in words (--profile sets 300)."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest a collective may take before the run is ended."""
    step_limit_s: float = Field(default=300.0, gt=0)
    """Longest a training step may take (the first of a start counts as a section); then all stacks are written and the ranks start again."""
    section_limit_s: float = Field(default=1800.0, gt=0)
    """The same for a save, a load, a shard, an iteration, the end of an epoch."""
    compile: bool = False
    """torch.compile the network (GPU)."""
    relaunches: int = Field(default=20, ge=0)
    """How often a launcher starts the ranks again after a fault, in the same job, as long as each start got further."""


class SlurmConfig(StrictModel):
    """What launch/slurm.py asks for; its flags have the same names (--gpus-per-node 8). What is left out is the cluster's default."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int | None = Field(default=None, ge=1)
    """One process per GPU."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """Without GPUs: processes on each node (default 1)."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores for each process: loader threads and arithmetic."""
    mem: str | None = None
    """Memory per node, as sbatch reads it (240G)."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = Field(
        default=None,
        pattern=r"^([0-9]+|[0-9]+:[0-9]{2}(:[0-9]{2})?|[0-9]+-[0-9]{1,2}(:[0-9]{2}){0,2})$",
    )
    """Limit of one job, as sbatch reads it (minutes, M:SS, H:MM:SS, D-HH:MM:SS). At the limit the run saves, is queued again and goes on."""
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    dependency: str | None = None
    """As sbatch reads it: afterok:1234."""
    mail_user: str | None = None
    mail_type: str | None = None
    """As sbatch reads it: END,FAIL,REQUEUE."""
    notice_s: int = Field(default=120, ge=1)
    """Seconds before the time limit (or a preemption) at which the run is asked to save and leave."""
    setup: tuple[str, ...] = ()
    """Shell lines before the run, on the first node: module load ..., source ..."""
    python: str | None = None
    """The interpreter on the nodes (default: the one that submits; inside a container its own, often just python)."""
    container: str | None = None
    """An image for srun --container-image (pyxis)."""
    container_mounts: str | None = None
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
        """Processes over all nodes."""
        return self.nodes * self.tasks_per_node

    @field_validator(
        "setup",
        "partition",
        "account",
        "qos",
        "mem",
        "constraint",
        "exclude",
        "reservation",
        "dependency",
        "mail_user",
        "mail_type",
        "python",
        "container",
        "container_mounts",
    )
    @classmethod
    def _one_line(cls, value):
        for text in value if isinstance(value, tuple) else (value,):
            if text is not None and ("\n" in text or "\r" in text or not text.strip()):
                raise ValueError("must be one line that is not empty")
        return value

    @field_validator("sbatch", "srun")
    @classmethod
    def _options(cls, value):
        for key, setting in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ValueError(
                    f"'{key}' is no long option name; write it as on the command line without the dashes before it, like cpu-bind"
                )
            for own in (
                key,
                *OWN_OPTIONS,
            ):  # itself first; Slurm takes the beginning of an option's name for the option
                if own in OWN_OPTIONS and own.startswith(key):
                    short = f" (Slurm reads it as {own})" if own != key else ""
                    raise ValueError(
                        f"'{key}'{short} is set by the launcher and cannot be changed ({OWN_OPTIONS[own]})"
                    )
            if "\n" in str(setting):
                raise ValueError(f"'{key}' must be one line")
        return value

    @model_validator(mode="after")
    def _time_to_work(self):
        limit = seconds(self.time) if self.time else 0
        if limit and self.notice_s >= limit:
            raise ValueError(
                f"notice_s: {self.notice_s} s before a limit of {limit} s (time '{self.time}') leaves no time to work; lower notice_s or raise time"
            )
        return self


# Long options that would take the ground from under a run, and why.
_TASKS = "the processes are nodes x gpus_per_node, or nodes x processes_per_node"
_RETURN = "how a run stops and comes back depends on it"
OWN_OPTIONS = {
    "nodes": _TASKS,
    "ntasks": _TASKS,
    "ntasks-per-node": _TASKS,
    "ntasks-per-gpu": _TASKS,
    "array": "one run folder is one job",
    "output": "status and follow read it",
    "open-mode": "a requeued job goes on writing its log",
    "signal": "use notice_s",
    "requeue": _RETURN,
    "no-requeue": _RETURN,
    "no-kill": _RETURN,
    "kill-on-bad-exit": _RETURN,
    "wrap": "the batch script is the launcher's",
    "wait": "use --follow",
    "parsable": "submitit reads what sbatch says",
    "test-only": "use --dry-run",
    "error": "status and the launcher read one log of both",
    "time": "use slurm.time, which is held against notice_s",
    "clusters": "status, cancel and the requeue ask the cluster that it was submitted to",
    "quiet": "submitit reads what sbatch says",
}


def seconds(text: str) -> int:
    """What sbatch's --time means, in seconds: minutes, M:SS, H:MM:SS, D-HH[:MM[:SS]]; 0 is no limit."""
    days, dash, rest = text.rpartition("-")
    parts = [int(x) for x in rest.split(":")]
    if dash:
        return int(days) * 86400 + sum(x * unit for x, unit in zip(parts, (3600, 60, 1)))
    return sum(
        x * unit for x, unit in zip(parts, {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)])
    )
