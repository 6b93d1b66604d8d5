"""The same work on 1, 2, 4, ... nodes -> one page and one JSON: `python -m benchmarks.scaling FOLDER [OUT.html]`.

FOLDER holds printed rows (rows/*.jsonl, or *.jsonl at any depth) and, from `launch/slurm.py --benchmark`, run folders nodes-N (benchmarks/runs.py).
Speed-up is the rate over the rate on the fewest nodes measured, times that number; efficiency is speed-up over nodes. What is a
rate per core or per link should stay the same instead (`flat`), and its efficiency is the rate over that on the fewest
nodes. No network, no other files: the page stands on its own. scaling.html and .json are written into FOLDER when OUT is left out.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import problems, stage_rows
from dist_scan.storage.atomic import write_json, write_text

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
FIRST = ("trainings",)  # what a user looks for
FLAT = ("bytes_per_s", "pairs_per_cpu_s", "views_per_cpu_s", "img_per_cpu_s")
IDENTITY = (
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
STYLE = """:root{--page:#f7f6f3;--card:#fff;--ink:#22262a;--soft:#6a7076;--line:#e4e2dc;--accent:#2b7a7e}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e4e6e8;--soft:#99a1a8;--line:#2d3338;--accent:#5fb9b6}}
body{margin:0 auto;max-width:1040px;padding:36px 24px;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
.soft{color:var(--soft);font-size:13.5px}.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:14px 0;
display:grid;grid-template-columns:300px minmax(0,1fr);gap:12px 26px}.card>*{min-width:0;overflow-x:auto}
@media(max-width:700px){.card{grid-template-columns:minmax(0,1fr)}}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th{font-weight:500;font-size:12.5px;color:var(--soft)}
th,td{text-align:right;padding:6px 8px;border-top:1px solid var(--line);white-space:nowrap}th{border:0}td:first-child,th:first-child{text-align:left}
.wide{grid-column:1/-1}p{margin:4px 0 0}
h1{font-size:30px;margin:0 0 4px}h2{font-size:19px;margin:34px 0 2px}svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}"""


@dataclass(frozen=True)
class Point:
    """One benchmark row on one number of nodes."""

    nodes: int
    rate: float
    speedup: float
    efficiency: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One row of one benchmark over numbers of nodes, ascending; `flat`: the rate should stay the same, not grow."""

    benchmark: str
    label: str
    unit: str
    flat: bool
    points: tuple[Point, ...]


def collect(folder: Path) -> list[dict[str, Any]]:
    """All rows in *.jsonl below a folder, logs aside, and those of its run folders; what is no row (a torn line, another
    program's words) is left out."""
    found = [row for run_dir in _run_dirs(folder) for row in stage_rows(run_dir)]
    for path in sorted(Path(folder).rglob("*.jsonl")):
        if "logs" in path.parts[len(Path(folder).parts) :]:
            continue
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"benchmark", "nodes"} <= row.keys():
                found.append(row)
    return found


def _run_dirs(folder: Path) -> list[Path]:
    return sorted(
        (
            p
            for p in Path(folder).glob("nodes-*")
            if p.is_dir() and p.name.removeprefix("nodes-").isdigit()
        ),
        key=lambda p: int(p.name.removeprefix("nodes-")),
    )


def missing(folder: Path) -> dict[str, list[str]]:
    """Number of nodes -> why figures that were asked for (benchmark.json) are not there."""
    try:
        asked = json.loads((Path(folder) / "benchmark.json").read_text())["nodes"]
    except OSError:
        return {}
    found = {str(nodes): problems(Path(folder) / f"nodes-{nodes}") for nodes in asked}
    return {nodes: why for nodes, why in found.items() if why}


def rate_of(row: Mapping[str, Any]) -> tuple[float, str] | None:
    """(how much a second, its unit); rows that only give seconds count as runs a second. None: neither is there."""
    for name in RATES:
        if row.get(name):
            return float(row[name]), name
    seconds = row.get("wall_s") or row.get("seconds")
    return (1 / float(seconds), "runs_per_s") if seconds else None


def curves(rows: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Rows that differ only in the number of nodes, as curves: by benchmark, then in the order in which they were measured. Of two equal ones
    the later date counts."""
    groups: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: str(r.get("date", ""))):
        if rate_of(row) is not None:
            key = (row["benchmark"], tuple((k, row[k]) for k in IDENTITY if k in row))
            groups.setdefault(key, {})[int(row["nodes"])] = row
    return [
        _curve(key[0], key[1], by_nodes)
        for key, by_nodes in sorted(groups.items(), key=lambda g: (g[0][0] not in FIRST, g[0][0]))
    ]


def _curve(benchmark: str, identity: tuple, by_nodes: Mapping[int, Mapping[str, Any]]) -> Curve:
    fewest = min(by_nodes)
    base, unit = rate_of(by_nodes[fewest])
    points = []
    for nodes, row in sorted(by_nodes.items()):
        rate = rate_of(row)[0]
        speedup = rate / base * (1 if unit in FLAT else fewest)
        points.append(
            Point(nodes, rate, speedup, speedup if unit in FLAT else speedup / nodes, row)
        )
    return Curve(
        benchmark,
        ", ".join(size(v) if k == "row" else f"{k} {v}" for k, v in identity),
        unit,
        unit in FLAT,
        tuple(points),
    )


def size(row: str | int) -> str:
    """A row's name; a number is a message's size in bytes."""
    if isinstance(row, str):
        return row
    power = min(max(row.bit_length() - 1, 0) // 10, 3)
    return f"{row / 2 ** (10 * power):.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def chart(curve: Curve) -> str:
    """Speed-up over nodes against the dashed line of what would be linear (or flat), as SVG."""
    width, height, left, top, bottom = 300, 190, 34, 24, 26
    most_x = max(p.nodes for p in curve.points)
    most_y = max(1.0 if curve.flat else float(most_x), *(p.speedup for p in curve.points)) * 1.05

    def at(x: float, y: float) -> str:
        return f"{left + (width - left - 10) * x / most_x:.1f},{height - bottom - (height - bottom - top) * y / most_y:.1f}"

    ideal = [(0, 1), (most_x, 1)] if curve.flat else [(0, 0), (most_x, most_x)]
    marks = "".join(
        '<circle cx="{}" cy="{}" r="3.5" fill="var(--accent)"/>'.format(
            *at(p.nodes, p.speedup).split(",")
        )
        for p in curve.points
    )
    ticks = "".join(
        '<text x="{}" y="{}" text-anchor="middle">{}</text>'.format(
            at(p.nodes, 0).split(",")[0], height - 10, p.nodes
        )
        for p in curve.points
    )
    side = "".join(
        '<text x="{}" y="{}" text-anchor="end">{:g}</text>'.format(
            left - 6, float(at(0, y).split(",")[1]) + 4, y
        )
        for y in ([1] if curve.flat else sorted({p.nodes for p in curve.points}))
    )
    titles = f'<text x="0" y="12">{"rate over that of the fewest" if curve.flat else "speed-up"}</text><text x="0" y="{height - 10}">nodes</text>'
    line = " ".join(at(p.nodes, p.speedup) for p in curve.points)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="speed-up by nodes"><polyline points="{at(0, 0)} {at(most_x, 0)}" '
        f'fill="none" stroke="var(--line)"/><polyline points="{" ".join(at(*p) for p in ideal)}" fill="none" stroke="var(--soft)" '
        f'stroke-dasharray="4 4"/><polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>{marks}{ticks}{side}{titles}</svg>'
    )


def worst(row: Mapping[str, Any]) -> str:
    """'4 nodes: rank 3 on n7, 12% behind the median' when the row says so."""
    if row.get("worst_rank") is None:
        return ""
    where = f" on {row['worst_host']}" if row.get("worst_host") else ""
    return f"{row['nodes']} node{'s' * (row['nodes'] > 1)}: rank {row['worst_rank']}{where}, {row.get('worst_behind', 0):.0%} behind the median"


def lost(curve: Curve) -> str:
    """Where the efficiency between the fewest and the most nodes went: node-seconds per image by section, as points of the whole."""
    first, last = curve.points[0], curve.points[-1]
    if curve.flat or last is first or not (first.row.get("sections") and last.row.get("sections")):
        return ""
    text = f"{last.nodes} nodes give {last.speedup / first.nodes:.2f} times the images per second of {first.nodes}: {last.efficiency:.0%} of linear."
    cost = [
        {name: share * p.nodes / p.rate for name, share in p.row["sections"].items()}
        for p in (first, last)
    ]
    grown = {
        name: (cost[1].get(name, 0.0) - cost[0].get(name, 0.0)) * last.rate / last.nodes
        for name in cost[0] | cost[1]
    }
    named = [
        f"{SPOKEN.get(name, name.replace('_', ' '))} {100 * points:.0f}"
        for name, points in sorted(grown.items(), key=lambda g: -g[1])
        if points >= 0.005
    ]
    return text + (f" Where the missing points are: {', '.join(named)}." if named else "")


SPOKEN = {
    "waiting": "waiting for slower ranks",
    "all_reduce": "all-reduce on every rank",
    "end_step": "the method's end_step",
}


def _rates(curve: Curve) -> str:
    seconds = curve.unit == "runs_per_s"
    extra = {
        "host memory": "peak_host_mib",
        "GPU memory": "peak_gpu_mib",
        "planned": "planned_mib",
        "first step": "first_step_s",
    }
    shown = {head: key for head, key in extra.items() if any(p.row.get(key) for p in curve.points)}
    lines = []
    for p in curve.points:
        rate = 1 / p.rate if seconds else p.rate / 1e6 if curve.unit == "bytes_per_s" else p.rate
        cells = [
            str(p.nodes),
            f"{rate:,.4g}" if rate < 1000 else f"{rate:,.0f}",
            "-" if curve.flat else f"{p.speedup:.2f}",
            f"{p.efficiency:.0%}",
        ]
        cells += [
            "-"
            if p.row.get(key) is None
            else f"{p.row[key]:,} MiB"
            if key.endswith("mib")
            else f"{p.row[key]:.1f} s"
            for key in shown.values()
        ]
        lines.append(cells)
    heads = [
        "nodes",
        "seconds" if seconds else curve.unit.replace("_", " ").replace("bytes", "MB"),
        "speed-up",
        "efficiency",
        *shown,
    ]
    return (
        "<table>" + _line(heads, "th") + "".join(_line(cells, "td") for cells in lines) + "</table>"
    )


def _sections(curve: Curve) -> str:
    """Share of each section by nodes; those that never reach half a percent are summed."""
    timed = [p for p in curve.points if p.row.get("sections")]
    if not timed:
        return ""
    names = [name for name in ORDER if any(p.row["sections"].get(name, 0) >= 0.005 for p in timed)]
    rows = [
        [
            str(p.nodes),
            *(f"{p.row['sections'].get(name, 0):.1%}" for name in names),
            f"{sum(share for name, share in p.row['sections'].items() if name not in names):.1%}",
        ]
        for p in timed
    ]
    heads = [
        "nodes",
        *(name.replace("_", "-" if name == "all_reduce" else " ") for name in names),
        "rest",
    ]
    return (
        '<div class="wide"><table>'
        + _line(heads, "th")
        + "".join(_line(cells, "td") for cells in rows)
        + "</table></div>"
    )


ORDER = (
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


def _words(curve: Curve) -> str:
    slow = "; ".join(filter(None, (worst(p.row) for p in curve.points)))
    said = [
        lost(curve),
        f"The rank whose own work takes longest: {slow}." if slow else "",
        *(
            f"{p.nodes} node{'s' * (p.nodes > 1)}: {p.row['verdict']}"
            for p in curve.points
            if p.row.get("verdict")
        ),
    ]
    return "".join(f'<p class="wide">{html.escape(text)}</p>' for text in said if text)


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"


def page(
    rows: Sequence[Mapping[str, Any]],
    title: str = "Scaling",
    absent: Mapping[str, Sequence[str]] = {},
    asked: str = "",
) -> str:
    """The report page. `absent`: nodes -> why they are not on it; `asked`: what was measured, in words. Raises ValueError when no
    row gives a rate or seconds."""
    drawn = curves(rows)
    if not drawn:
        why = "; ".join(f"{nodes} nodes: {', '.join(reasons)}" for nodes, reasons in absent.items())
        raise ValueError(
            "no rows to draw: expected lines of JSON with benchmark, nodes and a rate (images_per_s, ...) or wall_s"
            + (f". {why}" if why else "; run the benchmarks first")
        )
    facts = {
        name: sorted({str(row[name]) for row in rows if row.get(name)})
        for name in ("machine", "device", "commit", "date")
    }
    dates = facts.pop("date")
    about = "; ".join(
        f"{name}: {', '.join(values)}" for name, values in facts.items() if values
    ) + (f"; {dates[0]} to {dates[-1]}" if dates else "")
    body = [
        f'<p class="soft">Not measured on {nodes} nodes: {html.escape("; ".join(reasons))}</p>'
        for nodes, reasons in absent.items()
    ]
    for i, curve in enumerate(drawn):
        if i == 0 or drawn[i - 1].benchmark != curve.benchmark:
            body.append(f"<h2>{html.escape(curve.benchmark)}</h2>")
        drawing = (
            f"<div>{chart(curve)}</div><div>" if len(curve.points) > 1 else '<div class="wide">'
        )
        body.append(
            f'<div class="soft">{html.escape(curve.label)}</div><div class="card">{drawing}{_rates(curve)}</div>'
            f"{_sections(curve)}{_words(curve)}</div>"
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="soft">{html.escape(asked)}Dashed: linear in the number of nodes (or, for rates per core or link, unchanged). Sections are shares '
        f"of a step; waiting is for slower ranks. {html.escape(about)}</p>{''.join(body)}</body></html>"
    )


def draw(folder: Path, out: Path | None = None) -> int:
    """Write the page of a folder's rows, and the same figures as JSON beside it; returns how many rows there were."""
    out = Path(out or Path(folder) / "scaling.html")
    rows, absent = collect(folder), missing(folder)
    try:
        asked = json.loads((Path(folder) / "benchmark.json").read_text())
    except OSError:
        asked = {}
    said = (
        " ".join(
            [
                "launch/slurm.py --nodes",
                ",".join(map(str, asked["nodes"])),
                "--benchmark",
                ",".join(asked["benchmarks"]),
                "--steps",
                str(asked["steps"]),
                *(["--weak"] if asked["weak"] else []),
                asked["config"],
                *asked["overrides"],
            ]
        )
        + ". "
        if asked
        else ""
    )
    write_text(out, page(rows, absent=absent, asked=said))
    write_json(
        out.with_suffix(".json"),
        {
            "asked": asked,
            "missing": absent,
            "curves": [asdict(c) | {"lost": lost(c)} for c in curves(rows)],
        },
    )
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m benchmarks.scaling FOLDER [OUT.html]")
    try:
        print(
            f"{draw(*map(Path, sys.argv[1:]))} rows -> {sys.argv[2] if len(sys.argv) == 3 else Path(sys.argv[1]) / 'scaling.html'}"
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
