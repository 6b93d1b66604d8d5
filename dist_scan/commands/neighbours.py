"""Exact nearest neighbours of every row: features in a .npy or a feature table -> ids and scores, by one process or many."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from dist_scan.world.spawn import run_on_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to search in, how, and with how many processes."""
    parser.add_argument(
        "features", help="a .npy of [N, D] (kept in float16), or the folder of a feature table"
    )
    parser.add_argument(
        "out",
        help="a folder: ids-*.npy [n, K] int64 and scores-*.npy [n, K] float64, a pair for each shard of rows",
    )
    parser.add_argument(
        "--k",
        type=int,
        default=20,
        help="neighbours a row, the row itself not among them (default 20)",
    )
    parser.add_argument(
        "--metric",
        default="cosine",
        choices=["cosine", "inner_product", "l2"],
        help="l2 scores are minus the squared distance (default cosine)",
    )
    parser.add_argument(
        "--view", type=int, default=0, help="which view of a table of several (default 0)"
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=16,
        help="of a .npy: units of work that survive a kill (default 16)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="on this machine; on GPUs one per GPU. Under srun every task is one (default 1)",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument(
        "--merge",
        action="store_true",
        help="also write all rows into OUT/ids.npy and OUT/scores.npy",
    )


def main(args: argparse.Namespace) -> int:
    """Search; the same command goes on after a stop or a kill."""
    from dist_scan.data.feature_table import FeatureTable

    rows, views = FeatureTable.num_rows_and_views(args.features)
    if not 1 <= args.k < rows or not 0 <= args.view < views or args.shards < 1:
        raise ValueError(
            f"--k {args.k} --view {args.view} --shards {args.shards}: '{args.features}' has {rows} rows and {views} views; "
            f"allowed: --k 1 to {rows - 1}, --view 0 to {views - 1}, --shards 1 or more"
        )
    return run_on_ranks(partial(_rank, args), args.processes)


def _rank(args: argparse.Namespace) -> int:
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.engine.stop import StopFlag
    from dist_scan.monitoring.progress import StopRequested
    from dist_scan.search.neighbours import mine_neighbours
    from dist_scan.search.options import NeighbourOptions
    from dist_scan.search.summary import describe_neighbours
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import close_world, open_world

    stop, out = StopFlag(), Path(args.out)
    stop.install()
    world = open_world(args.device)
    try:
        features = FeatureTable.open_or_convert(args.features, out / "features", args.shards)
        found = mine_neighbours(
            features,
            out,
            args.k,
            NeighbourOptions(metric=args.metric, view=args.view),
            stop_requested=lambda: stop.requested,
            show_progress=world.rank == 0,
        )
    except StopRequested:
        if world.rank == 0:
            print("stopped; finished shards are kept, the same command goes on")
        return 128 + (stop.signal or 15)
    if world.rank == 0:
        if args.merge:
            found.merge()
        print(f"{out}: {describe_neighbours(found)}")
    barrier()
    close_world()
    return 0
