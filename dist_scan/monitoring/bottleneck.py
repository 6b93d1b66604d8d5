"""What a training waits for: one sentence with the figure and the setting to change.

Pure functions of the seconds that each rank spent in each section. A slow rank makes the others
wait in all-reduce, so slow ranks are looked for first. The part of the interconnect is the smallest
all-reduce time of any rank, which has not waited for a slower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from dist_scan.monitoring.step_timer import SECTIONS

ALL_REDUCE = SECTIONS.index("all_reduce")
MODEL_SECTIONS = ("forward", "backward")
THRESHOLDS = {name: 0.10 for name in SECTIONS} | {"data_wait": 0.05}
"""Fraction of a step from which a section counts as a bottleneck."""
SLOW_RANK_THRESHOLD = 0.10
"""A rank is slow if its own work takes longer than the others' by this fraction of a step."""
DISPLAY_NAMES = {
    "data_wait": "data wait",
    "all_reduce": "all-reduce",
    "end_step": "the method's end_step",
    "save": "saving checkpoints",
    "epoch": "the method's work between epochs",
    "copy": "copying to the device",
    "other": "the loop around the step",
}


@dataclass(frozen=True)
class TrainingSetup:
    """What the advice depends on. ``loader_threads`` and ``cores`` are per rank."""

    global_batch: int
    world_size: int = 1
    device: str = "cpu"
    cores: int = 1
    loader_threads: int = 1
    stored: str = ""
    """How images are stored (raw, jpeg, original); '' if the views are cached features."""
    resolution: int = 0
    size: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bottleneck:
    """What a step waits for, as a sentence in ``text``.

    ``waits_for`` is a section, "rank" (one rank is slow) or "model" (forward and backward dominate,
    as they should); ``fraction`` is its part of a step.
    """

    waits_for: str
    fraction: float
    text: str


@dataclass(frozen=True)
class _StepTime:
    """Seconds of a mean step, and the fraction that the section in question takes of it."""

    step_s: float
    fraction: float
    setup: TrainingSetup

    @property
    def rest_s(self) -> float:
        """Seconds of the step without the section in question."""
        return self.step_s * (1 - self.fraction)

    @property
    def speed(self) -> str:
        return f"{self.setup.global_batch / self.step_s:,.0f} images/s"

    @property
    def speed_without_section(self) -> str:
        return f"{self.setup.global_batch / self.rest_s:,.0f} images/s"


def find_bottleneck(seconds: np.ndarray, steps: int, setup: TrainingSetup) -> Bottleneck:
    """What ``steps`` steps waited for, from ``seconds`` [W, len(SECTIONS)] of W ranks.

    There is at least one step, and the seconds are not all 0.
    """
    step_s = float(seconds.sum(1).mean()) / steps
    slow_rank = _find_slow_rank(seconds, steps, step_s, setup)
    if slow_rank is not None:
        return slow_rank
    fractions = section_fractions(seconds)
    candidates = [
        name
        for name in SECTIONS
        if name not in MODEL_SECTIONS and fractions[name] >= THRESHOLDS[name]
    ]
    if not candidates:
        fraction = sum(fractions[name] for name in MODEL_SECTIONS)
        return _model_bottleneck(_StepTime(step_s, fraction, setup))
    name = max(candidates, key=fractions.__getitem__)
    fraction = fractions[name]
    figure = f"{_display_name(name)} is {fraction:.0%} of a step of {1000 * step_s:.3g} ms"
    remedy = REMEDIES[name]
    if not isinstance(remedy, str):
        remedy = remedy(_StepTime(step_s, fraction, setup))
    return Bottleneck(name, fraction, figure + remedy)


def section_fractions(seconds: np.ndarray) -> dict[str, float]:
    """Fraction of the time by section, as the mean over ranks.

    All-reduce is the minimum over ranks: the rest of it is waiting for slower ranks and left out,
    so the fractions add up to 1 minus that rest.
    """
    total = seconds.sum(1).mean()
    fractions = dict(zip(SECTIONS, (seconds.mean(0) / total).tolist()))
    fractions["all_reduce"] = float(seconds[:, ALL_REDUCE].min() / total)
    return fractions


def _display_name(section: str) -> str:
    return DISPLAY_NAMES.get(section, section)


def _find_slow_rank(
    seconds: np.ndarray, steps: int, step_s: float, setup: TrainingSetup
) -> Bottleneck | None:
    """A rank whose work, all-reduce not counted, takes longer than the others'; None if none."""
    if len(seconds) < 2:
        return None
    work = seconds.copy()
    work[:, ALL_REDUCE] = 0
    rank = int(work.sum(1).argmax())
    others = np.delete(work, rank, 0)
    extra_s = float(work[rank].sum() - np.median(others.sum(1))) / steps
    if extra_s < SLOW_RANK_THRESHOLD * step_s:
        return None
    extra_by_section = work[rank] - np.median(others, 0)
    section = SECTIONS[int(extra_by_section.argmax())]
    host = f" on {setup.hosts[rank]}" if rank < len(setup.hosts) else ""
    text = (
        f"rank {rank}{host} takes {1000 * extra_s:.3g} ms longer than the others for a step of "
        f"{1000 * step_s:.3g} ms ({extra_s / step_s:.0%}), most of it in {_display_name(section)}; "
        "they wait for it in all-reduce. Check what else runs on that machine, or exclude it "
        "(slurm.exclude)"
    )
    return Bottleneck("rank", extra_s / step_s, text)


def _model_bottleneck(step: _StepTime) -> Bottleneck:
    on_cpu = step.setup.device == "cpu"
    faster = "a GPU, or more cores" if on_cpu else "precision: bf16, or more GPUs"
    text = (
        f"forward and backward are {step.fraction:.0%} of a step of {1000 * step.step_s:.3g} ms, "
        f"no other section is worth improving: {step.speed}; "
        f"to go faster, use {faster}"
    )
    return Bottleneck("model", step.fraction, text)


def _data_wait_remedy(step: _StepTime) -> str:
    setup = step.setup
    cores = f" on {setup.cores} core{_plural(setup.cores)} per process"
    if not setup.stored:
        return (
            f"{cores}: cached features are read too slowly; keep the table on a local disk, "
            "or give the process enough memory to hold it (slurm.mem)"
        )
    options = []
    if setup.stored == "original" or setup.resolution > 1.3 * setup.size:
        resolution = round(setup.size * 256 / 224)
        options.append(f"store {resolution} px (data.stored: jpeg, data.resolution)")
    elif setup.stored == "jpeg":
        options.append("store pixels (data.stored: raw)")
    if setup.loader_threads < setup.cores:
        options.append(f"raise runtime.loader_threads from {setup.loader_threads} to {setup.cores}")
    else:
        missing = max(1, math.ceil(setup.cores * (step.step_s / step.rest_s - 1)))
        options.append(f"add {missing} core{_plural(missing)} per process (slurm.cpus_per_task)")
    return (
        f"{cores}: the loader gives {step.speed}, the model could take "
        f"{step.speed_without_section}; {', or '.join(options)}"
    )


def _plural(count: int) -> str:
    return "" if count == 1 else "s"


def _augmentation_remedy(step: _StepTime) -> str:
    gpu = ", or a GPU" if step.setup.device == "cpu" else ""
    return f"; use `colour: fused` in the recipes (10 times faster colour jitter){gpu}"


def _all_reduce_remedy(step: _StepTime) -> str:
    return (
        f" on each of {step.setup.world_size} ranks: the interconnect is slow, or ranks share "
        "cores and slow each other down; raise global_batch (fewer messages for the same images), "
        "use fewer processes, or check the network interface (NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME)"
    )


REMEDIES: dict[str, str | Callable[[_StepTime], str]] = {
    "data_wait": _data_wait_remedy,
    "augmentation": _augmentation_remedy,
    "copy": "; use a smaller data.size, or check how the GPU is connected",
    "all_reduce": _all_reduce_remedy,
    "optimizer": (
        "; raise global_batch (fewer updates for the same images), or use optimizer.kind: sgd"
    ),
    "end_step": "; raise global_batch (it runs once a step)",
    "save": "; raise runtime.checkpoint_s, or put the run on a faster disk",
    "epoch": (
        " (clustering, or selection on held-out rows); lower held_out_share, or raise "
        "method.reassign (deepcluster)"
    ),
    "other": "; raise runtime.log_every, and global_batch if steps are short",
}
"""What to change, by section: the end of the sentence that names the bottleneck."""


class SectionTime(TypedDict):
    """Time of a section: its share of the whole, and milliseconds per step.

    ``mean_ms`` is the mean over ranks, ``max_ms`` that of the slowest rank, ``max_rank``.
    """

    section: str
    share: float
    mean_ms: float
    max_ms: float
    max_rank: int


def section_table(seconds: np.ndarray, steps: int) -> list[SectionTime]:
    """Sections that took time, the largest share first."""
    per_step = 1000 * seconds / steps
    total = seconds.sum(1).mean()
    rows = [
        SectionTime(
            section=name,
            share=float(seconds[:, i].mean() / total),
            mean_ms=float(per_step[:, i].mean()),
            max_ms=float(per_step[:, i].max()),
            max_rank=int(per_step[:, i].argmax()),
        )
        for i, name in enumerate(SECTIONS)
    ]
    return sorted((row for row in rows if row["mean_ms"] > 0), key=lambda row: -row["share"])


def format_section(row: SectionTime) -> str:
    """A row of `section_table` as a line for a terminal."""
    line = f"  {row['section']:<13}{row['share']:>6.1%}{row['mean_ms']:>10.2f} ms a step"
    if row["max_ms"] > 1.05 * row["mean_ms"]:
        line += f"   slowest: {row['max_ms']:.2f} ms, rank {row['max_rank']}"
    return line
