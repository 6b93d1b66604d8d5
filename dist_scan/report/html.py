"""The report: one HTML file with its pictures inside it, and the table at the end of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dist_scan.monitoring.progress import format_duration
from dist_scan.report import figures

NAMES = {
    "kmeans_pixels": "k-means on pixels",
    "kmeans_features": "k-means on features",
    "scan": "SCAN heads",
    "consensus": "SCAN consensus",
    "selflabel": "Self-labelled",
}
SCORES = {
    "acc": "ACC",
    "top5": "Top-5",
    "nmi": "NMI",
    "ari": "ARI",
    "ami": "AMI",
    "purity": "Purity",
    "many_to_one": "Many-to-one",
}
MAX_CLUSTERS, MAX_ANCHORS, MAX_CURVES, IMAGE_BYTES = 100, 24, 9, 14_000_000
"""What one page holds; the page says what was left out. With 1000 clusters of 96 px pictures it stays under 20 MB."""


@dataclass(frozen=True)
class Cluster:
    """One cluster to look at. Images are uint8 [H, W, 3]; `prototypes` has the prototype first."""

    id: int
    size: int
    prototypes: Sequence[np.ndarray] = ()
    low_confidence: Sequence[np.ndarray] = ()
    label: str | None = None
    """Its majority label, when labels are known."""
    label_share: float | None = None
    confidence: float | None = None
    """Mean probability of its images."""


@dataclass(frozen=True)
class Anchor:
    """One image with its nearest others, nearest first, and their similarities."""

    image: np.ndarray
    neighbours: Sequence[np.ndarray]
    scores: Sequence[float] = ()
    label: str | None = None
    neighbour_labels: Sequence[str | None] = ()


@dataclass(frozen=True)
class Report:
    """All a page shows, as plain values. What is empty or None leaves its section out."""

    title: str
    created: str
    summary: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Subject -> scores (acc, top5, nmi, nmi_variant, ari, ami, purity, many_to_one; None without labels), seconds,
    num_clusters, used_share, largest_share."""
    stages: Sequence[Mapping[str, Any]] = ()
    """name, kind, state, seconds, fingerprint; peak_host_bytes and peak_gpu_bytes where known."""
    timings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage of a training -> its timing.json: verdict, sections, profiled (then the verdict stands at the top)."""
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Stage -> rows of its metrics.jsonl."""
    cluster_sizes: Mapping[str, np.ndarray] = field(default_factory=dict)
    confusion: np.ndarray | None = None
    """Counts [num_classes, num_columns], label by matched class (`metrics.confusion`); rows are normalised here."""
    label_names: Sequence[str] = ()
    heads: Sequence[Mapping[str, Any]] = ()
    clusters: Sequence[Cluster] = ()
    num_clusters: int | None = None
    """How many there are, when `clusters` holds a part of them."""
    neighbours: Sequence[Anchor] = ()
    neighbour_purity: Mapping[str, float] | None = None
    """K -> share of the K nearest with the anchor's label."""
    warnings: Sequence[str] = ()
    """Collapse and the like, with the remedy."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """About the data: images, bad images, labelled, ..."""
    config_yaml: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    best: str | None = None
    """The subject whose scores the page's head shows; the last one when left out."""


def write_report(report: Report, out_path: Path | str) -> None:
    """Write the page (elsewhere first, then renamed): no network, no other files, readable in light and dark."""
    page = _template().render(**_context(report))
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    part = out_path.with_name(out_path.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        f.write(page)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, out_path)


def summary_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The plain-text table at the end of a run: subject -> scores and seconds. A score that is not known is a dash."""
    heads = ["", "ACC", "NMI", "ARI", "seconds"]
    lines = [
        [
            subject_name(name),
            *(score(row.get(key)) for key in ("acc", "nmi", "ari")),
            "-" if row.get("seconds") is None else f"{row['seconds']:.1f}",
        ]
        for name, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        )
        for line in [heads, *lines]
    ]
    return "\n".join([text[0].rstrip(), "  ".join("-" * w for w in widths), *text[1:]])


def subject_name(name: str) -> str:
    """`kmeans_pixels` -> 'k-means on pixels'; a name of one's own stays, without underscores."""
    return NAMES.get(name, name.replace("_", " "))


def score(value: Any) -> str:
    """0.97731 -> '0.977'; None or not a number -> '-'."""
    return (
        "-" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.3f}"
    )


def number(value: Any) -> str:
    """For people: 1281167 -> '1,281,167', 0.00031 -> '0.00031', 12.3456 -> '12.35', None -> '-'."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return (
            {True: "yes", False: "no"}.get(value, str(value))
            if isinstance(value, bool)
            else str(value)
        )
    return f"{int(value):,}" if isinstance(value, (int, np.integer)) else f"{float(value):.4g}"


def _template() -> jinja2.Template:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "bytes": lambda n: f"{n / 2**30:.2f} GiB" if n else "-",
        "score": score,
        "number": number,
        "subject": subject_name,
        "duration": format_duration,
        "percent": lambda x: f"{100 * x:.3g} %",
        "words": lambda s: str(s).replace("_", " "),
    }
    return env.get_template("report.html.j2")


class _Pictures:
    """Thumbnails until the page's bytes are used up; then None, and `left_out` counts."""

    def __init__(self, budget: int) -> None:
        self.left, self.left_out = budget, 0

    def __call__(self, image: np.ndarray) -> str | None:
        uri = figures.thumbnail(image) if self.left > 0 else None
        self.left -= len(uri or "")
        self.left_out += uri is None
        return uri


def _context(report: Report) -> dict[str, Any]:
    """What the template shows: values, SVG and data URIs."""
    pictures = _Pictures(IMAGE_BYTES)
    last_name = report.best if report.best in report.summary else next(reversed(report.summary), "")
    last = report.summary.get(last_name, {})
    anchors = [_anchor(a, pictures) for a in report.neighbours[:MAX_ANCHORS]]
    clusters = [_cluster(c, pictures) for c in report.clusters[:MAX_CLUSTERS]]
    clusters = [c for c in clusters if c["prototypes"] or c["low"]]
    return {
        "report": report,
        "tiles": _tiles(report, last),
        "last_name": last_name,
        "last": last,
        "anchors": anchors,
        "clusters": clusters,
        "all_clusters": report.num_clusters or len(report.clusters),
        "left_out": pictures.left_out,
        "columns": {
            key: name
            for key, name in SCORES.items()
            if any(row.get(key) is not None for row in report.summary.values())
        },
        "best": {
            key: max(
                (row[key] for row in report.summary.values() if row.get(key) is not None),
                default=None,
            )
            for key in SCORES
        },
        "curves": {
            stage: drawn for stage, rows in report.curves.items() if (drawn := _curves(stage, rows))
        },
        "sizes": [
            (name, figures.sizes(counts, name), counts)
            for name, counts in report.cluster_sizes.items()
            if len(counts)
        ],
        "confusion": None
        if report.confusion is None or not report.confusion.sum()
        else _confusion(report),
        "total_s": sum(s.get("seconds") or 0 for s in report.stages),
        "verdicts": [
            (name, t["verdict"])
            for name, t in report.timings.items()
            if t.get("profiled") and t.get("verdict")
        ],
        "gpu": any(s.get("peak_gpu_bytes") for s in report.stages),
        "head_columns": list(dict.fromkeys(key for head in report.heads for key in head)),
    }


def _tiles(report: Report, last: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers at the top: the last subject's scores, else what is known without labels."""
    tiles = [
        (SCORES[key], score(last[key]))
        for key in ("acc", "nmi", "ari")
        if last.get(key) is not None
    ]
    if "num_images" in report.facts:
        tiles.append(("images", number(report.facts["num_images"])))
    count = last.get("num_clusters") or report.num_clusters
    if count:
        used = last.get("used_share")
        tiles.append(
            (
                "clusters" if used is None or used == 1 else f"of {number(count)} clusters used",
                number(count if used is None else round(used * count)),
            )
        )
    seconds = sum(s.get("seconds") or 0 for s in report.stages)
    return tiles + ([("in all", format_duration(seconds))] if seconds else [])


def _cluster(cluster: Cluster, pictures: _Pictures) -> dict[str, Any]:
    return {
        "facts": cluster,
        "prototypes": [u for i in cluster.prototypes if (u := pictures(i))],
        "low": [u for i in cluster.low_confidence if (u := pictures(i))],
    }


def _anchor(anchor: Anchor, pictures: _Pictures) -> dict[str, Any]:
    """Neighbours with score and whether they carry the anchor's label (None when one of the two is unknown)."""
    others = []
    for i, image in enumerate(anchor.neighbours):
        label = anchor.neighbour_labels[i] if i < len(anchor.neighbour_labels) else None
        same = None if label is None or anchor.label is None else label == anchor.label
        others.append(
            {
                "uri": pictures(image),
                "score": anchor.scores[i] if i < len(anchor.scores) else None,
                "label": label,
                "same": same,
            }
        )
    return {
        "uri": pictures(anchor.image),
        "label": anchor.label,
        "others": [o for o in others if o["uri"]],
    }


def _curves(stage: str, rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """(metric, SVG), losses first, then the learning rate, then the rest; values that are no numbers leave a gap out."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if (
                key not in ("step", "epoch")
                and isinstance(value, (int, float))
                and math.isfinite(value)
            ):
                series.setdefault(key, []).append((row["step"], value))
    order = sorted(
        series,
        key=lambda key: (
            0
            if key == "loss"
            else 1
            if "loss" in key
            else 2
            if key in ("lr", "learning_rate")
            else 3
        ),
    )
    return [
        (key, figures.curve(*zip(*series[key]), f"{stage}-{key}")) for key in order[:MAX_CURVES]
    ]


def _confusion(report: Report) -> str:
    counts = report.confusion
    rows = (
        list(report.label_names)
        if len(report.label_names) == counts.shape[0]
        else [str(i) for i in range(counts.shape[0])]
    )
    if counts.shape[1] == counts.shape[0] + 1 and not counts[:, -1].any():
        counts = counts[:, :-1]
    extra = ["none"] * (counts.shape[1] - len(rows))
    return figures.confusion(counts, rows, [*rows[: counts.shape[1]], *extra])
