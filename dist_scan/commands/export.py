"""Export the model of a finished run: weights for plain timm and torch, and how to use them."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_scan.commands import _arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the folder to write."""
    _arguments.add_finished_run(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that does not exist yet")


def main(args: argparse.Namespace) -> int:
    """Write OUT/model.safetensors (or cluster.safetensors) and OUT/model.json."""
    from dist_scan.export import export_model
    from dist_scan.finished_run import open_finished_run

    run = open_finished_run(args.run)
    choice = run.choose_model(args.stage)
    lines = export_model(run, choice, args.out)
    print(f"{args.out}: the model of stage {choice.stage}. To load it:")
    print("\n".join(f"  {line}" for line in lines))
    return 0
