"""The whole way, as a user starts it: images in, report out; seconds to the first step, of every stage, and in all.

    python -m benchmarks.pipeline [--config configs/quickstart.yaml] [--processes N] [override ...]

A row for the start (command to the first training step's row in metrics.jsonl), one per stage, and one for the whole with the scores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import ROOT, emit

QUICK = [
    "data.train.limit=400",
    "stages.pretext.epochs=2",
    "stages.pretext.network.width=8",
    "stages.pretext.global_batch=96",
    "stages.heads.epochs=4",
    "stages.heads.global_batch=96",
    "stages.selflabelling.epochs=1",
    "stages.selflabelling.global_batch=96",
    "stages.selflabelling.method.threshold=0.2",
]


def run(command: list[str], run_dir: Path) -> tuple[float, float | None]:
    """(seconds in all, seconds until the first row of a training). Raises RuntimeError with the output's end when the run fails."""
    began, first = time.monotonic(), None
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and any(
                p.stat().st_size for p in run_dir.glob("logs/*.metrics.jsonl")
            ):
                first = time.monotonic() - began
            time.sleep(0.02)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"the run ended with {process.returncode}: ...{said.read()[-800:]}")
    return time.monotonic() - began, first


def main() -> None:
    """One run in a folder of its own, told in rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="dotted.path=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        whole_s, first_s = run(
            [
                sys.executable,
                str(ROOT / "launch" / "local.py"),
                args.config,
                "--processes",
                str(args.processes),
                f"runtime.run_dir={run_dir}",
                *args.overrides,
            ],
            run_dir,
        )
        facts = json.loads((run_dir / "report.json").read_text())
    where = {
        "config": Path(args.config).stem,
        "processes": args.processes,
        "images": facts["num_images"],
    }
    emit({"row": "first step", **where, "wall_s": None if first_s is None else round(first_s, 2)})
    for name, seconds in facts["stage_seconds"].items():
        timing, memory = facts["stage_timing"].get(name, {}), facts["stage_memory"].get(name, {})
        emit(
            {
                "row": name,
                **where,
                "wall_s": round(seconds, 2),
                "images_per_s": timing.get("images_per_s"),
                "first_step_s": timing.get("first_step_s"),
                "waits_for": timing.get("waits_for"),
                "peak_host_mib": round((memory.get("peak_host_bytes") or 0) / 2**20),
            }
        )
    emit(
        {
            "row": "whole",
            **where,
            "wall_s": round(whole_s, 2),
            "acc": (facts.get(facts["best"]) or {}).get("acc"),
        }
    )


if __name__ == "__main__":
    main()
