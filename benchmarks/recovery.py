"""What a fault costs, in real processes: repeated steps, seconds to a new step, equal results.

    python -m benchmarks.recovery                      # every case: two ranks, SimCLR on the digits
    python -m benchmarks.recovery --soak --minutes 20  # random kills of random ranks, 60 s apart
    python -m benchmarks.recovery --cluster            # in a job of the Slurm test cluster
    python -m benchmarks.recovery --every-stage        # there too: a rank killed in every stage

Fields of a row: steps_lost, steps done again; first_exit_s and last_exit_s, from the fault to the
end of the first and the last rank; new_step_s, from the fault to the first step that had not been
done before; shards_twice, finished shards that were computed again; stalls, relaunches before
which nothing had been finished; identical: losses, weights and features equal an undisturbed run's
bit for bit. `goals` has the required values, `missed` the fields that do not reach them. A case
that ends the job (USR2) is started again by this script at once: its new_step_s is a whole start
without the imports (8 s) and without the wait in a queue (--cluster has both). `load` says how busy
the machine was.
"""

from __future__ import annotations

import argparse
import operator
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faulted_run import (
    RANKS,
    SAVE_EVERY_S,
    FaultedRun,
    Goals,
    RandomKills,
    interval_steps,
    repeated_steps,
    seconds_to_new_step,
    training_seconds,
)
from benchmarks.rows import emit

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, "==": operator.eq}
EPOCHS = 16
"""160 steps: on an unloaded machine 40 ended before the second save."""
STEP_LIMIT_S = 5.0
"""runtime.step_limit_s of the cases that hang."""
REQUEUED = 128 + signal.SIGUSR2
"""Exit code of a launcher whose job would be requeued."""
MAX_STARTS = 5
MAX_NEW_STEP_S = 30.0
MAX_LAST_EXIT_S = 5.0
MIN_GOODPUT = 0.6
MAX_SAVE_SHARE = 0.01
SOAK_INTERVAL_S = 60.0
"""Mean time between the kills of a soak."""
TRIAL_EPOCHS = 10
CHECKPOINT_CASE = "a checkpoint of 400 MB"


class Case(NamedTuple):
    """Faults, and what is special about the run in which they happen."""

    faults: tuple[dict[str, Any], ...]
    hangs: bool = False
    """Detected by the watchdog, after STEP_LIMIT_S."""
    flip_bit: bool = False
    """A bit of the newest checkpoint is flipped before the second start."""
    skipped_updates: int = 0
    """Updates that are skipped, not finite; the result then differs from the undisturbed run's."""

    @property
    def kinds(self) -> set[str]:
        """Kinds of its faults."""
        return {fault["kind"] for fault in self.faults}


def single_fault(
    kind: str,
    at: str = "step",
    rank: int = 1,
    step: int = 15,
    hangs: bool = False,
    flip_bit: bool = False,
    skipped_updates: int = 0,
) -> Case:
    """A case with one fault."""
    fault = {"kind": kind, "at": at, "rank": rank, "step": step}
    return Case((fault,), hangs, flip_bit, skipped_updates)


CASES = {
    "1 kill -9 of rank 1 in a step": single_fault("kill"),
    "2 kill -9 of rank 0 in a step": single_fault("kill", rank=0),
    "3 exception on rank 1": single_fault("exception"),
    "4 rank 1 stopped (SIGSTOP)": single_fault("stop", hangs=True),
    "4 loader of rank 1 stuck": single_fault("hang", at="batch", hangs=True),
    "5 kill -9 in a save, before data": single_fault("kill", at="data", rank=0, step=1),
    "5 kill -9 in a save, before manifest": single_fault("kill", at="manifest", rank=0, step=1),
    "5 kill -9 in a save, before rename": single_fault("kill", at="rename", rank=0, step=1),
    "5 kill -9 in a save, before prune": single_fault("kill", at="prune", rank=0, step=1),
    # Late, so that there is a checkpoint before the damaged one.
    "6 flipped bit in the newest checkpoint": single_fault("signal", step=120, flip_bit=True),
    "8 disk full at a save": single_fault("full", at="write", rank=0, step=1),
    "8 disk read-only at a save": single_fault("read_only", at="prepare", rank=0, step=1),
    "9 USR2 to rank 1": single_fault("signal"),
    "12 USR2 to rank 1 in embed": single_fault("signal", at="shard", step=2),
    "12 kill -9 of rank 1 in embed": single_fault("kill", at="shard", step=2),
    "16 NaN in rank 1's loss": single_fault("nan", at="loss", skipped_updates=1),
}
"""By name; the number is the row of the catalogue in docs/reliability.md."""


def run_case(name: str, case: Case, folder: Path, undisturbed: FaultedRun) -> dict[str, Any]:
    """Run a case to its end; returns its row."""
    run = FaultedRun(folder, undisturbed.epochs)
    overrides = [f"runtime.step_limit_s={STEP_LIMIT_S}"] if case.hangs else []
    code = run.watch(run.start(*overrides, armed_faults=case.faults))
    starts = 1
    while code == REQUEUED and starts < MAX_STARTS:
        if case.flip_bit:
            flip_bit(run.run_dir)
        code = run.watch(run.start(*overrides))
        starts += 1
    figures = fault_figures(run, starts)
    if case.skipped_updates:
        figures["non_finite"] = count_skipped_updates(run)
    else:
        figures["identical"] = run.equals(undisturbed)
    figures["ended"] = code
    return make_row(name, figures, fault_goals(case, run))


def fault_figures(run: FaultedRun, starts: int) -> dict[str, Any]:
    """What the last fault did to a run. Raises FileNotFoundError if no fault happened."""
    fault_time = run.fault_time()
    steps, faults = run.metrics.steps, run.logged_faults()
    figures: dict[str, Any] = {
        "steps": len({step.step for step in steps}),
        "steps_lost": repeated_steps(steps),
        "starts": starts,
        "relaunches": len(faults),
        "stalls": sum(not fault["advanced"] for fault in faults),
        "shards_twice": run.repeated_shards(),
    }
    if starts > 1 or faults:
        exits = [e.time - fault_time for e in run.exits if e.time >= fault_time][:RANKS]
        figures |= {"first_exit_s": round(exits[0], 2), "last_exit_s": round(exits[-1], 2)}
        new_step_s = seconds_to_new_step(steps, run.exits, fault_time)
        if new_step_s is not None:
            figures["new_step_s"] = round(new_step_s, 2)
    return figures


def fault_goals(case: Case, run: FaultedRun) -> Goals:
    """The required figures of a case."""
    goals: dict[str, tuple[str, Any]] = {
        "ended": ("==", 0),
        "steps_lost": ("==", 0),
        "new_step_s": ("<", MAX_NEW_STEP_S),
        "stalls": ("==", 0),
        "shards_twice": ("==", 0),
        "identical": ("==", True),
        "non_finite": ("==", case.skipped_updates),
    }
    if case.flip_bit or case.kinds & {"kill", "exception", "stop", "hang"}:
        goals["steps_lost"] = ("<", interval_steps(run.metrics.steps, SAVE_EVERY_S))
    if case.kinds & {"kill", "exception"}:
        goals["last_exit_s"] = ("<", MAX_LAST_EXIT_S)
    if case.hangs:
        # Two seconds more: prefetched batches are trained first, then stacks are written.
        goals["first_exit_s"] = ("<", STEP_LIMIT_S + 2)
    return goals


def make_row(name: str, figures: Mapping[str, Any], goals: Goals) -> dict[str, Any]:
    """A row: the figures, the goals of those that it has, the figures that miss their goal."""
    applied = {field: goal for field, goal in goals.items() if field in figures}
    missed = [
        field
        for field, (sign, value) in applied.items()
        if not COMPARISONS[sign](figures[field], value)
    ]
    texts = {field: f"{sign} {value}" for field, (sign, value) in applied.items()}
    return {"row": name, **figures, "goals": texts, "missed": missed}


def count_skipped_updates(run: FaultedRun) -> int:
    """Updates that all ranks skipped, as the log counts them."""
    from dist_scan.monitoring.log import read_rows

    return max(row.get("non_finite", 0) for row in read_rows(run.metrics.path))


def flip_bit(run_dir: Path) -> None:
    """Flip one bit of the newest checkpoint."""
    file = max(run_dir.glob("stages/pretext/*/work/checkpoints/step-*")) / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def measure_checkpoint(folder: Path) -> dict[str, Any]:
    """Cost of a checkpoint of a MoCo ResNet-50, and the interval of saves that follows from it.

    Two encoders, momentum buffers and a queue: 100 M numbers. The interval is Young's.
    """
    import torch

    from dist_scan.engine.checkpoint import CheckpointStore
    from dist_scan.engine.train_state import MTBF_S

    state = {"method": {f"w{i}": torch.randn(1_000_000) for i in range(100)}}
    store = CheckpointStore(folder, 2)
    save_seconds, load_seconds = [], []
    for step in (1, 2, 3):
        if not store.save(step, state, {}):
            raise RuntimeError("the checkpoint could not be saved; the line above says why")
        save_seconds.append(store.save_s)
        begin = time.monotonic()
        store.load(torch.device("cpu"))
        load_seconds.append(time.monotonic() - begin)
    save_s = statistics.median(save_seconds)
    interval_s = (2 * save_s * MTBF_S) ** 0.5
    figures = {
        "save_s": round(save_s, 2),
        "load_and_verify_s": round(statistics.median(load_seconds), 2),
        "interval_s": round(interval_s, 1),
        "time_lost_to_saves": round(save_s / interval_s, 4),
    }
    return make_row(CHECKPOINT_CASE, figures, {"time_lost_to_saves": ("<", MAX_SAVE_SHARE)})


def run_undisturbed(folder: Path, epochs: int) -> FaultedRun:
    """A run without faults. Raises RuntimeError with its output if it fails."""
    run = FaultedRun(folder, epochs)
    if run.watch(run.start()) or run.logged_faults():
        raise RuntimeError(f"the undisturbed run failed:\n{run.output()}")
    return run


def soak(minutes: float, folder: Path, seed: int) -> dict[str, Any]:
    """Random kills for so many minutes, in a run that undisturbed would take as long.

    A kill before the first step of a start leaves that start without progress in any case, so as
    many `stalls` are allowed as there were `early` kills.
    """
    trial = run_undisturbed(folder / "trial", TRIAL_EPOCHS).metrics.steps
    trial_s = trial[-1].time - trial[0].time
    epochs = max(TRIAL_EPOCHS, round(TRIAL_EPOCHS * minutes * 60 / trial_s))
    undisturbed = run_undisturbed(folder / "whole", epochs)

    run = FaultedRun(folder / "run", epochs)
    kills = RandomKills(SOAK_INTERVAL_S, minutes * 60, seed)
    begin = time.time()
    code = run.watch(run.start(), kills)
    total_s = time.time() - begin
    steps, faults = run.metrics.steps, run.logged_faults()
    goodput = training_seconds(steps, run.exits) / total_s
    undisturbed_s = training_seconds(undisturbed.metrics.steps, undisturbed.exits)
    figures = {
        "ended": code,
        "minutes": round(total_s / 60, 1),
        "kills": kills.count,
        "early": kills.early_count,
        "relaunches": len(faults),
        "steps": len({step.step for step in steps}),
        "steps_lost": repeated_steps(steps),
        "undisturbed_minutes": round(undisturbed_s / 60, 1),
        "goodput": round(goodput, 3),
        "stalls": sum(not fault["advanced"] for fault in faults),
        "shards_twice": run.repeated_shards(),
        "identical": run.equals(undisturbed),
    }
    goals = {
        "ended": ("==", 0),
        "goodput": (">", MIN_GOODPUT),
        "stalls": ("<=", kills.early_count),
        "shards_twice": ("==", 0),
        "identical": ("==", True),
    }
    name = f"soak of {minutes:g} minutes, {SOAK_INTERVAL_S:g} s between kills"
    return make_row(name, figures, goals)


def run_cases(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """A row for each case whose name contains `only`."""
    if only in CHECKPOINT_CASE:
        yield measure_checkpoint(folder / "checkpoints")
    selected = {name: case for name, case in CASES.items() if only in name}
    if selected:
        undisturbed = run_undisturbed(folder / "whole", EPOCHS)
    for number, (name, case) in enumerate(selected.items()):
        yield run_case(name, case, folder / str(number), undisturbed)


def run_on_cluster(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of --cluster or --every-stage."""
    from benchmarks import on_cluster

    if args.cluster:
        results = on_cluster.faults_of_a_job(folder)
    else:
        results = on_cluster.every_stage(folder, args.small, args.only)
    for name, figures, goals in results:
        yield make_row(name, figures, goals)


def main() -> None:
    """Print the rows of the cases, of the soak, or of the cluster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", action="store_true", help="random kills instead of the cases")
    parser.add_argument(
        "--cluster", action="store_true", help="faults in a job of two nodes instead"
    )
    parser.add_argument(
        "--every-stage",
        action="store_true",
        help="the quickstart on four nodes, a rank killed in every stage, instead",
    )
    parser.add_argument(
        "--small", action="store_true", help="with --every-stage: 400 images, few epochs"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="length of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    # Before anything imports torch: two ranks on few cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.soak:
            rows = iter([soak(args.minutes, folder, args.seed)])
        elif args.cluster or args.every_stage:
            rows = run_on_cluster(folder, args)
        else:
            rows = run_cases(folder, args.only)
        for row in rows:
            emit(row)


if __name__ == "__main__":
    main()
