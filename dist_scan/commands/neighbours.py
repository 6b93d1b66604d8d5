"""Exact nearest neighbours of every row of a .npy or a feature table, on one or more processes."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, get_args

from dist_scan.commands import _arguments, _search
from dist_scan.search.options import Metric, NeighbourOptions, check_num_neighbours

if TYPE_CHECKING:
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.engine.stop import StopFlag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to search, and how."""
    _search.add_features(
        parser,
        "a folder: ids-*.npy [n, K] int64 and scores-*.npy [n, K] float64, a pair for each shard",
    )
    parser.add_argument(
        "--k",
        type=int,
        default=20,
        help="number of neighbours of each row, not counting itself (default 20)",
    )
    parser.add_argument(
        "--metric",
        default="cosine",
        choices=get_args(Metric),
        help="scores of l2 are negative squared distances (default cosine)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=16,
        help="number of shards into which a .npy is split (default 16); "
        "an interrupted search continues after the last complete shard",
    )
    parser.add_argument(
        "--merge", action="store_true", help="also write all rows to OUT/ids.npy and OUT/scores.npy"
    )


def main(args: argparse.Namespace) -> int:
    """Search; the same command resumes an interrupted search."""
    _arguments.check_at_least(args, shards=1)
    check_num_neighbours(args.k, _search.checked_num_rows(args), "--k")
    return _search.run_on_table(args, partial(_search_neighbours, args), args.shards)


def _search_neighbours(args: argparse.Namespace, table: FeatureTable, stop: StopFlag) -> str:
    from dist_scan.search.neighbours import describe_neighbours, search_neighbours
    from dist_scan.world.world import current

    neighbours = search_neighbours(
        table,
        args.out,
        args.k,
        NeighbourOptions(metric=args.metric, view=args.view),
        stop_requested=lambda: stop.requested,
    )
    if current().rank != 0:
        return ""
    if args.merge:
        neighbours.merge()
    return describe_neighbours(neighbours)
