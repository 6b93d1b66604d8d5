"""Arguments, checks and the start of ranks for the commands `kmeans` and `neighbours`."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dist_scan.commands import _arguments
from dist_scan.data.feature_table import FeatureTable
from dist_scan.search.options import check_option
from dist_scan.world.spawn import run_on_ranks

if TYPE_CHECKING:
    from dist_scan.engine.stop import StopFlag


def add_features(parser: argparse.ArgumentParser, out: str) -> None:
    """FEATURES, OUT, --view, --processes and --device."""
    parser.add_argument(
        "features", help="a .npy of [N, D] (stored in float16), or the folder of a feature table"
    )
    parser.add_argument("out", type=Path, help=out)
    parser.add_argument(
        "--view", type=int, default=0, help="number of the view to read (default 0)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of processes on this machine, one per GPU (default 1); "
        "ignored under srun, where every task is a process",
    )
    _arguments.add_device(parser)


def checked_num_rows(args: argparse.Namespace) -> int:
    """The number of rows. Raises ValueError if there are no rows or --view does not exist."""
    num_rows, num_views = FeatureTable.num_rows_and_views(args.features)
    is_valid = 0 <= args.view < num_views
    check_option("--view", args.view, is_valid, f"0 to {num_views - 1} for '{args.features}'")
    return num_rows


def run_on_table(
    args: argparse.Namespace, command: Callable[[FeatureTable, StopFlag], str], num_shards: int
) -> int:
    """Run `command(table, stop)` on --processes ranks; returns the exit code.

    `command` returns a summary on rank 0. A .npy is converted to a table of `num_shards` shards.
    """

    def work() -> int:
        from dist_scan.engine.stop import StopFlag
        from dist_scan.monitoring.progress import StopRequested
        from dist_scan.world.collectives import barrier
        from dist_scan.world.world import close_world, open_world

        stop = StopFlag()
        stop.install()
        world = open_world(args.device)
        try:
            table = FeatureTable.open_or_convert(args.features, args.out / "features", num_shards)
            summary = command(table, stop)
        except StopRequested:
            if world.rank == 0:
                print(f"stopped; the same command continues from what is finished in {args.out}")
            return 128 + (stop.signal or signal.SIGTERM)
        if world.rank == 0:
            print(f"{args.out}: {summary}")
        barrier()
        close_world()
        return 0

    return run_on_ranks(work, args.processes)
