"""Start the product as a user does: launch/local.py as a process, with a quickstart made small."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
SMALL = ["data.train.limit=400", "stages.pretext.epochs=2", "stages.pretext.network.width=8", "stages.pretext.global_batch=96",
         "stages.heads.epochs=4", "stages.heads.global_batch=96", "stages.selflabelling.epochs=1", "stages.selflabelling.global_batch=96",
         "stages.selflabelling.method.threshold=0.2"]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: two tests run at once on two cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def command(run_dir: Path, *overrides: str, config: str = "quickstart", processes: int = 1) -> list[str]:
    """The command line of one run in run_dir."""
    small = SMALL if config == "quickstart" else []
    return [*LOCAL, str(ROOT / "configs" / f"{config}.yaml"), "--processes", str(processes), f"runtime.run_dir={run_dir}", *small, *overrides]


def run(run_dir: Path, *overrides: str, config: str = "quickstart", processes: int = 1, timeout_s: float = 240, **env: str):
    """Run to the end; returns the finished process with its output as text."""
    return subprocess.run(command(run_dir, *overrides, config=config, processes=processes), env=environment(**env), timeout=timeout_s,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=run_dir.parent)


def report(run_dir: Path) -> dict:
    """report.json without what a clock or a memory meter says."""
    facts = json.loads((run_dir / "report.json").read_text())

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "stage_seconds", "stage_memory", "stage_timing")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(facts)
