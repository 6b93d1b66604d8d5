"""Build a dataset: images of a folder, parquet or tar -> one .beton file (resumable)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from dist_scan.commands import _arguments
from dist_scan.config import ConfigError, DataConfig, validate_settings
from dist_scan.config.data import STORAGE_SETTINGS

SETTINGS = (*STORAGE_SETTINGS, "max_bad_share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, output, and the storage settings of a config's `data:` block."""
    parser.add_argument(
        "source", help="image folder, parquet file/folder/glob, tar shards, or sklearn:digits"
    )
    parser.add_argument("out", type=Path, metavar="OUT.beton")
    for name in SETTINGS:
        field = DataConfig.model_fields[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=get_args(field.annotation) or None,
            help=f"{field.description} (default {field.default})",
        )
    parser.add_argument("--limit", type=int, help="use only this many images, evenly spaced")
    _arguments.add_workers(parser, "processes that encode images")
    parser.add_argument(
        "--check", action="store_true", help="only verify the checksums of OUT.beton"
    )


def main(args: argparse.Namespace) -> int:
    """Build a .beton, or verify one."""
    from dist_scan.data.beton.format import read_image_table
    from dist_scan.data.beton.write import write_beton
    from dist_scan.data.sources.open import open_source

    _arguments.check_at_least(args, limit=1)
    if args.out.suffix != ".beton":
        raise ConfigError(f"the output '{args.out}' must end in .beton")
    if args.check:
        num_images = len(read_image_table(args.out, verify_images=True))
        print(f"{args.out}: {num_images} images, all checksums match")
        return 0
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["train"] = {"source": args.source, "limit": args.limit}
    data = validate_settings(DataConfig, settings, "beton")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = write_beton(open_source(data.train), args.out, data, args.workers)
    listed = f" (listed in {report.unreadable_list})" if report.num_unreadable else ""
    print(
        f"{args.out}: {report.num_images} images, {report.num_unreadable} could not be read{listed}"
    )
    return 0
