"""The table and the page of a comparison."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from dist_scan.report.comparison import Comparison, Row, markdown, write_comparison


def make_row(name: str, *accuracies: float) -> Row:
    """A row with one seed per accuracy."""
    scores = {
        seed: {"acc": accuracy, "nmi": accuracy, "ari": None, "seconds": 10.0 + seed}
        for seed, accuracy in enumerate(accuracies)
    }
    return Row(name, scores)


BASELINE = make_row("base", 0.5, 0.7)
UNFINISHED = make_row("unfinished")
UNLABELLED = Row("unlabelled", {0: {"acc": None, "seconds": 3.2}})
COMPARISON = Comparison(
    "x",
    1797,
    [
        BASELINE,
        make_row("better", 0.8, 0.9),
        make_row("mixed", 0.9, 0.6),
        make_row("worse", 0.2, 0.3),
        UNFINISHED,
        UNLABELLED,
    ],
    "base",
    2,
)


def test_cells_show_mean_and_sample_standard_deviation() -> None:
    assert BASELINE.cell("acc") == "0.600 ± 0.141"
    assert BASELINE.cell("seconds") == "10 ± 1"
    assert BASELINE.cell("ari") == "-"
    assert make_row("one", 0.25).cell("acc") == "0.250"
    assert UNLABELLED.cell("seconds") == "3"
    assert UNFINISHED.cell("acc") == "-"


def test_rows_that_are_not_above_the_baseline_are_named() -> None:
    mixed, worse = COMPARISON.not_above_baseline()
    assert mixed.startswith("mixed is above base in the mean")
    assert mixed.endswith("seed 1.")
    assert worse == "worse is not above base: 0.250 against 0.600 (mean ACC)."


def test_the_markdown_table_holds_every_row() -> None:
    lines = markdown(COMPARISON).splitlines()
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert len({len(line) for line in lines[:8]}) == 1
    assert lines[2].startswith("| base")
    assert lines[-1].startswith("worse is not above")


def test_the_page_holds_every_row_and_needs_no_other_files(tmp_path: Path) -> None:
    write_comparison(COMPARISON, tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("<tr>") == 7
    assert page.count('class="best"') == 2
    assert page.count('role="alert"') == 2
    assert "0.850 ± 0.071" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    HTMLParser().feed(page)
