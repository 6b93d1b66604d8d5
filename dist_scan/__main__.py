"""python -m dist_scan COMMAND ...: each command is a module of dist_scan/commands, found by its name."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

from dist_scan import commands
from dist_scan.config import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code; a mistake of the user's is one line and 2."""
    parser = argparse.ArgumentParser(prog="python -m dist_scan")
    subparsers = parser.add_subparsers(dest="command", required=True)
    chosen = next(iter(argv if argv is not None else sys.argv[1:]), None)
    for info in pkgutil.iter_modules(commands.__path__):
        if chosen in (
            info.name,
            "-h",
            "--help",
            None,
        ):  # the others are not imported: some are slow to
            module = importlib.import_module(f"dist_scan.commands.{info.name}")
            sub = subparsers.add_parser(
                info.name, help=module.__doc__.splitlines()[0], description=module.__doc__
            )
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
        else:
            subparsers.add_parser(info.name)
    args = parser.parse_args(argv)
    try:
        return args.main(args)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # no file of the user's: not for them to mend
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
