"""`launch/slurm.py --nodes 1,2,4 --benchmark`: one job per number of nodes, then one page.

Each job has its own run folder, FOLDER/nodes-N. It runs the named benchmarks over all its ranks,
then the config's own stages with each training shortened to --steps. Each job redraws
FOLDER/scaling.html from the results so far; the page names jobs that failed. Every number of nodes
is validated before the first job is submitted.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from dist_scan.config import ConfigError, RunConfig, SlurmConfig
from dist_scan.storage.atomic import write_json
from launch import command_line, submission, watch
from launch.plan import image_counts, measure_network, training_memory
from launch.sbatch_script import BatchJob, build_script, export_rank, srun_command

RUN = "run"
"""Among the names of benchmarks: the config's own stages."""
MAX_ROWS = 200_000
"""Rows of the random features on which neighbours and kmeans are timed, at most."""
EQUAL_FIELDS = (
    "data",
    "stages",
    "seed",
    "slurm.gpus_per_node",
    "slurm.processes_per_node",
    "slurm.cpus_per_task",
    "slurm.partition",
    "slurm.constraint",
)
"""Settings that must be equal on one page."""


@dataclass(frozen=True)
class Suite:
    """What the jobs of one scaling benchmark measure."""

    folder: Path
    with_run: bool
    """Whether the config's own stages are run too."""
    commands: Mapping[int, list[list[str]]]
    """By number of nodes: [name, argument, ...] of each benchmark."""

    def build_script(self, run: RunConfig) -> str:
        """The batch script of one number of nodes."""
        nodes = run.slurm.nodes
        draw = f"-m benchmarks.scaling {shlex.quote(str(self.folder))}"
        python = run.slurm.python or sys.executable
        failed = shlex.quote(f"the page could not be drawn here; draw it with: {python} {draw}")
        return build_script(
            BatchJob(
                run.slurm,
                run.run_dir,
                f"{run.name}-{nodes}",
                run.runtime.relaunches,
                before_start=_before_start(run.slurm, self.commands[nodes], self.with_run),
                at_exit=f'count_step; {_one_task(run.slurm)} "$PYTHON" {draw} || log {failed}',
            )
        )


def main(args: argparse.Namespace) -> int:
    """Submit the jobs, or print their scripts with --dry-run. Returns the exit code.

    Raises ConfigError before anything is submitted.
    """
    from dist_scan.run_config import load_config  # imports torch: not for `slurm.py status`

    # Validate everything.
    names = parse_names(args.benchmark)
    node_counts = parse_node_counts(args.nodes)
    check_arguments(args, node_counts)
    base = load_config(args.config, args.overrides)
    num_images = command_line.stated_image_counts(args)
    if num_images is None:
        with command_line.explain_data_errors():
            num_images = {} if args.no_data_check else image_counts(base)
    runs = load_runs(args, base, node_counts, num_images)
    suite = Suite(runs[0].run_dir.parent, RUN in names, benchmark_commands(names, runs, num_images))
    for run in runs:
        submission.check(run.run_dir, suite.build_script(run), run.slurm.setup)
        if args.dry_run:
            print(suite.build_script(run))
    if args.dry_run:
        return 0

    submission.require_slurm()
    is_measured = [has_all_figures(run, names) for run in runs]
    write_description(suite.folder, args, names, node_counts)
    previous = None
    for run, skip in zip(runs, is_measured):
        if skip:
            print(f"{_format_nodes(run)}: measured before, {run.run_dir}")
        else:
            previous = submit(suite, run, None if args.at_once else previous)
    page = suite.folder / "scaling.html"
    print(f"page, redrawn when each job ends: {page}")
    return watch.follow_all(watch.run_dirs(suite.folder)) if args.follow else 0


def submit(suite: Suite, run: RunConfig, previous: str | None) -> str:
    """Submit the job of one number of nodes, to start after the job `previous`; returns its id."""
    if previous:
        slurm = run.slurm.model_copy(update={"dependency": f"afterany:{previous}"})
        run = run.model_copy(update={"slurm": slurm})
    # The planned memory, to be compared with what each training used.
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run.run_dir / "plan.json", training_memory(run))
    job_id = submission.submit(run, suite.build_script(run))
    print(f"{_format_nodes(run)}: job {job_id}, {run.run_dir}")
    return job_id


def _format_nodes(run: RunConfig) -> str:
    return f"{run.slurm.nodes} node{'s' if run.slurm.nodes > 1 else ''}"


def parse_names(text: str) -> list[str]:
    """`step,loader` as a list without duplicates. Raises ConfigError with the names there are."""
    known = [RUN, *node_benchmarks()]
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        name = unknown[0] if unknown else text
        raise ConfigError(
            f"--benchmark: '{name}' cannot be measured over nodes; allowed: {', '.join(known)}"
        )
    return list(dict.fromkeys(names))


def node_benchmarks() -> dict[str, list[str]]:
    """Benchmarks that run over the ranks of a job, each with its arguments.

    An argument may contain a {name} of `template_values`.
    """
    from benchmarks.__main__ import find_benchmarks

    return {b.name: b.cluster for b in find_benchmarks() if b.cluster is not None}


def parse_node_counts(text: str | None) -> list[int]:
    """`1,2,4` as [1, 2, 4], ascending. Raises ConfigError."""
    counts = command_line.parse_counts(text or "")
    if not counts or len(set(counts)) < len(counts):
        raise ConfigError(
            f"--nodes {text}: --benchmark needs numbers of nodes, each once, with commas between "
            "them: --nodes 1,2,4"
        )
    return sorted(counts)


def check_arguments(args: argparse.Namespace, node_counts: Sequence[int]) -> None:
    """Raise ConfigError for an invalid number of steps, or of nodes with --weak."""
    if args.steps < 2:
        raise ConfigError(
            f"--steps {args.steps}: the first step of a training does not count; allowed: 2 or more"
        )
    fewest = node_counts[0]
    uneven = [count for count in node_counts if count % fewest]
    if args.weak and uneven:
        raise ConfigError(
            f"--weak: batches grow with the nodes, but {uneven[0]} is no multiple of {fewest}; "
            f"choose --nodes {fewest},{2 * fewest},..."
        )


def load_runs(
    args: argparse.Namespace,
    base: RunConfig,
    node_counts: Sequence[int],
    num_images: Mapping[str, int],
) -> list[RunConfig]:
    """A validated config for each number of nodes, fewest first.

    The images are checked once, with the largest batches.
    """
    name = base.runtime.run_dir or Path("runs") / f"{base.name}-benchmark"
    folder = Path(name).resolve()
    cache_dir = base.runtime.cache_dir or folder / "cache"
    fewest = node_counts[0]
    runs: list[RunConfig] = []
    for nodes in sorted(node_counts, reverse=True):
        growth = nodes // fewest if args.weak else 1
        # The user's overrides come after those that shorten the trainings, and take precedence.
        overrides = [
            *shorten_trainings(base, args.steps, num_images, growth),
            f"runtime.cache_dir={cache_dir}",
            *args.overrides,
        ]
        if args.weak:
            for stage_name, stage in trainings(base).items():
                batch = stage.global_batch * nodes // fewest
                overrides.append(f"stages.{stage_name}.global_batch={batch}")
        overrides.append(f"runtime.run_dir={folder / f'nodes-{nodes}'}")
        changes = {
            "nodes": str(nodes),
            "overrides": overrides,
            "no_data_check": args.no_data_check or bool(runs),
        }
        runs.append(command_line.load_slurm_run(argparse.Namespace(**vars(args) | changes)))
    return runs[::-1]


def trainings(run: RunConfig) -> dict[str, Any]:
    """The stages that train."""
    return {name: stage for name, stage in run.stages.items() if hasattr(stage, "steps_per_epoch")}


def shorten_trainings(
    run: RunConfig, steps: int, num_images: Mapping[str, int], growth: int = 1
) -> list[str]:
    """Overrides that end each training after about `steps` steps.

    An epoch gets fewer steps, and there are no more epochs than needed. num_images: by split; an
    epoch of a split that is not in it is taken to be long enough. growth: factor of the batch.
    """
    overrides = []
    for name, stage in trainings(run).items():
        epoch_steps = steps
        images = num_images.get(stage.images_split(run.stages))
        if images is not None:
            trained_images = int(images * (1 - getattr(stage, "held_out_share", 0)))
            epoch_steps = max(1, trained_images // (stage.global_batch * growth))
        epoch_steps = min(steps, epoch_steps, stage.steps_per_epoch or epoch_steps)
        epochs = min(stage.epochs, math.ceil(steps / epoch_steps))
        overrides.append(f"stages.{name}.steps_per_epoch={epoch_steps}")
        overrides.append(f"stages.{name}.epochs={epochs}")
    return overrides


def benchmark_commands(
    names: Sequence[str], runs: Sequence[RunConfig], num_images: Mapping[str, int]
) -> dict[int, list[list[str]]]:
    """By number of nodes: [name, argument, ...] of each benchmark except the run itself.

    Raises ConfigError if the config lacks what a benchmark needs.
    """
    templates = node_benchmarks()
    selected = [name for name in names if name in templates]
    if not selected:
        return {run.slurm.nodes: [] for run in runs}
    values = template_values(runs[0], num_images)
    commands = {}
    for run in runs:
        global_batch = trainings(run)[values["stage"]].global_batch
        values["batch"] = global_batch // run.slurm.world_size
        values["folder"] = run.run_dir / "work"
        commands[run.slurm.nodes] = [
            [name, *(word.format_map(values) for word in templates[name])] for name in selected
        ]
    return commands


def template_values(run: RunConfig, num_images: Mapping[str, int]) -> dict[str, Any]:
    """What the benchmarks take from a config: network, image size, rows, neighbours, clusters."""
    with_network = {name: s for name, s in trainings(run).items() if getattr(s, "network", None)}
    if not with_network:
        raise ConfigError(
            "--benchmark: no stage of this config trains a new network, which sets the size of the "
            "benchmarks; measure only its own stages (--benchmark run)"
        )
    name, stage = next(iter(with_network.items()))
    network = measure_network(stage.network, run.data.size)
    neighbours = [getattr(s, "num_neighbours", None) for s in run.stages.values()]
    return {
        "model": stage.network.name,
        "stem": stage.network.stem,
        "width": stage.network.width,
        "size": run.data.size,
        "precision": "bf16" if stage.precision == "bf16" else "fp32",
        "stage": name,
        "gradient": 4 * network.parameters,
        "dim": network.dim,
        "rows": min(num_images.get("train", MAX_ROWS), MAX_ROWS),
        "k": next(filter(None, neighbours), 20),
        "clusters": max(_cluster_counts(run), default=1000),
        "source": run.data.train.source,
        "stored": run.data.stored,
        "resolution": run.data.resolution,
    }


def _cluster_counts(run: RunConfig) -> list[int]:
    """Every number of clusters in the config, of a stage or of its method."""
    counts: list[int] = []
    for stage in run.stages.values():
        for owner in (stage, getattr(stage, "method", None)):
            value = getattr(owner, "num_clusters", None)
            if isinstance(value, int):
                counts.append(value)
            else:
                counts.extend(value or ())
    return counts


def write_description(
    folder: Path, args: argparse.Namespace, names: Sequence[str], node_counts: Sequence[int]
) -> None:
    """Write FOLDER/benchmark.json: what is measured. The page lists what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "config": args.config,
        "overrides": args.overrides,
        "benchmarks": list(names),
        "nodes": list(node_counts),
        "steps": args.steps,
        "weak": args.weak,
        "at_once": args.at_once,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    write_json(folder / watch.BENCHMARK, description)


def has_all_figures(run: RunConfig, names: Sequence[str]) -> bool:
    """Whether this number of nodes is measured completely.

    Raises ConfigError if its folder has figures of other settings.
    """
    from dist_scan.run_config import load_config

    if (run.run_dir / "config.yaml").is_file():
        before = load_config(run.run_dir / "config.yaml")
        changed = [
            field for field in EQUAL_FIELDS if attrgetter(field)(before) != attrgetter(field)(run)
        ]
        if changed:
            raise ConfigError(
                f"'{run.run_dir}' holds a benchmark with other {' and '.join(changed)}, and one "
                "page cannot show both; choose another folder with runtime.run_dir=PATH"
            )
    rows = [run.run_dir / "rows" / f"{name}.jsonl" for name in names if name != RUN]
    return (run.run_dir / "DONE").exists() and all(path.exists() for path in rows)


def _one_task(options: SlurmConfig) -> str:
    """srun for a single task of the job."""
    return srun_command(options, nodes=1, ntasks=1, ntasks_per_node=1)


def _before_start(options: SlurmConfig, commands: Sequence[Sequence[str]], with_run: bool) -> str:
    """What the job does before the run: describe the machine, then run the benchmarks.

    A requeued job keeps the rows that it has.
    """
    rank = shlex.quote(f'{export_rank(options)}; exec "$PYTHON" -m "benchmarks.$0" "$@"')
    lines = [
        BENCHMARK_FUNCTIONS.replace("@ONE_TASK@", _one_task(options))
        .replace("@STEP@", srun_command(options))
        .replace("@RANK@", rank)
    ]
    lines += [f"measure {shlex.join(map(str, command))}" for command in commands]
    lines.append('rm -rf "$RUN/work"')
    if not with_run:
        lines += ['date +%FT%T >"$RUN/DONE"', "exit 0"]
    return "\n".join(lines)


BENCHMARK_FUNCTIONS = r"""
# An interrupted start may have left an incomplete table in work.
rm -rf "$RUN/work"
mkdir -p "$RUN/rows" "$RUN/work"
if [ ! -s "$RUN/facts.json" ]; then
  count_step
  if @ONE_TASK@ "$PYTHON" -m benchmarks.rows >"$RUN/facts.part"; then
    mv "$RUN/facts.part" "$RUN/facts.json"
  else
    log "the page will not describe the machine"
  fi
fi
# Writes the benchmark's rows into the run folder. A failure is logged, and the job continues.
measure() {
  [ -e "$RUN/rows/$1.jsonl" ] && return
  set_rendezvous
  log "benchmark $*"
  if @STEP@ bash -c @RANK@ "$@" >"$RUN/rows/$1.part" 2>"$RUN/rows/$1.err"; then
    mv "$RUN/rows/$1.part" "$RUN/rows/$1.jsonl"
    log "benchmark $1: done"
  else
    log "benchmark $1: failed, $(tail -n 1 "$RUN/rows/$1.err")"
  fi
}
""".strip()
