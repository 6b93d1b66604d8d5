"""The same work on 1, 2, 4, ... nodes as one page: `python -m benchmarks.scaling FOLDER [OUT.html]`

FOLDER holds printed rows (*.jsonl at any depth) and, from `launch/slurm.py --benchmark`, run
folders nodes-N (benchmarks/runs.py). Speed-up is the rate over the rate on the fewest nodes
measured, times their number; efficiency is speed-up over nodes. A rate per core or per link should
stay the same instead (`flat`); its efficiency is the rate over that on the fewest nodes. The page
needs no network and no other file. It and the same figures as JSON are written into FOLDER unless
OUT is given.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import problems, stage_rows
from dist_scan.storage.atomic import write_json, write_text
from launch import records

Row = Mapping[str, Any]
RATES = (
    "images_per_s",
    "bytes_per_s",
    "rows_per_s",
    "views_per_s",
    "pairs_per_cpu_s",
    "views_per_cpu_s",
    "img_per_cpu_s",
    "mib_per_s",
)
FLAT_RATES = ("bytes_per_s", "pairs_per_cpu_s", "views_per_cpu_s", "img_per_cpu_s")
RUNS_PER_S = "runs_per_s"
"""The rate of rows that only have seconds."""
FIRST_BENCHMARK = "trainings"
"""First on the page: what most readers look for."""
IDENTITY_FIELDS = (
    "row",
    "model",
    "size",
    "rows",
    "dim",
    "k",
    "clusters",
    "images",
    "stored",
    "resolution",
    "recipe",
    "views",
)
"""Rows of one benchmark that are equal in these are points of one curve."""
SECTION_ORDER = (
    "data_wait",
    "copy",
    "augmentation",
    "forward",
    "backward",
    "all_reduce",
    "waiting",
    "optimizer",
    "end_step",
    "save",
    "epoch",
    "other",
)
SECTION_NAMES = {
    "waiting": "waiting for slower ranks",
    "all_reduce": "all-reduce on every rank",
    "end_step": "the method's end_step",
}
"""Names of sections in sentences, where the name itself would be unclear."""
SHOWN_SHARE = 0.005
"""Sections below this share of a step are summed, or left out of sentences."""
OPTIONAL_COLUMNS = {
    "host memory": "peak_host_mib",
    "GPU memory": "peak_gpu_mib",
    "planned": "planned_mib",
    "first step": "first_step_s",
}
STYLE = """
:root{--page:#f7f6f3;--card:#fff;--ink:#22262a;--soft:#6a7076;--line:#e4e2dc;--accent:#2b7a7e}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e4e6e8;--soft:#99a1a8;
--line:#2d3338;--accent:#5fb9b6}}
body{margin:0 auto;max-width:1040px;padding:36px 24px;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,sans-serif}
.soft{color:var(--soft);font-size:13.5px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;
margin:14px 0;display:grid;grid-template-columns:300px minmax(0,1fr);gap:12px 26px}
.card>*{min-width:0;overflow-x:auto}
@media(max-width:700px){.card{grid-template-columns:minmax(0,1fr)}}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:500;font-size:12.5px;color:var(--soft)}
th,td{text-align:right;padding:6px 8px;border-top:1px solid var(--line);white-space:nowrap}
th{border:0}td:first-child,th:first-child{text-align:left}
.wide{grid-column:1/-1}p{margin:4px 0 0}
h1{font-size:30px;margin:0 0 4px}h2{font-size:19px;margin:34px 0 2px}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}
"""


@dataclass(frozen=True)
class Point:
    """One benchmark row on one number of nodes."""

    nodes: int
    rate: float
    speedup: float
    efficiency: float
    row: Row


@dataclass(frozen=True)
class Curve:
    """One row of one benchmark over numbers of nodes, ascending."""

    benchmark: str
    label: str
    unit: str
    flat: bool
    """The rate should stay the same instead of growing."""
    points: tuple[Point, ...]


def collect(folder: Path) -> list[dict[str, Any]]:
    """All rows below a folder: in *.jsonl files, except in logs, and of its run folders.

    Lines that are not a row are skipped.
    """
    rows = [row for run_dir in _run_dirs(folder) for row in stage_rows(run_dir)]
    for path in sorted(folder.rglob("*.jsonl")):
        if "logs" in path.relative_to(folder).parts:
            continue
        for row in records.read_objects(path):
            if {"benchmark", "nodes"} <= row.keys():
                rows.append(row)
    return rows


def _run_dirs(folder: Path) -> list[Path]:
    """The folders nodes-N, by N."""
    by_nodes = {}
    for path in folder.glob("nodes-*"):
        nodes = path.name.removeprefix("nodes-")
        if path.is_dir() and nodes.isdigit():
            by_nodes[int(nodes)] = path
    return [by_nodes[nodes] for nodes in sorted(by_nodes)]


def read_description(folder: Path) -> dict[str, Any]:
    """benchmark.json, as launch/benchmark.py writes it; {} if there is none."""
    return records.read_object(folder / "benchmark.json") or {}


def missing(folder: Path) -> dict[str, list[str]]:
    """By number of nodes: why requested figures are not there."""
    reasons = {}
    for nodes in read_description(folder).get("nodes", ()):
        if found := problems(folder / f"nodes-{nodes}"):
            reasons[str(nodes)] = found
    return reasons


def rate_of(row: Row) -> tuple[float, str] | None:
    """(rate, its unit); a row that only has seconds counts as runs per second. None: neither."""
    for name in RATES:
        if row.get(name):
            return float(row[name]), name
    seconds = row.get("wall_s") or row.get("seconds")
    return (1 / float(seconds), RUNS_PER_S) if seconds else None


def curves(rows: Iterable[Row]) -> list[Curve]:
    """Rows that differ only in the number of nodes as curves, by benchmark, else in order of date.

    Of two rows of the same number of nodes the later counts.
    """
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("date", ""))):
        if rate_of(row) is not None:
            identity = tuple((name, row[name]) for name in IDENTITY_FIELDS if name in row)
            groups.setdefault((row["benchmark"], identity), {})[int(row["nodes"])] = row
    found = [_curve(name, identity, group) for (name, identity), group in groups.items()]
    return sorted(found, key=lambda curve: (curve.benchmark != FIRST_BENCHMARK, curve.benchmark))


def _curve(
    benchmark: str, identity: tuple[tuple[str, Any], ...], by_nodes: Mapping[int, Row]
) -> Curve:
    rates = {nodes: rate_of(by_nodes[nodes]) for nodes in sorted(by_nodes)}
    fewest = min(rates)
    base, unit = rates[fewest]
    is_flat = unit in FLAT_RATES
    points = []
    for nodes, (rate, _) in rates.items():
        ratio = rate / base
        speedup = ratio if is_flat else ratio * fewest
        efficiency = ratio if is_flat else speedup / nodes
        points.append(Point(nodes, rate, speedup, efficiency, by_nodes[nodes]))
    labels = [
        format_row_name(value) if name == "row" else f"{name} {value}" for name, value in identity
    ]
    return Curve(benchmark, ", ".join(labels), unit, is_flat, tuple(points))


def format_row_name(row: str | int) -> str:
    """The name of a row; a number is a message's size in bytes."""
    if isinstance(row, str):
        return row
    size = float(row)
    units = ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.4g} {units[0]}"


def _format_nodes(nodes: int) -> str:
    return f"{nodes} node{'s' if nodes > 1 else ''}"


@dataclass(frozen=True)
class ChartScale:
    """Maps nodes and speed-up to positions in the SVG."""

    max_nodes: int
    max_speedup: float
    width: int = 300
    height: int = 190
    left: int = 34
    right: int = 10
    top: int = 24
    bottom: int = 26

    def x(self, nodes: float) -> float:
        """Position from the left."""
        return self.left + (self.width - self.left - self.right) * nodes / self.max_nodes

    def y(self, speedup: float) -> float:
        """Position from the top."""
        drawn_height = self.height - self.bottom - self.top
        return self.height - self.bottom - drawn_height * speedup / self.max_speedup

    def polyline(self, points: Iterable[tuple[float, float]], style: str) -> str:
        """A line through (nodes, speed-up) points."""
        positions = " ".join(f"{self.x(n):.1f},{self.y(s):.1f}" for n, s in points)
        return f'<polyline points="{positions}" fill="none" {style}/>'


def draw_chart(curve: Curve) -> str:
    """Speed-up over nodes, and dashed what would be linear (or flat), as SVG."""
    nodes = [point.nodes for point in curve.points]
    speedups = [point.speedup for point in curve.points]
    ideal_max = 1.0 if curve.flat else float(max(nodes))
    scale = ChartScale(max(nodes), max(ideal_max, *speedups) * 1.05)
    parts = [
        # Axis, ideal, measured.
        scale.polyline([(0, 0), (max(nodes), 0)], 'stroke="var(--line)"'),
        scale.polyline(
            [(0, ideal_max if curve.flat else 0), (max(nodes), ideal_max)],
            'stroke="var(--soft)" stroke-dasharray="4 4"',
        ),
        scale.polyline(zip(nodes, speedups), 'stroke="var(--accent)" stroke-width="2"'),
    ]
    baseline = scale.height - 10
    for count, speedup in zip(nodes, speedups):
        x, y = f"{scale.x(count):.1f}", f"{scale.y(speedup):.1f}"
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="var(--accent)"/>')
        parts.append(f'<text x="{x}" y="{baseline}" text-anchor="middle">{count}</text>')
    for value in [1] if curve.flat else sorted(set(nodes)):
        x, y = scale.left - 6, scale.y(value) + 4
        parts.append(f'<text x="{x}" y="{y:g}" text-anchor="end">{value:g}</text>')
    title = "rate over that of the fewest" if curve.flat else "speed-up"
    parts.append(f'<text x="0" y="12">{title}</text><text x="0" y="{baseline}">nodes</text>')
    box = f'viewBox="0 0 {scale.width} {scale.height}"'
    return f'<svg {box} role="img" aria-label="speed-up by nodes">{"".join(parts)}</svg>'


def slowest_rank_text(row: Row) -> str:
    """`4 nodes: rank 3 on n7, 12% behind the median`; '' if the row does not name one."""
    if row.get("worst_rank") is None:
        return ""
    host = f" on {row['worst_host']}" if row.get("worst_host") else ""
    behind = f"{row.get('worst_behind', 0):.0%} behind the median"
    return f"{_format_nodes(row['nodes'])}: rank {row['worst_rank']}{host}, {behind}"


def lost(curve: Curve) -> str:
    """Efficiency lost between the smallest and the largest number of nodes, by section.

    Compares node-seconds per image, as points of the whole; '' if there is nothing to compare.
    """
    first, last = curve.points[0], curve.points[-1]
    has_sections = first.row.get("sections") and last.row.get("sections")
    if curve.flat or last is first or not has_sections:
        return ""
    text = (
        f"{last.nodes} nodes give {last.speedup / first.nodes:.2f} times the images per second of "
        f"{first.nodes}: {last.efficiency:.0%} of linear."
    )
    before, after = (
        {name: share * point.nodes / point.rate for name, share in point.row["sections"].items()}
        for point in (first, last)
    )
    points = {
        name: (after.get(name, 0.0) - before.get(name, 0.0)) * last.rate / last.nodes
        for name in before | after
    }
    largest_first = sorted(points.items(), key=lambda item: -item[1])
    names = [
        f"{SECTION_NAMES.get(name, name.replace('_', ' '))} {100 * value:.0f}"
        for name, value in largest_first
        if value >= SHOWN_SHARE
    ]
    return f"{text} Percentage points lost, by section: {', '.join(names)}." if names else text


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_table_row(header, "th"), *(_table_row(row, "td") for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _rate_table(curve: Curve) -> str:
    """Rate, speed-up and efficiency by nodes, and the optional columns that have a value."""
    columns = {
        title: field
        for title, field in OPTIONAL_COLUMNS.items()
        if any(point.row.get(field) for point in curve.points)
    }
    unit = "seconds"
    if curve.unit != RUNS_PER_S:
        unit = curve.unit.replace("_", " ").replace("bytes", "MB")
    rows = []
    for point in curve.points:
        cells = [
            str(point.nodes),
            _format_rate(point.rate, curve.unit),
            "-" if curve.flat else f"{point.speedup:.2f}",
            f"{point.efficiency:.0%}",
        ]
        cells += [_format_optional(point.row.get(field), field) for field in columns.values()]
        rows.append(cells)
    return _table(["nodes", unit, "speed-up", "efficiency", *columns], rows)


def _format_rate(rate: float, unit: str) -> str:
    if unit == RUNS_PER_S:
        rate = 1 / rate
    elif unit == "bytes_per_s":
        rate /= 1e6
    return f"{rate:,.4g}" if rate < 1000 else f"{rate:,.0f}"


def _format_optional(value: float | None, field: str) -> str:
    if value is None:
        return "-"
    return f"{value:,} MiB" if field.endswith("mib") else f"{value:.1f} s"


def _section_table(curve: Curve) -> str:
    """Share of each section by nodes; those below SHOWN_SHARE on all are summed as `rest`."""
    sections = {p.nodes: p.row["sections"] for p in curve.points if p.row.get("sections")}
    if not sections:
        return ""
    largest = {name: max(s.get(name, 0) for s in sections.values()) for name in SECTION_ORDER}
    names = [name for name in SECTION_ORDER if largest[name] >= SHOWN_SHARE]
    rows = []
    for nodes, shares in sections.items():
        rest = sum(share for name, share in shares.items() if name not in names)
        values = [*(shares.get(name, 0) for name in names), rest]
        rows.append([str(nodes), *(f"{value:.1%}" for value in values)])
    titles = ["all-reduce" if name == "all_reduce" else name.replace("_", " ") for name in names]
    return f'<div class="wide">{_table(["nodes", *titles, "rest"], rows)}</div>'


def _sentences(curve: Curve) -> str:
    slow = "; ".join(filter(None, (slowest_rank_text(point.row) for point in curve.points)))
    texts = [lost(curve)]
    if slow:
        texts.append(f"The rank whose own work takes longest: {slow}.")
    for point in curve.points:
        if point.row.get("bottleneck"):
            texts.append(f"{_format_nodes(point.nodes)}: {point.row['bottleneck']}")
    return "".join(f'<p class="wide">{html.escape(text)}</p>' for text in texts if text)


def _card(curve: Curve) -> str:
    table = f'<div class="wide">{_rate_table(curve)}</div>'
    if len(curve.points) > 1:
        table = f"<div>{draw_chart(curve)}</div><div>{_rate_table(curve)}</div>"
    return (
        f'<div class="soft">{html.escape(curve.label)}</div>'
        f'<div class="card">{table}{_section_table(curve)}{_sentences(curve)}</div>'
    )


def page(
    rows: Sequence[Row], absent: Mapping[str, Sequence[str]] | None = None, command: str = ""
) -> str:
    """The HTML page. Raises ValueError if no row has a rate or seconds.

    absent: by number of nodes, why figures are missing. command: what was measured.
    """
    absent = absent or {}
    drawn = curves(rows)
    if not drawn:
        reasons = [f"{nodes} nodes: {', '.join(texts)}" for nodes, texts in absent.items()]
        raise ValueError(
            "no rows to draw: expected lines of JSON with benchmark, nodes and a rate "
            f"(images_per_s, ...) or wall_s. {'; '.join(reasons) or 'Run the benchmarks first'}"
        )
    body = []
    for nodes, reasons in absent.items():
        text = html.escape("; ".join(reasons))
        body.append(f'<p class="soft">Not measured on {nodes} nodes: {text}</p>')
    benchmark = ""
    for curve in drawn:
        if curve.benchmark != benchmark:
            benchmark = curve.benchmark
            body.append(f"<h2>{html.escape(benchmark)}</h2>")
        body.append(_card(curve))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Scaling</title><style>{STYLE}</style></head><body><h1>Scaling</h1>"
        f'<p class="soft">{html.escape(command)}Dashed: linear in the number of nodes (or, for '
        "rates per core or link, unchanged). Sections are shares of a step; waiting is for slower "
        f"ranks. {html.escape(_environment(rows))}</p>{''.join(body)}</body></html>"
    )


def _environment(rows: Sequence[Row]) -> str:
    """Machines, devices, commits and dates of the rows."""

    def values(name: str) -> list[str]:
        return sorted({str(row[name]) for row in rows if row.get(name)})

    texts = [
        f"{name}: {', '.join(values(name))}"
        for name in ("machine", "device", "commit")
        if values(name)
    ]
    if dates := values("date"):
        texts.append(f"{dates[0]} to {dates[-1]}")
    return "; ".join(texts)


def _command(description: Mapping[str, Any]) -> str:
    """The command line that benchmark.json describes."""
    if not description:
        return ""
    words = ["launch/slurm.py", "--nodes", ",".join(map(str, description["nodes"]))]
    words += ["--benchmark", ",".join(description["benchmarks"])]
    words += ["--steps", str(description["steps"])]
    if description["weak"]:
        words.append("--weak")
    return " ".join([*words, description["config"], *description["overrides"]]) + ". "


def draw(folder: Path, out: Path | None = None) -> int:
    """Write the page of a folder, and the same figures as JSON; returns the number of rows."""
    out = out or folder / "scaling.html"
    rows = collect(folder)
    absent = missing(folder)
    description = read_description(folder)
    write_text(out, page(rows, absent, _command(description)))
    figures = {
        "asked": description,
        "missing": absent,
        "curves": [asdict(curve) | {"lost": lost(curve)} for curve in curves(rows)],
    }
    write_json(out.with_suffix(".json"), figures)
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m benchmarks.scaling FOLDER [OUT.html]")
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source / "scaling.html"
    try:
        print(f"{draw(source, target)} rows -> {target}")
    except ValueError as error:
        sys.exit(f"error: {error}")
