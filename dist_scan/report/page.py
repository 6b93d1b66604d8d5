"""HTML pages from the templates in this folder: one file each, without links to other files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dist_scan.monitoring.progress import format_duration
from dist_scan.storage.atomic import write_text

SUBJECT_NAMES = {
    "kmeans_pixels": "k-means on pixels",
    "kmeans_features": "k-means on features",
    "scan": "SCAN heads",
    "consensus": "SCAN consensus",
    "selflabel": "Self-labelled",
}


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template and write the page atomically; the folder is made if needed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "gibibytes": format_gibibytes,
        "score": format_score,
        "number": format_number,
        "subject": subject_name,
        "duration": format_duration,
        "percent": lambda share: f"{100 * share:.3g} %",
        "words": lambda name: str(name).replace("_", " "),
    }
    page = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def subject_name(name: str) -> str:
    """'k-means on pixels' for ``kmeans_pixels``; other names get spaces for underscores."""
    return SUBJECT_NAMES.get(name, name.replace("_", " "))


def format_score(value: float | None) -> str:
    """'0.977' for 0.97731; '-' for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def format_gibibytes(size: int | None) -> str:
    """'3.00 GiB' for a number of bytes; '-' if it is not known."""
    return f"{size / 2**30:.2f} GiB" if size else "-"


def format_number(value: Any) -> str:
    """'1,281,167' for 1281167, '12.35' for 12.3456, 'yes' for True, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.4g}"
    return str(value)


def pad_columns(lines: list[list[str]]) -> list[list[str]]:
    """Cells of a text table, padded to the width of their column; the first column to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        [line[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(line[1:], widths[1:]))]
        for line in lines
    ]
