"""What a training waits for, in words: seconds per rank and section -> one sentence with the figure and the setting to change.

Pure functions. The order of the questions matters: a slow rank makes the others wait in all-reduce, so it is looked for first;
what is left of all-reduce when even the last rank to arrive has waited is the network's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dist_scan.monitoring.step_timer import NAMES

WORTH_SAYING = {name: 0.10 for name in NAMES} | {"data_wait": 0.05}
"""Share of a step above which a section is named as what the run waits for (data wait: the goal of PERFORMANCE.md 5)."""
LATE = (
    0.10  # a rank is slow when its own work takes this much of a step longer than the others' does
)
ALWAYS = ("forward", "backward")
SPOKEN = {
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
    """What a verdict needs to know about a training. `workers` and `cores` are one rank's."""

    global_batch: int
    world_size: int = 1
    device: str = "cpu"
    cores: int = 1
    workers: int = 1
    stored: str = ""
    """How images are stored (raw, jpeg, original); '' when the views are cached features."""
    resolution: int = 0
    size: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bottleneck:
    """`waits_for` is a section, `rank` (one is late) or `model` (forward and backward: as it should be); `share` of a step."""

    waits_for: str
    share: float
    text: str


def judge(seconds: np.ndarray, steps: int, setting: TrainingSetup) -> Bottleneck:
    """The verdict on `seconds` [W, len(NAMES)] that W ranks spent in `steps` steps. Raises ValueError when there is nothing to judge."""
    seconds = np.asarray(seconds, float)
    if steps < 1 or seconds.ndim != 2 or seconds.shape[1] != len(NAMES) or seconds.sum() <= 0:
        raise ValueError(
            f"a verdict needs steps and seconds [ranks, {len(NAMES)}], got {steps} steps and {list(seconds.shape)}"
        )
    step_s = float(seconds.sum(1).mean()) / steps
    late = _late_rank(seconds, steps, step_s, setting)
    if late is not None:
        return late
    share = shares(seconds)
    found = [name for name in NAMES if name not in ALWAYS and share[name] >= WORTH_SAYING[name]]
    if not found:
        return _model(share, step_s, setting)
    worst = max(found, key=share.__getitem__)
    figure = f"{SPOKEN.get(worst, worst)} is {share[worst]:.0%} of a step of {1000 * step_s:.3g} ms"
    return Bottleneck(
        worst, share[worst], f"{figure}{REMEDIES[worst](share[worst], step_s, setting)}"
    )


def shares(seconds: np.ndarray) -> dict[str, float]:
    """Share of the time by section, as the mean over ranks; all-reduce counts what the last rank to arrive spent in it, the rest
    of it is waiting for slower ranks and left out (so that shares add up to 1 minus that)."""
    seconds = np.asarray(seconds, float)
    found = dict(zip(NAMES, (seconds.mean(0) / seconds.sum(1).mean()).tolist()))
    found["all_reduce"] = float(seconds[:, NAMES.index("all_reduce")].min() / seconds.sum(1).mean())
    return found


def _late_rank(
    seconds: np.ndarray, steps: int, step_s: float, setting: TrainingSetup
) -> Bottleneck | None:
    """A rank whose own work takes longer than the others' does, if there is one."""
    if len(seconds) < 2:
        return None
    own = seconds.copy()
    own[:, NAMES.index("all_reduce")] = 0
    busy = own.sum(1)
    worst = int(busy.argmax())
    others = np.delete(own, worst, 0)
    extra_s = (busy[worst] - np.median(others.sum(1))) / steps
    if extra_s < LATE * step_s:
        return None
    more = own[worst] - np.median(others, 0)
    where = NAMES[int(more.argmax())]
    host = f" on {setting.hosts[worst]}" if worst < len(setting.hosts) else ""
    text = (
        f"rank {worst}{host} takes {1000 * extra_s:.3g} ms longer than the others for a step of {1000 * step_s:.3g} ms "
        f"({extra_s / step_s:.0%}), most of it in {SPOKEN.get(where, where)}; they wait for it in all-reduce. "
        f"Look at what else runs on that machine, or leave it out (slurm.exclude)"
    )
    return Bottleneck("rank", float(extra_s / step_s), text)


def _model(share: Mapping[str, float], step_s: float, setting: TrainingSetup) -> Bottleneck:
    part = share["forward"] + share["backward"]
    faster = "precision: bf16, or more GPUs" if setting.device != "cpu" else "a GPU, or more cores"
    return Bottleneck(
        "model",
        part,
        f"forward and backward are {part:.0%} of a step of {1000 * step_s:.3g} ms, nothing else is worth mending: "
        f"{_rate(setting, step_s)} images/s; what would make it faster: {faster}",
    )


def _rate(setting: TrainingSetup, step_s: float) -> str:
    return f"{setting.global_batch / step_s:,.0f}"


def _data_wait(share: float, step_s: float, setting: TrainingSetup) -> str:
    cores = f" on {setting.cores} core{'s' * (setting.cores > 1)} per process"
    if not setting.stored:
        return f"{cores}: rows of cached features come too slowly; keep the table on a local disk, or give the process memory to hold it (slurm.mem)"
    model_s = step_s * (1 - share)
    more = max(1, math.ceil(setting.cores * (step_s / model_s - 1)))
    options = [f"add {more} core{'s' * (more > 1)} per process (slurm.cpus_per_task)"]
    if setting.workers < setting.cores:
        options = [f"raise runtime.workers from {setting.workers} to {setting.cores}"]
    if setting.stored == "original" or setting.resolution > 1.3 * setting.size:
        options.insert(
            0, f"store {round(setting.size * 256 / 224)} px (data.stored: jpeg, data.resolution)"
        )
    elif setting.stored == "jpeg":
        options.insert(0, "store pixels (data.stored: raw)")
    return f"{cores}: the loader gives {_rate(setting, step_s)} images/s, the model could take {_rate(setting, model_s)}; {', or '.join(options)}"


def _augmentation(share: float, step_s: float, setting: TrainingSetup) -> str:
    return "; take `colour: fused` in the recipes (10 times faster jitter)" + (
        ", or a GPU" if setting.device == "cpu" else ""
    )


def _says(text: str):
    return lambda share, step_s, setting: text


REMEDIES = {
    "data_wait": _data_wait,
    "augmentation": _augmentation,
    "copy": _says("; a smaller data.size, or a look at how the GPU is connected"),
    "all_reduce": lambda share, step_s, s: (
        f" on {s.world_size} ranks, on every one of them: a slow network, or ranks late in turns because their cores "
        "are shared; raise global_batch (fewer messages for the same images), use fewer processes, or see which interface is "
        "used (NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME)"
    ),
    "optimizer": _says(
        "; raise global_batch (fewer updates for the same images), or take optimizer.kind: sgd"
    ),
    "end_step": _says("; raise global_batch (it is done once a step)"),
    "save": _says("; raise runtime.checkpoint_s, or put the run on a faster disk"),
    "epoch": _says(
        " (clustering, or choosing on held-out rows); lower held_out_share, or let the method do it less often"
    ),
    "other": _says("; raise runtime.log_every, and global_batch if steps are short"),
}


def table(seconds: np.ndarray, steps: int) -> list[dict[str, float | str | int]]:
    """Rows for a page: section, share of the time, milliseconds per step as mean over ranks and of the slowest, and which that is."""
    seconds = np.asarray(seconds, float)
    per_step, whole = 1000 * seconds / steps, seconds.sum(1).mean()
    rows = [
        {
            "section": name,
            "share": float(seconds[:, i].mean() / whole),
            "mean_ms": float(per_step[:, i].mean()),
            "max_ms": float(per_step[:, i].max()),
            "max_rank": int(per_step[:, i].argmax()),
        }
        for i, name in enumerate(NAMES)
    ]
    return sorted((r for r in rows if r["mean_ms"] > 0), key=lambda r: -r["share"])


def summary_lines(rows: Sequence[Mapping[str, float | str | int]]) -> list[str]:
    """The same for a terminal."""
    return [
        f"  {r['section']:<13}{r['share']:>6.1%}{r['mean_ms']:>10.2f} ms a step"
        + (
            f"   slowest: {r['max_ms']:.2f} ms, rank {r['max_rank']}"
            if r["max_ms"] > 1.05 * r["mean_ms"]
            else ""
        )
        for r in rows
    ]
