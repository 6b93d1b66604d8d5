"""python -m dist_scan schema: the JSON schema of a config, for editors that complete and check YAML."""

from __future__ import annotations

import argparse
import json

from dist_scan.run_config import CompleteRunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(args: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(CompleteRunConfig.model_json_schema(), indent=1))
    return 0
