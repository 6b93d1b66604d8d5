"""Rows of the same benchmarks on 1, 2, 4, ... nodes -> one page: `python -m benchmarks.scaling FOLDER OUT.html`.

FOLDER holds the printed rows (*.jsonl, at any depth). Speed-up is the rate over the rate on the fewest nodes measured, times that number;
efficiency is speed-up over nodes. What is a rate per core or per link should stay the same instead (`flat`), and its
efficiency is the rate over that on the fewest nodes. No network, no other files: the page stands on its own.
"""
from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RATES = ("images_per_s", "bytes_per_s", "rows_per_s", "views_per_s", "pairs_per_cpu_s", "views_per_cpu_s", "img_per_cpu_s", "mib_per_s")
FLAT = ("bytes_per_s", "pairs_per_cpu_s", "views_per_cpu_s", "img_per_cpu_s")
IDENTITY = ("row", "model", "size", "rows", "dim", "k", "clusters", "images", "stored", "recipe", "views")
STYLE = """:root{--page:#f7f6f3;--card:#fff;--ink:#22262a;--soft:#6a7076;--line:#e4e2dc;--accent:#2b7a7e}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e4e6e8;--soft:#99a1a8;--line:#2d3338;--accent:#5fb9b6}}
body{margin:0 auto;max-width:1040px;padding:36px 24px;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
.soft{color:var(--soft);font-size:13.5px}.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:14px 0;
display:grid;grid-template-columns:300px 1fr;gap:26px;overflow-x:auto}@media(max-width:700px){.card{grid-template-columns:1fr}}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th{font-weight:500;font-size:12.5px;color:var(--soft)}
th,td{text-align:right;padding:6px 10px;border-top:1px solid var(--line);white-space:nowrap}th{border:0}td:first-child,th:first-child{text-align:left}
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
    """All rows in *.jsonl below a folder; what is no row (a torn line, another program's words) is left out."""
    found = []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"benchmark", "nodes"} <= row.keys():
                found.append(row)
    return found


def rate_of(row: Mapping[str, Any]) -> tuple[float, str] | None:
    """(how much a second, its unit); rows that only give seconds count as runs a second. None: neither is there."""
    for name in RATES:
        if row.get(name):
            return float(row[name]), name
    seconds = row.get("wall_s") or row.get("seconds")
    return (1 / float(seconds), "runs_per_s") if seconds else None


def curves(rows: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Rows that differ only in the number of nodes, as curves. Of two equal ones the later date counts."""
    groups: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: str(r.get("date", ""))):
        if rate_of(row) is not None:
            key = (row["benchmark"], tuple((k, row[k]) for k in IDENTITY if k in row))
            groups.setdefault(key, {})[int(row["nodes"])] = row
    return [_curve(key[0], key[1], by_nodes) for key, by_nodes in sorted(groups.items(), key=lambda g: str(g[0]))]


def _curve(benchmark: str, identity: tuple, by_nodes: Mapping[int, Mapping[str, Any]]) -> Curve:
    fewest = min(by_nodes)
    base, unit = rate_of(by_nodes[fewest])
    points = []
    for nodes, row in sorted(by_nodes.items()):
        rate = rate_of(row)[0]
        speedup = rate / base * (1 if unit in FLAT else fewest)
        points.append(Point(nodes, rate, speedup, speedup if unit in FLAT else speedup / nodes, row))
    return Curve(benchmark, ", ".join(str(v) if k == "row" else f"{k} {v}" for k, v in identity), unit, unit in FLAT, tuple(points))


def chart(curve: Curve) -> str:
    """Speed-up over nodes against the dashed line of what would be linear (or flat), as SVG."""
    width, height, left, bottom = 300, 190, 34, 26
    most_x = max(p.nodes for p in curve.points)
    most_y = max(1.0 if curve.flat else float(most_x), *(p.speedup for p in curve.points)) * 1.05

    def at(x: float, y: float) -> str:
        return f"{left + (width - left - 10) * x / most_x:.1f},{height - bottom - (height - bottom - 10) * y / most_y:.1f}"

    ideal = [(0, 1), (most_x, 1)] if curve.flat else [(0, 0), (most_x, most_x)]
    marks = "".join('<circle cx="{}" cy="{}" r="3.5" fill="var(--accent)"/>'.format(*at(p.nodes, p.speedup).split(",")) for p in curve.points)
    ticks = "".join('<text x="{}" y="{}" text-anchor="middle">{}</text>'.format(at(p.nodes, 0).split(",")[0], height - 10, p.nodes) for p in curve.points)
    side = "".join('<text x="{}" y="{}" text-anchor="end">{:g}</text>'.format(left - 6, float(at(0, y).split(",")[1]) + 4, y)
                   for y in ([1] if curve.flat else sorted({p.nodes for p in curve.points})))
    line = " ".join(at(p.nodes, p.speedup) for p in curve.points)
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="speed-up by nodes"><polyline points="{at(0, 0)} {at(most_x, 0)}" '
            f'fill="none" stroke="var(--line)"/><polyline points="{" ".join(at(*p) for p in ideal)}" fill="none" stroke="var(--soft)" '
            f'stroke-dasharray="4 4"/><polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>{marks}{ticks}{side}</svg>')


def worst(row: Mapping[str, Any]) -> str:
    """'rank 3 on n7, 12 % behind' when the row says so."""
    if row.get("worst_rank") is None:
        return "-"
    where = f" on {row['worst_host']}" if row.get("worst_host") else ""
    return f"rank {row['worst_rank']}{where}, {100 * row.get('worst_behind', 0):.0f} % behind"


def _table(curve: Curve) -> str:
    groups = {"data": ("data_wait", "copy", "augmentation"), "forward": ("forward",), "backward": ("backward",), "communication": ("all_reduce",)}
    timed = any(p.row.get("sections") for p in curve.points)
    heads = ["nodes", curve.unit.replace("_", " "), "speed-up", "efficiency", *(groups if timed else ()), *(["worst rank"] if timed else ())]
    lines = []
    for p in curve.points:
        cells = [str(p.nodes), f"{p.rate:,.4g}" if p.rate < 1000 else f"{p.rate:,.0f}", "-" if curve.flat else f"{p.speedup:.2f}", f"{p.efficiency:.0%}"]
        shares = p.row.get("sections") or {}
        if timed:
            cells += [f"{sum(shares.get(name, 0) for name in names):.0%}" for names in groups.values()] + [worst(p.row)]
        lines.append(cells)
    return "<table>" + _line(heads, "th") + "".join(_line(cells, "td") for cells in lines) + "</table>"


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"


def page(rows: Sequence[Mapping[str, Any]], title: str = "Scaling") -> str:
    """The report page. Raises ValueError when no row gives a rate or seconds."""
    drawn = curves(rows)
    if not drawn:
        raise ValueError("no rows to draw: expected lines of JSON with benchmark, nodes and a rate (images_per_s, ...) or wall_s; run the benchmarks first")
    facts = {name: sorted({str(row[name]) for row in rows if row.get(name)}) for name in ("machine", "device", "commit", "date")}
    dates = facts.pop("date")
    about = "; ".join(f"{name}: {', '.join(values)}" for name, values in facts.items() if values) + (f"; {dates[0]} to {dates[-1]}" if dates else "")
    body = []
    for i, curve in enumerate(drawn):
        if i == 0 or drawn[i - 1].benchmark != curve.benchmark:
            body.append(f"<h2>{html.escape(curve.benchmark)}</h2>")
        body.append(f'<div class="soft">{html.escape(curve.label)}</div><div class="card"><div>{chart(curve)}</div><div>{_table(curve)}</div></div>')
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
            f'<p class="soft">Dashed: linear in the number of nodes (or, for rates per core or link, unchanged). {html.escape(about)}</p>{"".join(body)}</body></html>')


def draw(folder: Path, out: Path) -> int:
    """Write the page of a folder's rows; returns how many rows there were."""
    rows = collect(folder)
    Path(out).write_text(page(rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.scaling FOLDER OUT.html")
    try:
        print(f"{draw(Path(sys.argv[1]), Path(sys.argv[2]))} rows -> {sys.argv[2]}")
    except ValueError as error:
        sys.exit(f"error: {error}")
