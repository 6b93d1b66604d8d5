"""A whole run as a user starts it: seconds to the first step, of every stage, and in total.

    python -m benchmarks.pipeline [--config configs/quickstart.yaml] [--processes N] [override ...]

One row for the start (from the command to the first row of a training in metrics.jsonl), one per
stage, and one for the whole run with its accuracy.
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


def has_first_step(run_dir: Path) -> bool:
    """Whether a training has written its first row."""
    return any(path.stat().st_size for path in run_dir.glob("logs/*.metrics.jsonl"))


def run(command: list[str], run_dir: Path) -> tuple[float, float | None]:
    """(seconds in total, seconds until the first step). Raises RuntimeError if the run fails."""
    begin = time.monotonic()
    first_step_s = None
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first_step_s is None and has_first_step(run_dir):
                first_step_s = time.monotonic() - begin
            time.sleep(0.02)
        if process.returncode:
            output.seek(0)
            end = output.read()[-800:]
            raise RuntimeError(f"the run ended with {process.returncode}: ...{end}")
    return time.monotonic() - begin, first_step_s


def main() -> None:
    """Run once in a temporary folder and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="dotted.path=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "launch" / "local.py"), args.config]
        command += ["--processes", str(args.processes), f"runtime.run_dir={run_dir}"]
        total_s, first_step_s = run([*command, *args.overrides], run_dir)
        report = json.loads((run_dir / "report.json").read_text())
    fields = {
        "config": Path(args.config).stem,
        "processes": args.processes,
        "images": report["num_images"],
    }
    start_s = None if first_step_s is None else round(first_step_s, 2)
    emit({"row": "first step", **fields, "wall_s": start_s})
    for name, stage_s in report["stage_seconds"].items():
        timing = report["stage_timing"].get(name, {})
        peak_bytes = report["stage_memory"].get(name, {}).get("peak_host_bytes") or 0
        emit(
            {
                "row": name,
                **fields,
                "wall_s": round(stage_s, 2),
                "images_per_s": timing.get("images_per_s"),
                "first_step_s": timing.get("first_step_s"),
                "waits_for": timing.get("waits_for"),
                "peak_host_mib": round(peak_bytes / 2**20),
            }
        )
    accuracy = (report.get(report["best"]) or {}).get("acc")
    emit({"row": "whole", **fields, "wall_s": round(total_s, 2), "acc": accuracy})


if __name__ == "__main__":
    main()
