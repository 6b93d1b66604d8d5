"""What a fault costs, in real processes: steps done again, seconds to the first new step, and whether the result is the same.

    python -m benchmarks.recovery                         # every case once: two ranks, a small SimCLR on the digits, saved every 2 s
    python -m benchmarks.recovery --soak --minutes 20     # random kills of random ranks, 60 s apart in the mean
    python -m benchmarks.recovery --cluster               # on a real Slurm (benchmarks/on_cluster.py): in place, and through the queue
    python -m benchmarks.recovery --every-stage           # there too: the quickstart on four nodes with a rank killed in every stage

Figures (goals: RELIABILITY.md's) of a row: steps_lost, done again; first_exit_s and last_exit_s, from the fault to the first and the last
rank's end; new_step_s, from the fault to the first step that had not been done before; shards_twice, finished shards that were made again;
stalls, relaunches after which nothing had been finished; identical, losses, weights and features equal an undisturbed run's bit for bit.
`goals` stands beside them, `missed` names what fell short. A case that ends the job (USR2) is started again by this script at once; its
new_step_s is a whole start less the imports (8 s) and the waiting in a queue (--cluster has both). `load` says how busy the machine was.
"""

from __future__ import annotations

import argparse
import operator
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faulted_run import (
    RANKS,
    SAVE_EVERY_S,
    Kills,
    Run,
    good_s,
    interval_steps,
    new_step_s,
    steps_lost,
)
from benchmarks.rows import emit

LIMIT_S = 5.0  # runtime.step_limit_s of the cases that hang
REQUEUED = 128 + signal.SIGUSR2
IN_PLACE_S, ENDED_S, GOODPUT, SAVES_SHARE = 30.0, 5.0, 0.6, 0.01
MEAN_S = 60.0
EPOCHS = 16  # 160 steps: on a free machine 40 were over before the second save
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, "==": operator.eq}


class Case(NamedTuple):
    """Faults, and what is special about the run that they strike."""

    faults: tuple[dict, ...]
    limit: bool = False
    """Noticed by the watchdog, after LIMIT_S."""
    flip: bool = False
    """A bit of the newest checkpoint is flipped before the second start."""
    refused: int = 0
    """Updates that are left out: not the undisturbed run's result then."""


STEP = {"rank": 1, "step": 15}
CASES: dict[str, Case] = {
    "1 kill -9 of rank 1 in a step": Case(({"kind": "kill", **STEP},)),
    "2 kill -9 of rank 0 in a step": Case(({"kind": "kill", **STEP, "rank": 0},)),
    "3 exception on rank 1": Case(({"kind": "exception", **STEP},)),
    "4 rank 1 stopped (SIGSTOP)": Case(({"kind": "stop", **STEP},), limit=True),
    "4 loader of rank 1 stuck": Case(({"kind": "hang", "at": "batch", **STEP},), limit=True),
    **{
        f"5 kill -9 in a save, before {at}": Case(({"kind": "kill", "at": at, "step": 1},))
        for at in ("data", "manifest", "rename", "prune")
    },
    "6 flipped bit in the newest checkpoint": Case(
        ({"kind": "signal", **STEP, "step": 120},), flip=True
    ),  # late: there is one before it
    "8 disk full at a save": Case(({"kind": "full", "at": "write", "step": 1},)),
    "8 disk read-only at a save": Case(({"kind": "read_only", "at": "prepare", "step": 1},)),
    "9 USR2 to rank 1": Case(({"kind": "signal", **STEP},)),
    "12 USR2 to rank 1 in embed": Case(({"kind": "signal", "rank": 1, "at": "shard", "step": 2},)),
    "12 kill -9 of rank 1 in embed": Case(({"kind": "kill", "rank": 1, "at": "shard", "step": 2},)),
    "16 NaN in rank 1's loss": Case(({"kind": "nan", "at": "loss", **STEP},), refused=1),
}


def one(name: str, case: Case, folder: Path, whole: Run) -> dict[str, Any]:
    """A case to its end, and its figures beside their goals."""
    run = Run(folder, whole.epochs)
    more = [f"runtime.step_limit_s={LIMIT_S}"] if case.limit else []
    code, starts = run.watch(run.start(*more, faults=case.faults)), 1
    while code == REQUEUED and starts < 5:
        if case.flip:
            flip(run.run_dir)
        code, starts = run.watch(run.start(*more)), starts + 1
    return judged(
        name, figures(run, run.fired(), whole, case, starts) | {"ended": code}, goals(case, run)
    )


def figures(run: Run, fired: float, whole: Run, case: Case, starts: int) -> dict[str, Any]:
    """What a fault at `fired` did to a run."""
    seen, left = run.rows.seen, [e.at - fired for e in run.exits if e.at >= fired][:RANKS]
    found = {
        "steps": len({row.step for row in seen}),
        "steps_lost": steps_lost(seen),
        "starts": starts,
        "relaunches": len(run.faults()),
        "stalls": sum(not f["advanced"] for f in run.faults()),
        "shards_twice": run.shards_twice(),
    }
    if starts > 1 or run.faults():
        new = new_step_s(seen, run.exits, fired)
        found |= {"first_exit_s": round(left[0], 2), "last_exit_s": round(left[-1], 2)} | (
            {"new_step_s": round(new, 2)} if new is not None else {}
        )
    return found | ({"refused": refused(run)} if case.refused else {"identical": run.equals(whole)})


def goals(case: Case, run: Run) -> dict[str, tuple[str, Any]]:
    """What the figures must be."""
    kinds = {fault["kind"] for fault in case.faults}
    lost = (
        ("<", interval_steps(run.rows.seen, SAVE_EVERY_S))
        if kinds & {"kill", "exception", "stop", "hang"} or case.flip
        else ("==", 0)
    )
    found = {
        "ended": ("==", 0),
        "steps_lost": lost,
        "new_step_s": ("<", IN_PLACE_S),
        "stalls": ("==", 0),
        "shards_twice": ("==", 0),
    }
    if kinds & {"kill", "exception"}:
        found["last_exit_s"] = ("<", ENDED_S)
    if case.limit:
        found["first_exit_s"] = (
            "<",
            LIMIT_S + 2,
        )  # prefetched batches are trained first; then three looks for the others' stacks
    return found | (
        {"refused": ("==", case.refused)} if case.refused else {"identical": ("==", True)}
    )


def judged(
    name: str, figures: Mapping[str, Any], goals: Mapping[str, tuple[str, Any]]
) -> dict[str, Any]:
    """A row: the case, its figures, the goals of those it has, and the names of the figures that missed theirs."""
    held = {key: goal for key, goal in goals.items() if key in figures}
    return {
        "row": name,
        **figures,
        "goals": {key: f"{sign} {value}" for key, (sign, value) in held.items()},
        "missed": [
            key for key, (sign, value) in held.items() if not COMPARE[sign](figures[key], value)
        ],
    }


def refused(run: Run) -> int:
    """Updates that all ranks left out, as the log counts them."""
    from dist_scan.monitoring.log import read_rows

    return max(row.get("refused", 0) for row in read_rows(run.rows.path))


def flip(run_dir: Path) -> None:
    """One bit of the newest checkpoint."""
    file = max(run_dir.glob("stages/pretext/*/work/checkpoints/step-*")) / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def saves(folder: Path) -> dict[str, Any]:
    """A MoCo ResNet-50's checkpoint (two encoders, momentum buffers, a queue: 100 M numbers): its cost, and Young's interval for it."""
    import torch

    from dist_scan.engine.checkpoint import CheckpointStore
    from dist_scan.engine.train_state import MTBF_S

    state = {"method": {f"w{i}": torch.randn(1_000_000) for i in range(100)}}
    store, save, load = CheckpointStore(folder, 2), [], []
    for step in (1, 2, 3):
        assert store.save(step, state, {}), "see the line above"
        save.append(store.save_s)
        began = time.monotonic()
        store.load(torch.device("cpu"))
        load.append(time.monotonic() - began)
    save_s = statistics.median(save)
    interval_s = (2 * save_s * MTBF_S) ** 0.5
    found = {
        "save_s": round(save_s, 2),
        "load_and_verify_s": round(statistics.median(load), 2),
        "interval_s": round(interval_s, 1),
        "time_lost_to_saves": round(save_s / interval_s, 4),
    }
    return judged("a checkpoint of 400 MB", found, {"time_lost_to_saves": ("<", SAVES_SHARE)})


def undisturbed(folder: Path, epochs: int) -> Run:
    """A run to which nothing happens. Raises RuntimeError with what it said when it fails."""
    run = Run(folder, epochs)
    if run.watch(run.start()) or run.faults():
        raise RuntimeError(f"the undisturbed run failed:\n{run.said()}")
    return run


def soak(minutes: float, folder: Path, seed: int) -> dict[str, Any]:
    """Kills for so many minutes; undisturbed the run would take as long, so that it ends soon after the last. A kill in the seconds before a start's
    first step leaves that start without progress, whatever one does: no more `stalls` than such `early` kills."""
    trial = undisturbed(folder / "trial", 10)
    seen = trial.rows.seen
    whole = undisturbed(
        folder / "whole", max(10, round(10 * minutes * 60 / (seen[-1].at - seen[0].at)))
    )
    run = Run(folder / "run", whole.epochs)
    kills = Kills(MEAN_S, minutes * 60, seed)
    began = time.time()
    code = run.watch(run.start(), kills)
    took, good = time.time() - began, good_s(run.rows.seen, run.exits)
    found = {
        "ended": code,
        "minutes": round(took / 60, 1),
        "kills": kills.count,
        "early": kills.early,
        "relaunches": len(run.faults()),
        "steps": len({r.step for r in run.rows.seen}),
        "steps_lost": steps_lost(run.rows.seen),
        "undisturbed_minutes": round(good_s(whole.rows.seen, whole.exits) / 60, 1),
        "goodput": round(good / took, 3),
        "stalls": sum(not f["advanced"] for f in run.faults()),
        "shards_twice": run.shards_twice(),
        "identical": run.equals(whole),
    }
    return judged(
        f"soak of {minutes:g} minutes, {MEAN_S:g} s between kills",
        found,
        {
            "ended": ("==", 0),
            "goodput": (">", GOODPUT),
            "stalls": ("<=", kills.early),
            "shards_twice": ("==", 0),
            "identical": ("==", True),
        },
    )


def main() -> None:
    """Every case, or the soak."""
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
    parser.add_argument("--minutes", type=float, default=20.0, help="how long the soak kills")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # before anything imports torch: two ranks on few cores
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.soak:
            emit(soak(args.minutes, folder, args.seed))
            return
        if args.cluster or args.every_stage:
            from benchmarks import on_cluster

            for row in (
                on_cluster.faults_of_a_job(folder)
                if args.cluster
                else on_cluster.every_stage(folder, args.small, args.only)
            ):
                emit(judged(*row))
            return
        if args.only in "a checkpoint of 400 MB":
            emit(saves(folder / "checkpoints"))
        chosen = {case: facts for case, facts in CASES.items() if args.only in case}
        whole = undisturbed(folder / "whole", EPOCHS) if chosen else None
        for number, (case, facts) in enumerate(chosen.items()):
            emit(one(case, facts, folder / str(number), whole))


if __name__ == "__main__":
    main()
