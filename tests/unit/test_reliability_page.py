"""docs/reliability.md names a test that exists, or says what is not shown, for each row of the fault catalogue at each of its levels."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
LEVELS = {
    **{n: "PS" for n in (1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 18, 19, 20)},
    **{n: "P" for n in (7, 16, 17, 21, 22)},
    **{n: "S" for n in (10, 13, 14, 15)},
}


def cells(columns: int) -> list[list[str]]:
    """The page's table rows of so many columns."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("|")
    ]
    return [
        line for line in lines if len(line) == columns and line[0] != "#" and set(line[0]) != {"-"}
    ]


def catalogue() -> list[tuple[int, str, str, str]]:
    """(row, level, shown by, not shown); a line without a number belongs to the row above it."""
    found, number = [], 0
    for line in cells(5):
        number = int(line[0] or number)
        found.append((number, line[2], line[3], line[4]))
    return found


def test_every_row_is_there_at_every_level() -> None:
    there: dict[int, str] = {}
    for number, level, shown, missing in catalogue():
        there[number] = there.get(number, "") + level
        assert shown or missing, f"row {number} {level} says nothing"
    assert there == LEVELS


def test_every_test_that_is_named_exists_at_that_level() -> None:
    files = {short: ROOT / path for short, path in cells(2) if path.endswith(".py")}
    for number, level, shown, missing in catalogue():
        named = re.findall(r"`([\w-]+)::(test_\w+)`", shown)
        assert named or missing, f"row {number} {level} names no test"
        for short, test in named:
            assert f"def {test}(" in files[short].read_text(), (
                f"row {number}: {short}::{test} is not there"
            )
            assert ("slurm" in files[short].parts) == (level == "S"), (
                f"row {number}: {short} is not of level {level}"
            )
