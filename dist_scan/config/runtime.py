"""Settings of the `runtime:` block, which may change between two starts of one run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_scan.config.base import StrictModel


class RuntimeConfig(StrictModel):
    """How and where the stages run; not part of any fingerprint, since results do not change."""

    run_dir: str | None = None
    """Folder of the run (default: runs/<name>)."""
    cache_dir: str | None = None
    """Folder of .beton files, which several runs can share (default: the run's stages folder)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one."""
    workers: int = Field(default=0, ge=0)
    """Loader threads per rank; 0: as many as cores this rank may use."""
    checkpoint_s: float | None = Field(default=None, gt=0)
    """Seconds between checkpoints (default: Young's formula and the measured cost of a save)."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints kept of each training."""
    bank: Literal["auto", "device", "host", "mapped"] = "auto"
    """Where training on cached features reads its rows: GPU memory, host memory or the files.

    auto: the first of them that has twice the space.
    """
    heads: Literal["auto", "batch", "heads", "clusters"] = "auto"
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

    All stacks are written and the ranks start again. The first step has section_limit_s.
    """
    section_limit_s: float = Field(default=1800.0, gt=0)
    """The same limit for a save, a load, a shard, an iteration, the end of an epoch."""
    compile: bool = False
    """torch.compile the network (GPU)."""
    relaunches: int = Field(default=20, ge=0)
    """How often a launcher restarts the ranks within one job after faults.

    It gives up earlier if a start makes no progress.
    """
