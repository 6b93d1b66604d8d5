"""docs/reliability.md: every row of the fault catalogue names an existing test at each level.

Or says what is not shown.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
IN_PROCESSES_AND_ON_SLURM = (1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 18, 19, 20)
IN_PROCESSES = (7, 16, 17, 21, 22)
ON_SLURM = (10, 13, 14, 15)


class Entry(NamedTuple):
    """One line of the catalogue: a fault at level P (processes) or S (Slurm)."""

    row: int
    level: str
    shown_by: str
    not_shown: str


def table_rows(num_columns: int) -> list[list[str]]:
    """Rows of the page's tables with so many columns, without headers and rulers."""
    rows = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        is_ruler = set(cells[0]) == {"-"}
        if line.startswith("|") and len(cells) == num_columns and cells[0] != "#" and not is_ruler:
            rows.append(cells)
    return rows


def catalogue() -> list[Entry]:
    """All entries; a line without a number belongs to the row above it."""
    entries = []
    row = 0
    for number, _, level, shown_by, not_shown in table_rows(5):
        row = int(number or row)
        entries.append(Entry(row, level, shown_by, not_shown))
    return entries


def test_every_row_of_the_catalogue_is_there_at_every_level() -> None:
    levels: defaultdict[int, str] = defaultdict(str)
    for entry in catalogue():
        levels[entry.row] += entry.level
        assert entry.shown_by or entry.not_shown, f"{entry} is empty"
    assert levels == {
        **dict.fromkeys(IN_PROCESSES_AND_ON_SLURM, "PS"),
        **dict.fromkeys(IN_PROCESSES, "P"),
        **dict.fromkeys(ON_SLURM, "S"),
    }


def test_every_named_test_exists_at_its_level() -> None:
    files = {name: ROOT / path for name, path in table_rows(2) if path.endswith(".py")}
    for entry in catalogue():
        tests = re.findall(r"`([\w-]+)::(test_\w+)`", entry.shown_by)
        assert tests or entry.not_shown, f"{entry} names no test"
        for name, test in tests:
            path = files[name]
            assert f"def {test}(" in path.read_text(), f"row {entry.row}: no {test} in {path}"
            is_live = "slurm" in path.parts
            assert is_live == (entry.level == "S"), f"row {entry.row}: {path} is of another level"
