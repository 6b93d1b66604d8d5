"""Reading the small files of a run folder as they may be found: torn by a full disk or a kill, changed by a hand, of another make.

What cannot be read counts as absent; nothing here raises for what a file holds. Standard library only: the batch script asks it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_scan.storage.atomic import append_line


def text(path: Path) -> str:
    """The file as text without white space around it; bytes that are no UTF-8 become U+FFFD. '' where there is no such file."""
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except OSError:
        return ""


def record(path: Path) -> dict[str, Any] | None:
    """The one JSON object that the file holds; None where it holds anything else, or nothing."""
    return _object(text(path))


def entries(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, in their order; a torn or foreign line is left out."""
    found = [_object(line) for line in text(path).splitlines()]
    return [entry for entry in found if entry is not None]


def append(path: Path, entry: dict[str, Any]) -> None:
    """One more line; a last line that was torn is ended first, so that this one stands alone. Raises OSError (a full disk)."""
    with open(path, "a+b", buffering=0) as f:
        append_line(f, json.dumps(entry).encode() + b"\n")


def number(value: Any) -> int | None:
    """A whole number, or None (true is none)."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _object(said: str) -> dict[str, Any] | None:
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
