"""Exact k-means of every row: features in a .npy or a feature table -> a cluster for each, by one process or many."""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

from dist_scan.world.spawn import run_on_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to cluster, how, and with how many processes."""
    parser.add_argument(
        "features", help="a .npy of [N, D] (kept in float16), or the folder of a feature table"
    )
    parser.add_argument(
        "out", help="a folder: assignments.npz (cluster [N] int32) and centroids.npy [k, D]"
    )
    parser.add_argument("--k", type=int, required=True, help="how many clusters")
    parser.add_argument(
        "--iterations", type=int, default=100, help="at most so many a run (default 100)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="stop when a step gains less than this share (default 0: when nothing moves)",
    )
    parser.add_argument(
        "--restarts", type=int, default=5, help="the best of so many runs (default 5)"
    )
    parser.add_argument("--init", default="kmeans++", choices=["kmeans++", "random"])
    parser.add_argument(
        "--raw",
        action="store_true",
        help="rows as they are; without it they are brought to unit length first",
    )
    parser.add_argument("--spherical", action="store_true", help="centroids of unit length, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--view", type=int, default=0, help="which view of a table of several (default 0)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="on this machine; on GPUs one per GPU. Under srun every task is one (default 1)",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])


def main(args: argparse.Namespace) -> int:
    """Cluster; every row in every iteration, the same result for any number of processes."""
    if args.iterations < 1 or args.restarts < 1:
        raise ValueError(
            f"--iterations {args.iterations} and --restarts {args.restarts}; allowed: 1 or more"
        )
    if args.spherical and args.raw:
        raise ValueError("--spherical is for unit rows; leave --raw out")
    if not 0 <= args.seed < 2**63 or not 0 <= args.tolerance < 1:
        raise ValueError(
            f"--seed {args.seed} --tolerance {args.tolerance}; allowed: a seed of 0 to 2^63 - 1, a tolerance of 0 up to 1"
        )
    from dist_scan.data.feature_table import FeatureTable

    rows, views = FeatureTable.num_rows_and_views(args.features)
    if not 1 <= args.k <= rows or not 0 <= args.view < views:
        raise ValueError(
            f"--k {args.k} --view {args.view}: '{args.features}' has {rows} rows and {views} views; allowed: --k 1 to {rows}, --view 0 to {views - 1}"
        )
    if (Path(args.out) / "assignments.npz").exists():
        raise ValueError(f"{args.out} holds clusters already; give another folder, or remove it")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    return run_on_ranks(partial(_rank, args), args.processes)


def _rank(args: argparse.Namespace) -> int:

    from dist_scan.data.assignments import Assignments
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.engine.stop import StopFlag
    from dist_scan.monitoring.progress import StopRequested
    from dist_scan.search.kmeans import kmeans
    from dist_scan.search.options import KMeansOptions
    from dist_scan.search.summary import describe_kmeans
    from dist_scan.storage.arrays import write_npy
    from dist_scan.storage.artifacts import WORK
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import close_world, open_world

    stop, out = StopFlag(), Path(args.out)
    stop.install()
    world = open_world(args.device)
    try:
        features = FeatureTable.open_or_convert(args.features, out / "features", 16)
        found = kmeans(
            features,
            args.k,
            KMeansOptions(
                iterations=args.iterations,
                tolerance=args.tolerance,
                init=args.init,
                restarts=args.restarts,
                spherical=args.spherical,
                normalise=not args.raw,
                seed=args.seed,
                view=args.view,
            ),
            stop_requested=lambda: stop.requested,
            show_progress=world.rank == 0,
            checkpoint_path=out / WORK / "kmeans.npz",
        )
    except StopRequested:
        if world.rank == 0:
            print(f"stopped; {out / WORK} says how far it is, the same command goes on")
        return 128 + (stop.signal or 15)
    if world.rank == 0:
        Assignments(found.assignment, args.k).save(out)
        write_npy(out / "centroids.npy", found.centroids)
        shutil.rmtree(out / WORK, ignore_errors=True)
        print(f"{out}: {describe_kmeans(found)}")
    barrier()
    close_world()
    return 0
