"""Several results over several seeds, side by side: a table for a document, and one page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dist_scan.report import figures
from dist_scan.storage.atomic import write_text

SCORES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "seconds": "seconds"}


@dataclass(frozen=True)
class Row:
    """One line: a name, and its scores (acc, nmi, ari, seconds; None without labels) by seed. A seed that is not done is not there."""

    name: str
    scores: Mapping[int, Mapping[str, Any]]

    def values(self, key: str) -> list[float]:
        """One score over the seeds that have it."""
        return [s[key] for s in self.scores.values() if s.get(key) is not None]

    def mean(self, key: str) -> float | None:
        """None when no seed has it."""
        return statistics.fmean(self.values(key)) if self.values(key) else None

    def spread(self, key: str) -> float | None:
        """The sample's standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.values(key)) if len(self.values(key)) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """All a page shows."""

    name: str
    num_images: int
    rows: list[Row]
    baseline: str
    num_seeds: int

    def against_baseline(self) -> list[str]:
        """A sentence for every other row whose mean accuracy is not above the baseline's, or not for every seed."""
        base = next(r for r in self.rows if r.name == self.baseline)
        out = []
        for row in self.rows:
            if row is base or row.mean("acc") is None or base.mean("acc") is None:
                continue
            both = [s for s in row.scores if s in base.scores]
            below = [s for s in both if row.scores[s]["acc"] <= base.scores[s]["acc"]]
            if row.mean("acc") <= base.mean("acc"):
                out.append(
                    f"{row.name} is not above {base.name}: {row.mean('acc'):.3f} against {base.mean('acc'):.3f} (mean ACC)."
                )
            elif below:
                out.append(
                    f"{row.name} is above {base.name} in the mean ({row.mean('acc'):.3f} against {base.mean('acc'):.3f}), "
                    f"but not for seed {', '.join(map(str, below))}."
                )
        return out


def cell(row: Row, key: str) -> str:
    """`0.957 ± 0.008`, `81 ± 12`, or a dash."""
    mean, spread = row.mean(key), row.spread(key)
    if mean is None:
        return "-"
    digits = 0 if key == "seconds" else 3
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def markdown(found: Comparison) -> str:
    """The table, and in plain words what is not above the baseline."""
    lines = [
        ["", *SCORES.values(), "seeds"],
        *([r.name, *(cell(r, key) for key in SCORES), str(len(r.scores))] for r in found.rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| "
        + " | ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
        )
        + " |"
        for line in lines
    ]
    rule = (
        "|"
        + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return (
        "\n".join(
            [
                text[0],
                rule,
                *text[1:],
                *([""] + found.against_baseline() if found.against_baseline() else []),
            ]
        )
        + "\n"
    )


def write_page(found: Comparison, path: Path) -> None:
    """compare.html: one file, nothing from outside."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {
        name: figures.dots([(r.name, r.values(key)) for r in found.rows], name, found.baseline)
        for key, name in SCORES.items()
        if any(r.values(key) for r in found.rows)
    }
    best = {
        key: max((r.mean(key) for r in found.rows if r.mean(key) is not None), default=None)
        for key in ("acc", "nmi", "ari")
    }
    table = [
        (
            r.name,
            [
                (cell(r, key), r.mean(key) is not None and r.mean(key) == best.get(key))
                for key in SCORES
            ],
            len(r.scores),
        )
        for r in found.rows
    ]
    write_text(
        path,
        env.get_template("compare.html.j2").render(
            found=found, table=table, heads=list(SCORES.values()), drawn=drawn
        ),
    )
