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
    """One item of the catalogue: how a fault is shown at level P (processes) or S (Slurm)."""

    row: int
    level: str
    text: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """(short name of the file, name) of each test."""
        return re.findall(r"`([\w-]+)::(test_\w+)`", self.text)


def files_by_short_name() -> dict[str, Path]:
    """Files of tests by their short names."""
    rows = re.findall(r"^\| ([\w-]+) \| (tests/[\w/]+\.py) \|$", PAGE, re.MULTILINE)
    return {name: ROOT / path for name, path in rows}


def catalogue() -> list[Entry]:
    """All items below the numbered headings."""
    entries = []
    for row, section in re.findall(r"^### (\d+)\. .*\n((?:(?!#).*\n)*)", PAGE, re.MULTILINE):
        items = re.findall(r"^- ([PS]): (.*(?:\n  .*)*)", section, re.MULTILINE)
        entries += [Entry(int(row), level, text) for level, text in items]
    return entries


def test_every_row_of_the_catalogue_is_there_at_every_level() -> None:
    levels: defaultdict[int, str] = defaultdict(str)
    for entry in catalogue():
        levels[entry.row] += entry.level
    assert levels == {
        **dict.fromkeys(IN_PROCESSES_AND_ON_SLURM, "PS"),
        **dict.fromkeys(IN_PROCESSES, "P"),
        **dict.fromkeys(ON_SLURM, "S"),
    }


def test_every_named_test_exists_at_its_level() -> None:
    files = files_by_short_name()
    for entry in catalogue():
        assert entry.tests or "Not shown:" in entry.text, f"{entry} names no test"
        for name, test in entry.tests:
            path = files[name]
            assert f"def {test}(" in path.read_text(), f"row {entry.row}: no {test} in {path}"
            is_live = "slurm" in path.parts
            assert is_live == (entry.level == "S"), f"row {entry.row}: {path} is of another level"
