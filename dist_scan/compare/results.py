"""The table and the page of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

from dist_scan.compare.config import ComparisonConfig, split_result
from dist_scan.compare.runs import Runs, is_finished
from dist_scan.report.comparison import Comparison, Row, markdown, write_comparison
from dist_scan.storage.atomic import write_json, write_text


def write_results(comparison: ComparisonConfig, runs: Runs, out: Path) -> str:
    """Write compare.json, compare.md and compare.html from the finished runs.

    Returns the table as text.
    """
    reports = {
        key: json.loads((run.run_dir / "report.json").read_text())
        for key, run in runs.items()
        if is_finished(run)
    }
    rows = []
    for name, result in comparison.rows.items():
        member, subject = split_result(result)
        seeds = [seed for seed in comparison.seeds if (member, seed) in reports]
        rows.append(Row(name, {seed: reports[member, seed][subject] for seed in seeds}))
    num_images = next(iter(reports.values()))["num_images"] if reports else 0
    table = Comparison(
        comparison.name, num_images, rows, comparison.baseline, len(comparison.seeds)
    )
    text = markdown(table)
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "compare.json",
        {
            "name": comparison.name,
            "num_images": num_images,
            "baseline": comparison.baseline,
            "rows": {row.name: row.scores for row in rows},
        },
    )
    write_text(out / "compare.md", text)
    write_comparison(table, out / "compare.html")
    return text
