"""Tolerant readers for the small files of a run folder.

A file may be incomplete after a full disk or a kill, edited by hand, or written by another version.
What cannot be read counts as absent: no reader here raises because of a file's content. Standard
library only, because the batch script calls launch/recovery.py with any Python 3.11.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_scan.storage.atomic import append_line


def read_text(path: Path) -> str:
    """Content without surrounding white space; '' if there is no such file.

    Bytes that are not UTF-8 become U+FFFD.
    """
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return ""


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that the file holds; None if it holds anything else."""
    return _parse_object(read_text(path))


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, in order; lines that are not an object are skipped."""
    objects = [_parse_object(line) for line in read_text(path).splitlines()]
    return [entry for entry in objects if entry is not None]


def append_object(path: Path, entry: dict[str, Any]) -> None:
    """Append a line to a JSON lines file. Raises OSError, for example on a full disk."""
    with open(path, "a+b", buffering=0) as file:
        append_line(file, json.dumps(entry).encode() + b"\n")


def as_integer(value: object) -> int | None:
    """The value if it is an integer (a bool is not); else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return None


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
