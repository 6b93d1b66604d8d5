"""Stand-ins for programs that a test must not really run, such as Slurm's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_commands(folder: Path, lines: Mapping[str, str]) -> Path:
    """Create an executable bash script for each name in the folder; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, line in lines.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    return folder
