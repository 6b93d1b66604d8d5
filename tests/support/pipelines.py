"""A pipeline run in the test's own process."""

from __future__ import annotations

from pathlib import Path

from dist_scan.engine.stop import StopFlag
from dist_scan.pipeline import Pipeline
from dist_scan.run_config import load_config
from dist_scan.world.world import current


def run_pipeline(config: Path, run_dir: Path, *overrides: str) -> tuple[dict[str, Path], list[str]]:
    """Run a config in run_dir. Returns the folder of each stage, and the lines of the log."""
    run = load_config(config, [f"runtime.run_dir={run_dir}", *overrides])
    lines: list[str] = []
    folders = Pipeline(run, current(), StopFlag(), lines.append).run()
    return folders, lines
