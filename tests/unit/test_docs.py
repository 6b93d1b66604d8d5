"""The documents: links, file names and named objects exist; no line is too long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted(
    path
    for folder in ("dist_scan", "launch", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
MAX_COLUMNS = 120
MIN_OBJECTS = 30
FILE_NAME = re.compile(
    r"(?<![\w/.-])"
    r"((?:dist_scan|launch|configs|tests|benchmarks|docs)/[\w/.-]*\w\.(?:py|md|yaml|sh|jsonl|j2))"
)
"""A path from the root of the project."""
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)")
"""The target of a Markdown link inside the project."""
EXAMPLE_FILE = re.compile(r"^`([\w/.]+)`:$", re.MULTILINE)
"""The line above the content of an example file."""
EXAMPLES = {"dist_scan/methods/NAME.py", "configs/a.yaml"}
"""File names that stand for one of the reader's own."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def missing_files(text: str) -> list[str]:
    """File names in a text that do not exist, apart from those of examples."""
    names = set(FILE_NAME.findall(text)) - set(EXAMPLE_FILE.findall(text)) - EXAMPLES
    return sorted(name for name in names if not (ROOT / name).exists())


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [t for t in LINK.findall(page.read_text()) if not (page.parent / t).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_named_in_a_page_exist(page: Path) -> None:
    assert not missing_files(page.read_text())


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_files_named_in_comments_and_docstrings_exist(source: Path) -> None:
    assert not missing_files(source.read_text())


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_lines_fit_the_width(page: Path) -> None:
    long = [n for n, line in enumerate(page.read_text().splitlines(), 1) if len(line) > MAX_COLUMNS]
    assert not long


def names_in(body: list[ast.stmt]) -> set[str]:
    """Functions, classes and annotated variables that statements define."""
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def defined_names(path: Path) -> set[str]:
    """Functions, classes and annotated variables of a module; `Class.name` for those of a class."""
    body = ast.parse(path.read_text()).body
    names = names_in(body)
    for node in body:
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{name}" for name in names_in(node.body))
    return names


def test_objects_of_the_architecture_page_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| .+ \| `([\w/]+\.py)` \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert len(rows) >= MIN_OBJECTS
    missing = [(file, name) for file, name in rows if name not in defined_names(ROOT / file)]
    assert not missing
