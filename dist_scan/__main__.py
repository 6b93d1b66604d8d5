"""`python -m dist_scan COMMAND ...`: each command is a module of dist_scan/commands."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dist_scan import commands
from dist_scan.config import FATAL_ERROR
from dist_scan.config.kinds import kinds


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; a ValueError is printed as one line, exit code 2."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return FATAL_ERROR
    except OSError as error:
        if error.filename is None:  # not about a file of the user
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return FATAL_ERROR


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, and its function as `main`."""
    parser = argparse.ArgumentParser(prog="python -m dist_scan")
    subparsers = parser.add_subparsers(dest="command", required=True)
    names = kinds(commands)
    is_command_named = len(argv) > 0 and argv[0] in names
    for name in names:
        # Only the command to run is imported: some take long.
        if is_command_named and name != argv[0]:
            subparsers.add_parser(name)
            continue
        module = importlib.import_module(f"{commands.__name__}.{name}")
        description = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name, help=description.partition("\n")[0], description=description
        )
        module.add_arguments(subparser)
        subparser.set_defaults(main=module.main)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
