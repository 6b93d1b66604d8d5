"""Command lines of launch/local.py and launch/slurm.py, and the config that they describe."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_scan.config import ConfigError, RunConfig, SlurmConfig

PROFILE_STEPS = 300
SLURM_FLAGS = [name for name in SlurmConfig.model_fields if name not in ("setup", "sbatch", "srun")]
"""Fields of the `slurm:` block that are a flag of the same name (setup and sbatch can be repeated
and are added separately)."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both programs accept: the config, overrides and --profile."""
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", help="dotted.path=value, applied before validation")
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"profile the first {PROFILE_STEPS} steps of each training: a trace, and a text that "
        "says what limits its speed",
    )


def load_run(args: argparse.Namespace, *overrides: str) -> RunConfig:
    """The validated config with the command line's overrides; `overrides` are applied last."""
    from dist_scan.run_config import load_config  # imports torch: not for `slurm.py status`

    profile = [f"runtime.profile={PROFILE_STEPS}"] if args.profile else []
    return load_config(args.config, [*profile, *args.overrides, *overrides])


def check_world_size(run: RunConfig, world_size: int, note: str = "") -> None:
    """Raise ConfigError, with `note` at its end, if a stage cannot run on so many processes."""
    for name, stage in run.stages.items():
        try:
            stage.check_ranks(name, world_size)
        except ValueError as error:
            raise ConfigError(f"{error}{note}") from None


def parse_slurm_arguments(argv: list[str], description: str) -> argparse.Namespace:
    """The command line of launch/slurm.py. Raises ConfigError for an impossible --tflops."""
    parser = argparse.ArgumentParser(
        prog="launch/slurm.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    _add_slurm_arguments(parser)
    _add_plan_arguments(parser)
    _add_benchmark_arguments(parser)
    parser.add_argument(
        "--follow", action="store_true", help="show the run's progress until it ends"
    )
    args = parser.parse_intermixed_args(insert_benchmark_name(argv))
    if args.tflops is not None and not 0 < args.tflops < float("inf"):
        raise ConfigError(f"--tflops {args.tflops:g}: allowed: a number above 0")
    return args


def _add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    for name in SLURM_FLAGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="N" if _is_integer(name) else "TEXT",
            help=SlurmConfig.model_fields[name].description,
        )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a shell line before the run; can be repeated",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other sbatch option; can be repeated",
    )


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script and the plan, submit nothing"
    )
    parser.add_argument(
        "--tflops", type=float, help="sustained TFLOP/s of one process, for the plan's hours"
    )
    parser.add_argument(
        "--images",
        metavar="TRAIN[,VAL]",
        help="number of images, for the plan, if they cannot be counted on this machine (implies "
        "--no-data-check)",
    )
    parser.add_argument(
        "--no-data-check",
        action="store_true",
        help="do not check the images before submission (only the nodes can read them)",
    )


def _add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        metavar="NAMES",
        help="one short job for each number in --nodes 1,2,4, then one page that shows how it "
        "scales: `run` (the default: the config's own stages, shortened trainings) and names of "
        "benchmarks that work over nodes, with commas",
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
        help="with --benchmark: weak scaling, global_batch grows with the number of nodes; the "
        "config's value is for the smallest number",
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="with --benchmark: let the jobs run at the same time",
    )


def insert_benchmark_name(argv: list[str]) -> list[str]:
    """Make `--benchmark CONFIG` mean `--benchmark run CONFIG`.

    The next word is taken for names if it looks like names and is not an existing file.
    """
    if "--benchmark" not in argv:
        return argv
    end = argv.index("--benchmark") + 1
    word = argv[end] if end < len(argv) else ""
    if re.fullmatch(r"[A-Za-z0-9_,]+", word) and not Path(word).exists():
        return argv
    return [*argv[:end], "run", *argv[end:]]


def checks_data(args: argparse.Namespace) -> bool:
    """Whether the images are checked before submission."""
    return not args.no_data_check and not args.images


def load_slurm_run(args: argparse.Namespace) -> RunConfig:
    """The validated config with the flags in its `slurm:` block.

    Checks the world size, and the images unless a flag says not to. Raises ConfigError.
    """
    run = load_run(args, *_slurm_overrides(args))
    nodes = f" ({run.slurm.nodes} nodes x {run.slurm.tasks_per_node})"
    check_world_size(run, run.slurm.world_size, nodes)
    if checks_data(args):
        from dist_scan.preflight import check_sizes, inspect_data  # seconds of imports

        with explain_data_errors():
            check_sizes(run, inspect_data(run).num_images)
    return run


@contextmanager
def explain_data_errors() -> Iterator[None]:
    """Add to a ConfigError what to do if this machine cannot read the images."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nIf only the nodes can read the images: --no-data-check, and for the plan "
            "their number, for example --images 1281167,50000"
        ) from None


def _slurm_overrides(args: argparse.Namespace) -> list[str]:
    if "," in (args.nodes or ""):
        raise ConfigError(f"--nodes {args.nodes}: a run takes one number; several need --benchmark")
    overrides = []
    for name in SLURM_FLAGS:
        value = getattr(args, name)
        if value is None:
            continue
        if not value.strip():  # for example a shell variable that is not set
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} '': the value is empty; give one, or leave the flag out")
        # Integers stay integers (nodes); what sbatch reads as text stays text (--time 30).
        literal = value if _is_integer(name) else json.dumps(value)
        overrides.append(f"slurm.{name}={literal}")
    if args.setup:
        overrides.append(f"slurm.setup={json.dumps(args.setup)}")
    for option in args.sbatch:
        key, equals, value = option.lstrip("-").partition("=")
        overrides.append(f"slurm.sbatch.{key}={json.dumps(value) if equals else 'true'}")
    return overrides


def _is_integer(name: str) -> bool:
    return "int" in str(SlurmConfig.model_fields[name].annotation)


def stated_image_counts(args: argparse.Namespace) -> dict[str, int] | None:
    """--images 1281167,50000 as {train, val}; None without the flag. Raises ConfigError."""
    if args.images is None:
        return None
    counts = parse_counts(args.images)
    if len(counts) not in (1, 2):
        raise ConfigError(
            f"--images: '{args.images}'; allowed: one or two positive integers, as in 1281167,50000"
        )
    return dict(zip(("train", "val"), counts))


def parse_counts(text: str) -> list[int]:
    """`4,1,2` as [4, 1, 2]; [] if a part is not a positive integer."""
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,18}", part) and int(part) for part in parts):
        return []
    return [int(part) for part in parts]
