"""docs/reliability.md: every row of the fault catalogue names a test, or says what is not shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
LEVELS = {
    **{n: "PS" for n in (1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 18, 19, 20)},
    **{n: "P" for n in (7, 16, 17, 21, 22)},
    **{n: "S" for n in (10, 13, 14, 15)},
}
"""Levels at which each row of the catalogue is tested: P for processes, S for Slurm."""


class Entry(NamedTuple):
    """One line of the catalogue."""

    row: int
    level: str
    shown_by: str
    not_shown: str


def table_lines(num_columns: int) -> list[list[str]]:
    """The cells of all table lines with this number of columns, without the headers."""
    lines = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        is_header = cells[0] == "#" or set(cells[0]) == {"-"}
        if line.startswith("|") and len(cells) == num_columns and not is_header:
            lines.append(cells)
    return lines


def catalogue() -> list[Entry]:
    """All entries; a line without a number belongs to the row above it."""
    entries: list[Entry] = []
    for number, _, level, shown_by, not_shown in table_lines(5):
        row = int(number) if number else entries[-1].row
        entries.append(Entry(row, level, shown_by, not_shown))
    return entries


def test_every_row_has_an_entry_at_each_of_its_levels() -> None:
    levels: dict[int, str] = {}
    for entry in catalogue():
        levels[entry.row] = levels.get(entry.row, "") + entry.level
        assert entry.shown_by or entry.not_shown, entry
    assert levels == LEVELS


def test_every_named_test_exists_at_its_level() -> None:
    files = {short: ROOT / path for short, path in table_lines(2) if path.endswith(".py")}
    for entry in catalogue():
        named = re.findall(r"`([\w-]+)::(test_\w+)`", entry.shown_by)
        assert named or entry.not_shown, f"{entry} names no test"
        for short, test in named:
            assert f"def {test}(" in files[short].read_text(), f"{short}::{test} does not exist"
            is_slurm = "slurm" in files[short].parts
            assert is_slurm == (entry.level == "S"), f"{short} is not a test of level {entry.level}"
