"""What a finished or broken run folder says about speed: a row per stage from its timing.json and manifest, and what is missing.

Read by benchmarks/scaling.py from the folders nodes-N that `launch/slurm.py --benchmark` makes. Pure reading: no torch, no cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.monitoring.bottleneck import section_fractions
from dist_scan.monitoring.step_timer import SECTIONS

MARKERS = {"MISTAKE": "ended by a fatal error: ", "STOPPED": "stopped before its end "}


def stage_rows(run_dir: Path) -> list[dict[str, Any]]:
    """A row per finished stage of the run in a folder nodes-N, in the order in which they ended. The building of .beton files is shared between runs and left out."""
    where = {
        k: v
        for k, v in (_json(run_dir / "facts.json") or {}).items()
        if k not in ("benchmark", "configuration", "load")
    }
    planned = _json(run_dir / "plan.json") or {}
    newest: dict[str, Path] = {}
    for path in sorted(run_dir.glob("stages/*/*/manifest.json"), key=lambda p: p.stat().st_mtime):
        newest[path.parent.parent.name] = path
    found = []
    for name, path in newest.items():
        manifest = _json(path)
        if manifest is None or manifest["kind"] == "beton":
            continue
        common = (
            where
            | {
                "nodes": int(run_dir.name.removeprefix("nodes-")),
                "world_size": manifest["world_size"],
                "kind": manifest["kind"],
                "wall_s": manifest["seconds"],
                "peak_host_mib": _mib(manifest.get("peak_host_bytes")),
                "peak_gpu_mib": _mib(manifest.get("peak_gpu_bytes")),
            }
            | ({"planned_mib": _mib(planned[name])} if name in planned else {})
        )
        timing = _json(path.with_name("timing.json"))
        trained = timing is not None and timing.get("images_per_s") is not None
        found.append(
            {
                "benchmark": "trainings" if trained else "other stages",
                "row": name,
                **common,
                **(training(timing) if trained else {}),
            }
        )
    return found


def training(timing: Mapping[str, Any]) -> dict[str, Any]:
    """timing.json as fields of a row: rate, share of every section (adding up to 1; `waiting` is for slower ranks), verdict, slowest rank."""
    seconds = np.array([timing["seconds_by_rank"][name] for name in SECTIONS]).T
    share = section_fractions(seconds)
    share["waiting"] = max(0.0, 1.0 - sum(share.values()))
    row = {
        "images_per_s": timing["images_per_s"],
        "steps": timing["steps"],
        "step_ms": round(1000 * float(seconds.sum(1).mean()) / timing["steps"], 3),
        "global_batch": timing["setting"]["global_batch"],
        "first_step_s": timing["first_step_s"],
        "sections": {name: round(value, 4) for name, value in share.items() if value > 0},
        "waits_for": timing["waits_for"],
        "verdict": timing["verdict"],
    }
    if len(seconds) > 1:
        own = seconds.sum(1) - seconds[:, SECTIONS.index("all_reduce")]
        worst = int(own.argmax())
        hosts = timing["setting"]["hosts"]
        row |= {
            "worst_rank": worst,
            "worst_behind": round(float(own[worst] / np.median(own) - 1), 3),
        } | ({"worst_host": hosts[worst]} if worst < len(hosts) else {})
    return row


def problems(run_dir: Path) -> list[str]:
    """Why figures of this folder are missing, in words; [] when all are there."""
    found = [
        f"{path.stem}: {_last_line(path) or 'no word of why'}"
        for path in sorted(run_dir.glob("rows/*.err"))
        if not path.with_suffix(".jsonl").exists()
    ]
    if not (run_dir / "lock").exists():  # the first thing that a job takes
        return ["not submitted" if not (run_dir / "slurm").is_dir() else "its job has not begun"]
    if (run_dir / "DONE").exists():
        return found
    for marker, text in MARKERS.items():
        if (run_dir / marker).is_file():
            return [*found, text + _last_line(run_dir / marker)]
    fault = _parsed(_last_line(run_dir / "logs" / "faults.jsonl"))
    why = f"; the last fault: {fault['fault']}" if fault else ""
    return [*found, f"not finished yet{why}"]


def _mib(count: int | None) -> int | None:
    return None if count is None else round(count / 2**20)


def _last_line(path: Path) -> str:
    try:
        return (path.read_text(errors="replace").strip().splitlines() or [""])[-1]
    except OSError:
        return ""


def _json(path: Path) -> Any:
    """None for what is not there or torn."""
    try:
        return _parsed(path.read_text())
    except OSError:
        return None


def _parsed(text: str) -> Any:
    """None for what is torn."""
    try:
        return json.loads(text)
    except ValueError:
        return None
