"""Clusters of new images by a finished run: folder, parquet, tar or .beton -> a parquet file."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from dist_scan.commands import _arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a prediction."""
    _arguments.add_finished_run(parser)
    parser.add_argument(
        "images",
        metavar="IMAGES",
        help="image folder, parquet file/folder/glob, tar shards, "
        "or a .beton with the run's storage settings",
    )
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        type=Path,
        metavar="OUT.parquet",
        help="one row per image; unreadable images are listed in OUT.bad.csv",
    )
    parser.add_argument(
        "--features",
        metavar="STAGE",
        help="the embed stage of training images that novelty is measured against "
        "(default: the one whose neighbours were searched; none: no novelty)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images per batch (default: the run's; fewer if memory is short, more on a GPU)",
    )
    _arguments.add_device(parser)
    _arguments.add_workers(parser, "processes and threads that read images")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.parquet if it exists")


def main(args: argparse.Namespace) -> int:
    """Predict; the same command resumes an interrupted prediction."""
    from dist_scan.prediction import PredictOptions, predict

    _arguments.check_at_least(args, batch=1, workers=0)
    options = _arguments.to_options(args, PredictOptions)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prediction = predict(options)
    except KeyboardInterrupt:
        print(f"\nstopped; encoded images stay in {options.work_dir}, the same command resumes it")
        return 128 + signal.SIGINT
    bad = ""
    if prediction.num_bad:
        bad = f"; {prediction.num_bad} could not be read (listed in {options.bad_images})"
    print(f"{options.out}: {prediction.num_images} images by stage {prediction.stage}{bad}")
    return 0
