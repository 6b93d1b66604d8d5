"""A week on paper: how much of the time is training when things break.  python -m benchmarks.goodput [--save-s 3] [--in-place-s 30] ...

Faults come at random (exponential, each node on its own). A share of them ends a process and is relaunched in place, the rest
takes the node and goes through the queue. Between faults the job trains and saves, at the interval the trainer itself would choose
from the cost of a save (Young's formula, engine/position.py). Counted as good: training that was not lost and not saving.
One JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import math
import random

from dist_scan.engine.train_state import MTBF_S, SHORTEST_S

WEEK_S = 7 * 86400.0


def week(
    rng: random.Random,
    fault_s: float,
    save_s: float,
    interval_s: float,
    in_place_s: float,
    requeue_s: float,
    node_share: float,
) -> tuple[float, int]:
    """(seconds of good training, faults) of one week. `fault_s`: mean time between the job's faults."""
    now, good, faults = 0.0, 0.0, 0
    while now < WEEK_S:
        run_s = min(rng.expovariate(1 / fault_s), WEEK_S - now)
        saved = int(run_s // (interval_s + save_s)) * interval_s
        now += run_s
        if now >= WEEK_S:
            return good + saved + min(run_s % (interval_s + save_s), interval_s), faults
        good, faults = good + saved, faults + 1
        now += requeue_s if rng.random() < node_share else in_place_s
    return good, faults


def main(argv: list[str] | None = None) -> None:
    """Print a row for each number of nodes and each mean time between a node's faults."""
    parser = argparse.ArgumentParser(prog="benchmarks.goodput", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--mtbf-h",
        type=float,
        nargs="+",
        default=[4000.0, 500.0, 50.0],
        help="hours between faults of one node",
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
    parser.add_argument("--weeks", type=int, default=2000, help="simulated weeks a row")
    args = parser.parse_args(argv)
    interval_s = max(math.sqrt(2 * args.save_s * MTBF_S), SHORTEST_S)
    for mtbf_h in args.mtbf_h:
        for nodes in args.nodes:
            rng = random.Random(0)
            weeks = [
                week(
                    rng,
                    mtbf_h * 3600 / nodes,
                    args.save_s,
                    interval_s,
                    args.in_place_s,
                    args.requeue_s,
                    args.node_share,
                )
                for _ in range(args.weeks)
            ]
            good = sorted(g / WEEK_S for g, _ in weeks)
            print(
                json.dumps(
                    {
                        "case": "goodput",
                        "nodes": nodes,
                        "node_mtbf_h": mtbf_h,
                        "save_s": args.save_s,
                        "interval_s": round(interval_s),
                        "in_place_s": args.in_place_s,
                        "requeue_s": args.requeue_s,
                        "faults_a_week": round(sum(f for _, f in weeks) / len(weeks), 2),
                        "goodput": round(sum(good) / len(good), 4),
                        "worst_week_in_20": round(good[len(good) // 20], 4),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
