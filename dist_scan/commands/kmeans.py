"""Exact k-means of all rows of a .npy or a feature table, on one or more processes."""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from typing import TYPE_CHECKING, get_args

from dist_scan.commands import _arguments, _search
from dist_scan.search.options import KMeansInit, KMeansOptions, check_num_clusters

if TYPE_CHECKING:
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.engine.stop import StopFlag

NUM_SHARDS = 16  # of the table made from a .npy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to cluster, and how."""
    _search.add_features(
        parser, "a folder: assignments.npz (cluster [N] int32) and centroids.npy [k, D]"
    )
    parser.add_argument("--k", type=int, required=True, help="number of clusters")
    parser.add_argument(
        "--iterations",
        type=int,
        default=100,
        help="largest number of iterations of each restart (default 100)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="stop when the objective falls by less than this fraction (default 0: when no "
        "assignment changes)",
    )
    parser.add_argument(
        "--restarts", type=int, default=5, help="number of runs; the best is taken (default 5)"
    )
    parser.add_argument("--init", default="kmeans++", choices=get_args(KMeansInit))
    parser.add_argument(
        "--raw",
        dest="normalise",
        action="store_false",
        help="do not scale rows to unit length first",
    )
    parser.add_argument("--spherical", action="store_true", help="centroids of unit length, too")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> int:
    """Cluster; the same command resumes an interrupted one."""
    if args.spherical and not args.normalise:
        raise ValueError("--spherical is for rows of unit length; leave out --raw")
    options = _arguments.to_options(args, KMeansOptions)
    check_num_clusters(args.k, _search.checked_num_rows(args), "--k")
    if (args.out / "assignments.npz").exists():
        raise ValueError(f"{args.out} already has clusters; give another folder, or remove it")
    args.out.mkdir(parents=True, exist_ok=True)
    return _search.run_on_table(args, partial(_cluster, args, options), NUM_SHARDS)


def _cluster(
    args: argparse.Namespace, options: KMeansOptions, table: FeatureTable, stop: StopFlag
) -> str:
    from dist_scan.search.kmeans import kmeans
    from dist_scan.storage.artifacts import WORK
    from dist_scan.world.world import current

    result = kmeans(
        table,
        args.k,
        options,
        stop_requested=lambda: stop.requested,
        checkpoint_path=args.out / WORK / "kmeans.npz",
    )
    if current().rank != 0:
        return ""
    result.save(args.out)
    shutil.rmtree(args.out / WORK, ignore_errors=True)
    return result.describe()
