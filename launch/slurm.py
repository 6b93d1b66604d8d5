"""The door to a cluster: python launch/slurm.py --nodes 4 CONFIG [dotted.override=value ...]

Reads, validates, submits one job through submitit; the job relaunches and requeues itself (launch/sbatch_script.py).
    python launch/slurm.py --dry-run CONFIG ...     the batch script and the plan, nothing submitted
    python launch/slurm.py status|follow|cancel RUN
    python launch/slurm.py --nodes 1,2,4 --benchmark [run,step,...] CONFIG ...     how it scales, on one page (docs/benchmarks.md)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # `python launch/slurm.py` from a checkout

from launch import sbatch_script as batch  # noqa: E402
from launch import submission, watch

ROOT = Path(__file__).resolve().parents[1]
OTHER = ("setup", "sbatch", "srun")  # fields that flags give piece by piece


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code (2: a mistake of the user's, said in one line; nothing was submitted)."""
    argv = sys.argv[1:] if argv is None else argv
    from dist_scan.config import ConfigError

    try:
        if argv and argv[0] in watch.COMMANDS:
            return watch.main(argv)
        args = arguments(argv)
        print(
            f"reading {args.config}"
            + " and looking at its images" * (not args.no_data_check and not args.images),
            file=sys.stderr,
            flush=True,
        )  # seconds of imports
        refuse_empty(args)
        if args.benchmark:
            from launch import benchmark

            return benchmark.main(args, read, counts(args.images))
        run = read(args)
        text = batch.script(
            run.slurm, run.run_dir.resolve(), run.name, sys.executable, ROOT, run.runtime.relaunches
        )
        submission.check(run.run_dir, text, run.slurm.setup)
        if args.dry_run:
            from launch.plan import plan

            print(text)
            print(plan(run, args.tflops, counts(args.images)))
            return 0
        return submit(run, text, args.follow)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; every field of `slurm:` is a flag of the same name."""
    from dist_scan.config import SlurmConfig

    parser = argparse.ArgumentParser(
        prog="launch/slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", help="dotted.path=value, applied before validation")
    for name, field in SlurmConfig.model_fields.items():
        if name not in OTHER:
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                metavar="N" if "int" in str(field.annotation) else "TEXT",
                help=field.description,
            )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a shell line before the run; may be given again",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other sbatch option; may be given again",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script and the plan, submit nothing"
    )
    parser.add_argument(
        "--tflops", type=float, help="sustained TFLOP/s of one process, for the plan's hours"
    )
    parser.add_argument(
        "--images",
        metavar="TRAIN[,VAL]",
        help="how many images, for the plan, where they cannot be counted here (implies --no-data-check)",
    )
    parser.add_argument(
        "--follow", action="store_true", help="show the run's progress until it ends"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="look at the first 300 steps of each training: a trace, and what it waits for in words",
    )
    parser.add_argument(
        "--no-data-check",
        action="store_true",
        help="do not look at the images first (they lie where only the nodes see them)",
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAMES",
        help="one short job for each number in --nodes 1,2,4, then one page of how it scales: `run` (the default: the "
        "config's own stages, trainings cut short) and names of benchmarks that work over nodes, with commas",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=300,
        help="with --benchmark: steps of each training (default %(default)s)",
    )
    parser.add_argument(
        "--weak",
        action="store_true",
        help="with --benchmark: batches grow with the nodes; the config's are those of the fewest",
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="with --benchmark: let the jobs run beside each other",
    )
    return parser.parse_intermixed_args(named(argv))


def named(argv: list[str]) -> list[str]:
    """`--benchmark CONFIG` means `--benchmark run CONFIG`: what stands after it are names unless it looks like something else."""
    at = argv.index("--benchmark") if "--benchmark" in argv else len(argv)
    after = "".join(argv[at + 1 : at + 2])
    plain = re.fullmatch(r"[A-Za-z0-9_,]+", after) and not Path(after).exists()
    return argv if at == len(argv) or plain else [*argv[: at + 1], "run", *argv[at + 1 :]]


def read(args: argparse.Namespace):
    """The validated RunConfig with the flags in its `slurm:` block. Raises ConfigError; looks at the data unless told not to."""
    from dist_scan.config import ConfigError, SlurmConfig
    from dist_scan.preflight import check_data
    from dist_scan.run_config import load_config

    given = {
        name: getattr(args, name)
        for name in SlurmConfig.model_fields
        if name not in OTHER and getattr(args, name) is not None
    }
    # a number stays a number (nodes), what sbatch reads as text stays text (time 30, mem 4000)
    if "," in str(given.get("nodes")):
        raise ConfigError(
            f"--nodes {given['nodes']}: a run takes one number; several go with --benchmark"
        )
    flags = [
        f"slurm.{k}={v if 'int' in str(SlurmConfig.model_fields[k].annotation) else json.dumps(v)}"
        for k, v in given.items()
    ]
    if args.setup:
        flags.append(f"slurm.setup={json.dumps(args.setup)}")
    for text in args.sbatch:
        key, equals, value = text.lstrip("-").partition("=")
        flags.append(f"slurm.sbatch.{key}={json.dumps(value) if equals else 'true'}")
    run = load_config(
        args.config, [*["runtime.profile=300"] * args.profile, *args.overrides, *flags]
    )
    for name, stage in run.stages.items():
        try:
            stage.check_ranks(name, run.slurm.world_size)
        except ValueError as error:
            raise ConfigError(
                f"{error} ({run.slurm.nodes} nodes x {run.slurm.tasks_per_node})"
            ) from None
    if not args.no_data_check and not args.images:
        try:
            check_data(run)
        except ConfigError as error:
            raise ConfigError(
                f"{error}\nWhere only the nodes see the images: --no-data-check, and --images 1281167,50000 (how many) for the plan"
            ) from None
    return run


def refuse_empty(args: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that was given nothing (a shell variable that is not set), and for an arithmetic speed that cannot be."""
    from dist_scan.config import ConfigError, SlurmConfig

    empty = [
        name
        for name in SlurmConfig.model_fields
        if name not in OTHER and getattr(args, name) is not None and not getattr(args, name).strip()
    ]
    if empty:
        raise ConfigError(
            f"--{empty[0].replace('_', '-')} '': given without a value; give one, or leave the flag out"
        )
    if args.tflops is not None and not 0 < args.tflops < float("inf"):
        raise ConfigError(f"--tflops {args.tflops:g}: allowed: a number above 0")


def counts(text: str | None) -> dict[str, int] | None:
    """`1281167,50000` -> {train, val}; None when nothing was said. Raises ConfigError."""
    from dist_scan.config import ConfigError

    if text is None:
        return None
    parts = text.split(",")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]{1,18}", p) and int(p) for p in parts):
        raise ConfigError(
            f"--images: '{text}'; allowed: one or two whole numbers, as in 1281167,50000"
        )
    return dict(zip(("train", "val"), map(int, parts)))


def submit(run, text: str, follow: bool) -> int:
    """One run, one job; told in a few lines."""
    job_id, run_dir = submission.place(run, text), run.run_dir.resolve()
    here, folder = shlex.quote(os.path.relpath(sys.argv[0])), shlex.quote(str(run_dir))
    print(
        f"submitted job {job_id}: {run.name}, {run.slurm.nodes} nodes x {run.slurm.tasks_per_node}\n"
        f"  run folder  {run_dir}\n  job's log   {run_dir}/slurm/{job_id}.out\n  progress    {run_dir}/logs/run.log\n"
        f"  follow      python {here} follow {folder}\n  status      python {here} status {folder}\n"
        f"  cancel      python {here} cancel {folder}\n  resume      the same command again"
    )
    return watch.follow(run_dir) if follow else 0


if __name__ == "__main__":
    sys.exit(main())
