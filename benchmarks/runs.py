"""Figures of a run folder: a row per stage from its timing.json and manifest, and what is missing.

Read by benchmarks/scaling.py from the folders nodes-N that `launch/slurm.py --benchmark` creates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.monitoring.bottleneck import section_fractions
from dist_scan.monitoring.step_timer import SECTIONS
from launch import records

NOT_SHARED = ("benchmark", "configuration", "load")
"""Fields of facts.json that do not describe the machine."""


def stage_rows(run_dir: Path) -> list[dict[str, Any]]:
    """A row per finished stage of the run in a folder nodes-N, in the order of their ends.

    The building of .beton files is left out, because runs share it.
    """
    machine = records.read_object(run_dir / "facts.json") or {}
    for name in NOT_SHARED:
        machine.pop(name, None)
    planned = records.read_object(run_dir / "plan.json") or {}
    # A stage may have several folders, after a change of its settings: the newest counts.
    manifests: dict[str, Path] = {}
    for path in sorted(run_dir.glob("stages/*/*/manifest.json"), key=_modification_time):
        manifests[path.parent.parent.name] = path
    rows = []
    for name, path in manifests.items():
        manifest = records.read_object(path)
        if manifest is None or manifest["kind"] == "beton":
            continue
        fields = machine | {
            "nodes": int(run_dir.name.removeprefix("nodes-")),
            "world_size": manifest["world_size"],
            "kind": manifest["kind"],
            "wall_s": manifest["seconds"],
            "peak_host_mib": _mib(manifest.get("peak_host_bytes")),
            "peak_gpu_mib": _mib(manifest.get("peak_gpu_bytes")),
        }
        if name in planned:
            fields["planned_mib"] = _mib(planned[name])
        benchmark = "other stages"
        timing = records.read_object(path.with_name("timing.json")) or {}
        if timing.get("images_per_s") is not None:
            benchmark = "trainings"
            fields |= training_fields(timing)
        rows.append({"benchmark": benchmark, "row": name, **fields})
    return rows


def training_fields(timing: Mapping[str, Any]) -> dict[str, Any]:
    """timing.json as fields of a row: rate, sections, bottleneck, slowest rank.

    The shares of the sections add up to 1; `waiting` is for slower ranks.
    """
    seconds = np.array([timing["seconds_by_rank"][name] for name in SECTIONS]).T
    shares = section_fractions(seconds)
    shares["waiting"] = max(0.0, 1.0 - sum(shares.values()))
    fields = {
        "images_per_s": timing["images_per_s"],
        "steps": timing["steps"],
        "step_ms": round(1000 * float(seconds.sum(1).mean()) / timing["steps"], 3),
        "global_batch": timing["setup"]["global_batch"],
        "first_step_s": timing["first_step_s"],
        "sections": {name: round(share, 4) for name, share in shares.items() if share > 0},
        "waits_for": timing["waits_for"],
        "bottleneck": timing["bottleneck"],
    }
    if len(seconds) > 1:
        fields |= slowest_rank(seconds, timing["setup"]["hosts"])
    return fields


def slowest_rank(seconds: np.ndarray, hosts: Sequence[str]) -> dict[str, Any]:
    """The rank whose own work takes longest, its host, and how far it is behind the median.

    seconds: [W, len(SECTIONS)]. Own work is all but all-reduce, which includes waiting.
    """
    busy = seconds.sum(1) - seconds[:, SECTIONS.index("all_reduce")]
    worst = int(busy.argmax())
    fields = {
        "worst_rank": worst,
        "worst_behind": round(float(busy[worst] / np.median(busy) - 1), 3),
    }
    if worst < len(hosts):
        fields["worst_host"] = hosts[worst]
    return fields


def problems(run_dir: Path) -> list[str]:
    """Why figures of a run folder are missing; [] if all are there."""
    found = []
    for path in sorted(run_dir.glob("rows/*.err")):
        if not path.with_suffix(".jsonl").exists():
            found.append(f"{path.stem}: {_last_line(path) or 'no error message'}")
    if not (run_dir / "lock").exists():  # the first file that a job creates
        was_submitted = (run_dir / "slurm").is_dir()
        return ["its job has not started" if was_submitted else "not submitted"]
    if (run_dir / "DONE").exists():
        return found
    if (run_dir / "FATAL_ERROR").is_file():
        return [*found, f"ended by a fatal error: {_last_line(run_dir / 'FATAL_ERROR')}"]
    if (run_dir / "STOPPED").is_file():
        return [*found, f"stopped before its end {_last_line(run_dir / 'STOPPED')}"]
    faults = records.read_objects(run_dir / "logs" / "faults.jsonl")
    last_fault = f"; the last fault: {faults[-1]['fault']}" if faults else ""
    return [*found, f"not finished yet{last_fault}"]


def _modification_time(path: Path) -> float:
    return path.stat().st_mtime


def _mib(num_bytes: int | None) -> int | None:
    return None if num_bytes is None else round(num_bytes / 2**20)


def _last_line(path: Path) -> str:
    return (records.read_text(path).splitlines() or [""])[-1]
