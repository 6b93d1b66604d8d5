"""Print the JSON schema of a config, with which editors complete and check YAML."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def main(args: argparse.Namespace) -> int:
    """Print the schema."""
    from dist_scan.run_config import CompleteRunConfig

    print(json.dumps(CompleteRunConfig.model_json_schema(), indent=1))
    return 0
