"""`launch/slurm.py --nodes 1,2,4 --benchmark`: one job per number of nodes, one after another, then one page of how it scales.

A job takes its own folder, FOLDER/nodes-N. It runs the named benchmarks over all its ranks and then the config's own stages, the trainings
cut to --steps, and last of all draws FOLDER/scaling.html anew from whatever is there: nobody has to wait for it, and a job that fails is
named on the page instead of holding it up. All numbers of nodes are validated before the first job is submitted.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import sbatch_script as batch
from launch import submission, watch

ROOT = Path(__file__).resolve().parents[1]
RUN = "run"  # the config's own stages
MOST_ROWS = 200_000  # of the made-up features that neighbours and kmeans are timed on
HARDWARE = (
    "gpus_per_node",
    "processes_per_node",
    "cpus_per_task",
    "partition",
    "constraint",
)  # of a job, besides its number of nodes
Read = Callable[[argparse.Namespace], Any]


def main(args: argparse.Namespace, read: Read, counts: dict[str, int] | None) -> int:
    """Returns the exit code. `read` validates one run (launch/slurm.py), `counts`: how many images, where that was said. Raises ConfigError."""
    from dist_scan.run_config import load_config

    wanted, numbers = names(args.benchmark), node_counts(args.nodes)
    check(args, numbers)
    base = load_config(args.config, args.overrides)
    sizes = counts or ({} if args.no_data_check else count(base))
    runs = plan(args, read, base, numbers, sizes)
    folder, suite = runs[0].run_dir.parent, commands(wanted, runs, sizes)
    for run in runs:
        submission.check(
            run.run_dir, text(run, suite[run.slurm.nodes], RUN in wanted, folder), run.slurm.setup
        )
    if args.dry_run:
        for run in runs:
            print(text(run, suite[run.slurm.nodes], RUN in wanted, folder))
        return 0
    submission.look_for_slurm()
    done = [measured(run, wanted) for run in runs]
    describe(folder, args, wanted, numbers)
    previous = None
    for run, has_figures in zip(runs, done):
        if has_figures:
            print(f"{nodes_of(run)}: measured before, {run.run_dir}")
            continue
        if previous and not args.at_once:
            run = run.model_copy(
                update={
                    "slurm": run.slurm.model_copy(update={"dependency": f"afterany:{previous}"})
                }
            )
        remember_plan(run)
        previous = submission.place(run, text(run, suite[run.slurm.nodes], RUN in wanted, folder))
        print(f"{nodes_of(run)}: job {previous}, {run.run_dir}")
    print(f"page, drawn anew as each job ends: {folder / 'scaling.html'}")
    return follow(folder) if args.follow else 0


def nodes_of(run: Any) -> str:
    """`1 node`, `2 nodes`."""
    return f"{run.slurm.nodes} node{'s' * (run.slurm.nodes > 1)}"


def count(run: Any) -> dict[str, int]:
    """Images of each split. Raises ConfigError with the way out where they cannot be seen from here."""
    from dist_scan.config import ConfigError
    from launch.plan import image_counts

    try:
        return image_counts(run)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nWhere only the nodes see the images say how many there are: --images 1281167,50000"
        ) from None


def names(said: str) -> list[str]:
    """`step,loader` -> [step, loader]. Raises ConfigError naming what there is."""
    from dist_scan.config import ConfigError

    there = [RUN, *over_nodes()]
    found = [name for name in said.split(",") if name]
    unknown = [name for name in found if name not in there]
    if unknown or not found:
        raise ConfigError(
            f"--benchmark {said}: '{unknown[0] if unknown else said}' cannot be measured over nodes; there are: {', '.join(there)}"
        )
    return list(dict.fromkeys(found))


def over_nodes() -> dict[str, list[str]]:
    """Benchmarks that work over the ranks of a job -> their arguments, with {names} of `facts`."""
    from benchmarks.__main__ import find

    return {b.name: b.cluster for b in find() if b.cluster is not None}


def node_counts(said: str | None) -> list[int]:
    """`1,2,4` -> [1, 2, 4], ascending. Raises ConfigError."""
    from dist_scan.config import ConfigError

    parts = (said or "").split(",")
    if not all(re.fullmatch("[0-9]{1,9}", p) and int(p) for p in parts) or len(
        set(map(int, parts))
    ) < len(parts):
        raise ConfigError(
            f"--nodes {said}: --benchmark needs numbers of nodes, each once, with commas between them: --nodes 1,2,4"
        )
    return sorted(map(int, parts))


def check(args: argparse.Namespace, numbers: Sequence[int]) -> None:
    """Raises ConfigError for a number of steps, or of nodes with --weak, that cannot be."""
    from dist_scan.config import ConfigError

    if args.steps < 2:
        raise ConfigError(
            f"--steps {args.steps}: the first step of a training is left out of the figures; allowed: 2 and more"
        )
    fewest, uneven = numbers[0], [n for n in numbers if args.weak and n % numbers[0]]
    if uneven:
        raise ConfigError(
            f"--weak: batches grow with the nodes, but {uneven[0]} is no multiple of {fewest}; choose --nodes {fewest},{2 * fewest},..."
        )


def plan(
    args: argparse.Namespace,
    read: Read,
    base: Any,
    numbers: Sequence[int],
    sizes: Mapping[str, int],
) -> list[Any]:
    """A validated RunConfig for each number of nodes, fewest first. The data is looked at once, with the largest batches."""
    folder = (
        Path(base.runtime.run_dir)
        if base.runtime.run_dir
        else Path("runs") / f"{base.name}-benchmark"
    ).resolve()
    fewest, runs = numbers[0], []
    for n in reversed(numbers):
        ours = [
            *cut(base, args.steps, sizes, n // fewest if args.weak else 1),
            f"runtime.cache_dir={base.runtime.cache_dir or folder / 'cache'}",
        ]
        grown = (
            [
                f"stages.{name}.global_batch={stage.global_batch * n // fewest}"
                for name, stage in trainings(base).items()
            ]
            if args.weak
            else []
        )
        one = argparse.Namespace(
            **vars(args)
            | {
                "nodes": str(n),
                "overrides": [
                    *ours,
                    *args.overrides,
                    *grown,
                    f"runtime.run_dir={folder / f'nodes-{n}'}",
                ],
                "no_data_check": args.no_data_check or bool(runs),
            }
        )
        runs.append(read(one))
    return runs[::-1]


def trainings(run: Any) -> dict[str, Any]:
    """The stages that train."""
    return {name: stage for name, stage in run.stages.items() if hasattr(stage, "steps_per_epoch")}


def cut(run: Any, steps: int, sizes: Mapping[str, int], growth: int = 1) -> list[str]:
    """Overrides that end each training after about so many steps: fewer in an epoch, and no more epochs than that takes. `sizes`: images
    of each split (where they are not known an epoch is taken to be long enough)."""
    found = []
    for name, stage in trainings(run).items():
        images = sizes.get(stage.images_split(run.stages))
        epoch = (
            steps
            if images is None
            else max(
                1,
                int(images * (1 - getattr(stage, "held_out_share", 0)))
                // (stage.global_batch * growth),
            )
        )
        epoch = min(steps, epoch, stage.steps_per_epoch or epoch)
        found += [
            f"stages.{name}.steps_per_epoch={epoch}",
            f"stages.{name}.epochs={min(stage.epochs, math.ceil(steps / epoch))}",
        ]
    return found


def commands(
    wanted: Sequence[str], runs: Sequence[Any], sizes: Mapping[str, int]
) -> dict[int, list[list[str]]]:
    """Number of nodes -> [name, argument, ...] of each benchmark but the run itself. Raises ConfigError when the config has not what one needs."""
    templates = over_nodes()
    chosen = [name for name in wanted if name in templates]
    known = facts(runs[0], sizes) if chosen else {}
    found = {}
    for run in runs:
        mine = (
            known
            | {
                "batch": run.stages[known["stage"]].global_batch // run.slurm.world_size,
                "folder": run.run_dir / "work",
            }
            if chosen
            else {}
        )
        found[run.slurm.nodes] = [
            [name, *(word.format_map(mine) for word in templates[name])] for name in chosen
        ]
    return found


def facts(run: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What a benchmark takes from a config: its network, image size, batch, how many images, neighbours and clusters."""
    from dist_scan.config import ConfigError
    from launch.plan import measure

    name, stage = next(
        ((name, s) for name, s in trainings(run).items() if getattr(s, "network", None)), ("", None)
    )
    if stage is None:
        raise ConfigError(
            "--benchmark: no stage of this config trains a fresh network, which the benchmarks are sized by; "
            "measure only its own stages (--benchmark run)"
        )
    net = measure(stage.network, run.data.size)
    owners = [owner for s in run.stages.values() for owner in (s, getattr(s, "method", None))]
    clusters = [n for owner in owners for n in _numbers(getattr(owner, "num_clusters", None))]
    return {
        "model": stage.network.name,
        "stem": stage.network.stem,
        "width": stage.network.width,
        "size": run.data.size,
        "precision": "bf16" if stage.precision == "bf16" else "fp32",
        "stage": name,
        "gradient": 4 * net.parameters,
        "dim": net.dim,
        "rows": min(sizes.get("train", MOST_ROWS), MOST_ROWS),
        "k": next((s.num_neighbours for s in run.stages.values() if s.kind == "neighbours"), 20),
        "clusters": max(clusters, default=1000),
        "source": run.data.train.source,
        "stored": run.data.stored,
        "resolution": run.data.resolution,
    }


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or ())


def describe(
    folder: Path, args: argparse.Namespace, wanted: Sequence[str], numbers: Sequence[int]
) -> None:
    """FOLDER/benchmark.json: what was asked for; the page says what of it is missing."""
    from dist_scan.storage.atomic import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / watch.BENCHMARK,
        {
            "config": args.config,
            "overrides": args.overrides,
            "benchmarks": list(wanted),
            "nodes": list(numbers),
            "steps": args.steps,
            "weak": args.weak,
            "at_once": args.at_once,
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
        },
    )


def remember_plan(run: Any) -> None:
    """RUN/plan.json: the memory that each training is expected to take, to be held against what it took."""
    from dist_scan.storage.atomic import write_json
    from launch.plan import memory

    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run.run_dir / "plan.json", memory(run))


def measured(run: Any, wanted: Sequence[str]) -> bool:
    """Whether this number of nodes has all its figures. Raises ConfigError when its folder holds those of other settings."""
    from dist_scan.config import ConfigError
    from dist_scan.run_config import load_config

    if (run.run_dir / "config.yaml").is_file():
        before = load_config(run.run_dir / "config.yaml")
        changed = [
            part
            for part in ("data", "stages", "seed")
            if getattr(before, part) != getattr(run, part)
        ]
        changed += [
            f"slurm.{part}"
            for part in HARDWARE
            if getattr(before.slurm, part) != getattr(run.slurm, part)
        ]
        if changed:
            raise ConfigError(
                f"'{run.run_dir}' holds a benchmark with other {' and '.join(changed)}, and one page cannot show both; "
                "give this one another folder with runtime.run_dir=PATH"
            )
    return (run.run_dir / "DONE").exists() and all(
        (run.run_dir / "rows" / f"{name}.jsonl").exists() for name in wanted if name != RUN
    )


def text(run: Any, suite: Sequence[Sequence[str]], with_run: bool, folder: Path) -> str:
    """The batch script of one number of nodes."""
    python = run.slurm.python or sys.executable
    command = f"-m benchmarks.scaling {shlex.quote(str(folder))}"
    draw = f'one_more_step; {_alone(run.slurm)} "$PYTHON" {command} || say {shlex.quote(f"the page could not be drawn here; draw it with: {python} {command}")}'
    return batch.script(
        run.slurm,
        run.run_dir,
        f"{run.name}-{run.slurm.nodes}",
        sys.executable,
        ROOT,
        run.runtime.relaunches,
        _before(run.slurm, suite, with_run),
        draw,
    )


def _alone(options: Any) -> str:
    return batch.step(options, nodes=1, ntasks=1, ntasks_per_node=1)


def _before(options: Any, suite: Sequence[Sequence[str]], with_run: bool) -> str:
    """What the job does before the run: write down what the machine is, then the benchmarks; a requeued job keeps the rows it has."""
    ranks = shlex.quote(f'{batch.identity(options)}; exec "$PYTHON" -m "benchmarks.$0" "$@"')
    return f"""
rm -rf "$RUN/work"; mkdir -p "$RUN/rows" "$RUN/work"  # a start that was cut off may have left half a table
[ -s "$RUN/facts.json" ] || {{
  one_more_step
  if {_alone(options)} "$PYTHON" -m benchmarks.rows >"$RUN/facts.part"; then mv "$RUN/facts.part" "$RUN/facts.json"; else say "the page will not say what machine this is"; fi
}}
measure() {{  # its rows into the run folder; one that fails is said, and ends nothing
  [ -e "$RUN/rows/$1.jsonl" ] && return
  meet; say "benchmark $*"
  if {batch.step(options)} bash -c {ranks} "$@" >"$RUN/rows/$1.part" 2>"$RUN/rows/$1.err"
  then mv "$RUN/rows/$1.part" "$RUN/rows/$1.jsonl"; say "benchmark $1: done"
  else say "benchmark $1: failed, $(tail -n 1 "$RUN/rows/$1.err")"; fi
}}
{chr(10).join("measure " + shlex.join(map(str, command)) for command in suite)}
rm -rf "$RUN/work"{"" if with_run else f'{chr(10)}date +%FT%T >"$RUN/DONE"; exit 0'}
""".strip()


def follow(folder: Path) -> int:
    """Show each job's progress until the last one ends."""
    code = watch.follow_all(watch.run_dirs(folder))
    print(f"page: {folder / 'scaling.html'}")
    return code
