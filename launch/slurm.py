"""Run a config on a Slurm cluster: python launch/slurm.py --nodes 4 CONFIG [dotted.path=value ...]

Reads and validates the config and submits one job through submitit. The job relaunches and requeues
itself (launch/sbatch_script.py).

    python launch/slurm.py --dry-run CONFIG ...      print the batch script and the plan
    python launch/slurm.py status|follow|cancel RUN
    python launch/slurm.py --nodes 1,2,4 --benchmark [run,step,...] CONFIG ...
                                                     one page: how it scales (docs/benchmarks.md)
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

# This file is run by its path, from a checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_scan.config import FATAL_ERROR, ConfigError, RunConfig  # noqa: E402  needs the path above
from launch import benchmark, command_line, submission, watch  # noqa: E402
from launch.plan import plan  # noqa: E402
from launch.sbatch_script import BatchJob, build_script  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; 2 for an invalid setting, named in one line: nothing is submitted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in watch.COMMANDS:
            return watch.main(argv)
        return launch(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return FATAL_ERROR


def launch(argv: list[str]) -> int:
    """Submit a run or a benchmark, or print what would be submitted. Raises ConfigError."""
    args = command_line.parse_slurm_arguments(argv, description=str(__doc__))
    images = " and checking its images" if command_line.checks_data(args) else ""
    print(f"reading {args.config}{images}", file=sys.stderr, flush=True)
    if args.benchmark:
        return benchmark.main(args)
    run = command_line.load_slurm_run(args)
    text = build_script(
        BatchJob(run.slurm, run.run_dir.resolve(), run.name, run.runtime.relaunches)
    )
    submission.check(run.run_dir, text, run.slurm.setup)
    if args.dry_run:
        print(text)
        print(plan(run, args.tflops, command_line.stated_image_counts(args)))
        return 0
    job_id = submission.submit(run, text)
    print(submitted_text(run, job_id))
    return watch.follow(run.run_dir.resolve()) if args.follow else 0


def submitted_text(run: RunConfig, job_id: str) -> str:
    """What the user reads after a submission; its commands can be pasted into a shell."""
    run_dir = run.run_dir.resolve()
    folder = shlex.quote(str(run_dir))
    program = f"python {shlex.quote(os.path.relpath(sys.argv[0]))}"
    return (
        f"submitted job {job_id}: {run.name}, {run.slurm.nodes} nodes x "
        f"{run.slurm.tasks_per_node}\n"
        f"  run folder  {run_dir}\n"
        f"  job's log   {run_dir}/slurm/{job_id}.out\n"
        f"  progress    {run_dir}/logs/run.log\n"
        f"  follow      {program} follow {folder}\n"
        f"  status      {program} status {folder}\n"
        f"  cancel      {program} cancel {folder}\n"
        f"  resume      the same command again"
    )


if __name__ == "__main__":
    sys.exit(main())
