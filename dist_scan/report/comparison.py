"""Comparison of several results over several seeds: a Markdown table and an HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_scan.report import figures
from dist_scan.report.page import pad_columns, write_page

COLUMNS = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "seconds": "seconds"}


@dataclass(frozen=True)
class Row:
    """A result and its scores by seed (acc, nmi, ari, seconds; None without labels).

    Seeds that have not finished are missing.
    """

    name: str
    scores: Mapping[int, Mapping[str, Any]]

    def values(self, key: str) -> list[float]:
        """One score of all seeds that have it."""
        return [scores[key] for scores in self.scores.values() if scores.get(key) is not None]

    def mean(self, key: str) -> float | None:
        """Mean of a score over seeds; None if no seed has it."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def standard_deviation(self, key: str) -> float | None:
        """Standard deviation of the sample; None for fewer than two seeds."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    def cell(self, key: str) -> str:
        """'0.957 ± 0.008', '81 ± 12' for seconds, or '-'."""
        mean, deviation = self.mean(key), self.standard_deviation(key)
        if mean is None:
            return "-"
        digits = 0 if key == "seconds" else 3
        text = f"{mean:.{digits}f}"
        return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


@dataclass(frozen=True)
class Comparison:
    """Contents of the table and the page."""

    name: str
    num_images: int
    rows: list[Row]
    baseline: str
    """Name of the row that the others are compared with."""
    num_seeds: int

    def not_above_baseline(self) -> list[str]:
        """A sentence for every row that is not above the baseline in ACC, by mean or by seed."""
        baseline = next(row for row in self.rows if row.name == self.baseline)
        sentences = (self._compare(row, baseline) for row in self.rows if row is not baseline)
        return [sentence for sentence in sentences if sentence]

    def _compare(self, row: Row, baseline: Row) -> str:
        mean, baseline_mean = row.mean("acc"), baseline.mean("acc")
        if mean is None or baseline_mean is None:
            return ""
        figures_text = f"{mean:.3f} against {baseline_mean:.3f}"
        if mean <= baseline_mean:
            return f"{row.name} is not above {baseline.name}: {figures_text} (mean ACC)."
        common = [seed for seed in row.scores if seed in baseline.scores]
        below = [
            str(seed) for seed in common if row.scores[seed]["acc"] <= baseline.scores[seed]["acc"]
        ]
        if not below:
            return ""
        return (
            f"{row.name} is above {baseline.name} in the mean ({figures_text}), "
            f"but not for seed {', '.join(below)}."
        )


def markdown(comparison: Comparison) -> str:
    """The table, followed by what is not above the baseline."""
    lines = [["", *COLUMNS.values(), "seeds"]]
    for row in comparison.rows:
        lines.append([row.name, *(row.cell(key) for key in COLUMNS), str(len(row.scores))])
    head, *rest = pad_columns(lines)
    # A colon aligns a column to the right.
    rule = ["-" * (len(head[0]) + 2), *("-" * (len(cell) + 1) + ":" for cell in head[1:])]
    text = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    text += [f"| {' | '.join(line)} |" for line in rest]
    if sentences := comparison.not_above_baseline():
        text += ["", *sentences]
    return "\n".join(text) + "\n"


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page, which needs no other files."""
    drawings = {
        name: figures.dots(
            [(row.name, row.values(key)) for row in comparison.rows], name, comparison.baseline
        )
        for key, name in COLUMNS.items()
        if any(row.values(key) for row in comparison.rows)
    }
    write_page(
        path,
        "compare.html.j2",
        comparison=comparison,
        columns=COLUMNS,
        highest={key: _highest_mean(comparison, key) for key in ("acc", "nmi", "ari")},
        drawings=drawings,
    )


def _highest_mean(comparison: Comparison, key: str) -> float | None:
    means = [row.mean(key) for row in comparison.rows]
    return max((mean for mean in means if mean is not None), default=None)
