"""Arguments and checks that several commands have in common."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dist_scan.config import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def add_finished_run(parser: argparse.ArgumentParser) -> None:
    """RUN and --stage."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--stage",
        help="stage whose model is used (default: the one behind `best` of the report stage)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])


def add_workers(parser: argparse.ArgumentParser, description: str) -> None:
    """--workers; 0 stands for all cores."""
    parser.add_argument(
        "--workers", type=int, default=0, help=f"{description} (default: the number of cores)"
    )


def check_at_least(args: argparse.Namespace, **minima: int) -> None:
    """Raise ConfigError if an argument that is given is less than its minimum."""
    for name, minimum in minima.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: {value}; allowed: {minimum} or more")


def to_options(args: argparse.Namespace, cls: type[Options]) -> Options:
    """A dataclass of options from the arguments of the same names."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})
