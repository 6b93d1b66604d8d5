"""A simulated week: the share of the time that is training if nodes and processes fail at random.

    python -m benchmarks.goodput [--save-s 3] [--in-place-s 30] ...

Faults come at random (exponential, each node on its own). A share of them ends a process and is
relaunched in place; the others take the node and go through the queue. Between faults the job
trains and saves, at the interval that the trainer would choose from the cost of a save (Young's
formula, `dist_scan.engine.train_state`). Training that was lost and the time of saves do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass

from dist_scan.engine.train_state import MTBF_S, SHORTEST_S

WEEK_S = 7 * 86400.0


@dataclass(frozen=True)
class Job:
    """Times of a job in seconds."""

    mtbf_s: float
    """Mean time between the faults of the whole job."""
    save_s: float
    interval_s: float
    """Training between two saves."""
    in_place_s: float
    """From a fault to the first new step, if relaunched in the job."""
    requeue_s: float
    """The same through the queue."""
    node_share: float
    """Share of faults that take the node."""


def simulate_week(rng: random.Random, job: Job) -> tuple[float, int]:
    """(seconds of training that count, number of faults)."""
    cycle_s = job.interval_s + job.save_s
    now = trained_s = 0.0
    faults = 0
    while now < WEEK_S:
        run_s = min(rng.expovariate(1 / job.mtbf_s), WEEK_S - now)
        now += run_s
        trained_s += int(run_s // cycle_s) * job.interval_s
        if now >= WEEK_S:
            # The week ends without a fault: the steps after the last save count too.
            trained_s += min(run_s % cycle_s, job.interval_s)
            break
        faults += 1
        now += job.requeue_s if rng.random() < job.node_share else job.in_place_s
    return trained_s, faults


def main(argv: list[str] | None = None) -> None:
    """Print a row for each number of nodes and each mean time between a node's faults."""
    parser = argparse.ArgumentParser(prog="benchmarks.goodput", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--mtbf-h",
        type=float,
        nargs="+",
        default=[4000.0, 500.0, 50.0],
        help="hours between the faults of one node",
    )
    parser.add_argument(
        "--save-s", type=float, default=3.0, help="one checkpoint, during which nothing trains"
    )
    parser.add_argument(
        "--in-place-s",
        type=float,
        default=60.0,
        help="fault to first new step, relaunched in the job",
    )
    parser.add_argument(
        "--requeue-s",
        type=float,
        default=480.0,
        help="fault to first new step, through the queue, waiting included",
    )
    parser.add_argument(
        "--node-share", type=float, default=0.5, help="share of faults that take the node"
    )
    parser.add_argument("--weeks", type=int, default=2000, help="simulated weeks per row")
    args = parser.parse_args(argv)
    interval_s = max(math.sqrt(2 * args.save_s * MTBF_S), SHORTEST_S)
    for mtbf_h in args.mtbf_h:
        for nodes in args.nodes:
            job = Job(
                mtbf_s=mtbf_h * 3600 / nodes,
                save_s=args.save_s,
                interval_s=interval_s,
                in_place_s=args.in_place_s,
                requeue_s=args.requeue_s,
                node_share=args.node_share,
            )
            rng = random.Random(0)
            weeks = [simulate_week(rng, job) for _ in range(args.weeks)]
            shares = sorted(trained_s / WEEK_S for trained_s, _ in weeks)
            faults = sum(count for _, count in weeks)
            row = {
                "case": "goodput",
                "nodes": nodes,
                "node_mtbf_h": mtbf_h,
                "save_s": args.save_s,
                "interval_s": round(interval_s),
                "in_place_s": args.in_place_s,
                "requeue_s": args.requeue_s,
                "faults_a_week": round(faults / len(weeks), 2),
                "goodput": round(sum(shares) / len(shares), 4),
                "worst_week_in_20": round(shares[len(shares) // 20], 4),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
