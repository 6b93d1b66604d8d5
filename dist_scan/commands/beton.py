"""Build a dataset: images in a folder, parquet or tar shards -> one .beton file (restartable, in parallel)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pydantic import ValidationError

from dist_scan.config import ConfigError, DataConfig, SplitConfig
from dist_scan.data.sources.open import open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same settings as a config's `data:` block."""
    parser.add_argument(
        "source", help="image folder, parquet file/folder/glob, tar shards, or sklearn:digits"
    )
    parser.add_argument("out", help="OUT.beton")
    parser.add_argument("--stored", default="jpeg", choices=["raw", "jpeg", "original"])
    parser.add_argument(
        "--resolution", type=int, default=256, help="shorter side in pixels (default 256)"
    )
    parser.add_argument(
        "--max-side", type=int, default=1024, help="cap on the longer side (default 1024)"
    )
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        help="refuse above this share of unreadable images (default 0.01)",
    )
    parser.add_argument("--limit", type=int, help="only so many images, evenly spaced")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes (default: the cores this one may use)"
    )
    parser.add_argument(
        "--check", action="store_true", help="only hold OUT.beton against its checksums"
    )


def main(args: argparse.Namespace) -> int:
    """Build, or check."""
    from dist_scan.data.beton.format import check_beton
    from dist_scan.data.beton.write import write_beton

    out = Path(args.out)
    if out.suffix != ".beton":
        raise ConfigError(f"the output '{out}' must end in .beton")
    if args.check:
        print(f"{out}: {len(check_beton(out, whole=True).rows)} images, all as they were written")
        return 0
    try:
        config = DataConfig(
            train=SplitConfig(source=args.source, limit=args.limit),
            stored=args.stored,
            resolution=args.resolution,
            max_side=args.max_side,
            quality=args.quality,
            max_bad_share=args.max_bad_share,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"--{'.'.join(map(str, first['loc'])).removeprefix('train.').replace('_', '-')}: {first['msg']} (value {first['input']!r})"
        ) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    report = write_beton(
        open_source(config.train), out, config, args.workers or len(os.sched_getaffinity(0))
    )
    print(
        f"{out}: {report.num_images} images, {report.num_bad} could not be read{f' (listed in {report.bad_path})' if report.num_bad else ''}"
    )
    return 0
