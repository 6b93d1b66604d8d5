"""The report of a run: one HTML file with its images inside, and the table printed at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_scan.monitoring.progress import format_duration
from dist_scan.report import figures
from dist_scan.report.page import (
    format_number,
    format_score,
    pad_columns,
    subject_name,
    write_page,
)

SCORES = {
    "acc": "ACC",
    "top5": "Top-5",
    "nmi": "NMI",
    "ari": "ARI",
    "ami": "AMI",
    "purity": "Purity",
    "many_to_one": "Many-to-one",
}
"""Columns of the summary, in order."""
MAX_CURVES = 9
MAX_IMAGE_BYTES = 14_000_000
"""Limits of a page; the page says how many items were left out. With 1000 clusters of 96-pixel
images it stays below 20 MB."""


@dataclass(frozen=True)
class Cluster:
    """A cluster to show. Images are uint8 [H, W, 3].

    ``prototypes``: the prototype, then the other most confident images.
    """

    id: int
    size: int
    prototypes: Sequence[np.ndarray] = ()
    low_confidence: Sequence[np.ndarray] = ()
    label: str | None = None
    """Majority label, if labels are known."""
    label_share: float | None = None
    """Share of the majority label."""
    confidence: float | None = None
    """Mean probability of the images."""


@dataclass(frozen=True)
class Anchor:
    """An image with its nearest neighbours, nearest first. A label is None if it is not known."""

    image: np.ndarray
    neighbours: Sequence[np.ndarray]
    scores: Sequence[float]
    """Similarity of each neighbour."""
    label: str | None
    neighbour_labels: Sequence[str | None]


@dataclass(frozen=True)
class Report:
    """Contents of a page. A section whose value is empty or None is left out."""

    title: str
    summary: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By subject: scores (acc, top5, nmi, nmi_variant, ari, ami, purity, many_to_one; None without
    labels), seconds, num_clusters, used_share, largest_share."""
    stages: Sequence[Mapping[str, Any]] = ()
    """name, kind, state, seconds, fingerprint; peak_host_bytes and peak_gpu_bytes if known."""
    timings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """timing.json by train stage. If ``profiled``, its bottleneck is shown at the top."""
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Rows of metrics.jsonl by stage."""
    cluster_sizes: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Images per cluster [num_clusters] by subject."""
    confusion: np.ndarray | None = None
    """Counts [num_classes, num_columns] of label by matched class (``metrics.confusion``)."""
    label_names: Sequence[str] = ()
    heads: Sequence[Mapping[str, Any]] = ()
    clusters: Sequence[Cluster] = ()
    num_clusters: int | None = None
    """Number of all clusters, if ``clusters`` holds only some of them."""
    neighbours: Sequence[Anchor] = ()
    neighbour_purity: Mapping[str, float] | None = None
    """By K: share of the K nearest neighbours with the label of their anchor."""
    warnings: Sequence[str] = ()
    """Warnings of the stages (a collapse, say), with a remedy."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """About the data: num_images, bad_images, num_labelled and so on."""
    config_yaml: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    best: str | None = None
    """Subject whose scores are shown at the top of the page; by default the last."""


def write_report(report: Report, path: Path) -> None:
    """Write the page, which needs no network and is readable in light and dark mode."""
    write_page(path, "report.html.j2", **_template_values(report))


def summary_table(subjects: Mapping[str, Mapping[str, Any]]) -> str:
    """Plain-text table of the scores and seconds of each subject; '-' for an unknown score."""
    lines = [["", "ACC", "NMI", "ARI", "seconds"]]
    for name, row in subjects.items():
        scores = [format_score(row.get(key)) for key in ("acc", "nmi", "ari")]
        seconds = row.get("seconds")
        lines.append([subject_name(name), *scores, "-" if seconds is None else f"{seconds:.1f}"])
    head, *rest = pad_columns(lines)
    rule = ["-" * len(cell) for cell in head]
    return "\n".join("  ".join(line) for line in [head, rule, *rest])


class ThumbnailBudget:
    """Makes thumbnails until the page's bytes are used up; ``left_out`` counts the others."""

    def __init__(self) -> None:
        self.bytes_left = MAX_IMAGE_BYTES
        self.left_out = 0

    def thumbnail(self, image: np.ndarray) -> str | None:
        """Data URI of the thumbnail; None if the page is full."""
        if self.bytes_left <= 0:
            self.left_out += 1
            return None
        uri = figures.thumbnail(image)
        self.bytes_left -= len(uri)
        return uri

    def thumbnails(self, images: Sequence[np.ndarray]) -> list[str]:
        """Data URIs of the images that fit on the page."""
        uris = [self.thumbnail(image) for image in images]
        return [uri for uri in uris if uri]


def _template_values(report: Report) -> dict[str, Any]:
    """Values, SVG and data URIs for report.html.j2."""
    budget = ThumbnailBudget()
    anchors = [_anchor(anchor, budget) for anchor in report.neighbours]
    clusters = [_cluster(cluster, budget) for cluster in report.clusters]
    last_subject = list(report.summary)[-1] if report.summary else ""
    best_subject = report.best or last_subject
    highest = _highest_scores(report)
    curves = {stage: _curves(stage, rows) for stage, rows in report.curves.items()}
    return {
        "report": report,
        "best_subject": best_subject,
        "best_row": report.summary.get(best_subject, {}),
        "tiles": _tiles(report, report.summary.get(best_subject, {})),
        "bottlenecks": _bottlenecks(report),
        "score_columns": {key: name for key, name in SCORES.items() if key in highest},
        "highest": highest,
        "anchors": anchors,
        "clusters": [c for c in clusters if c["prototypes"] or c["low_confidence"]],
        "num_clusters": report.num_clusters or len(report.clusters),
        "images_left_out": budget.left_out,
        "sizes": _sizes(report),
        "confusion": _confusion(report),
        "head_columns": list(dict.fromkeys(key for head in report.heads for key in head)),
        "curves": {stage: drawn for stage, drawn in curves.items() if drawn},
        "total_seconds": _total_seconds(report),
        "has_gpu": any(stage.get("peak_gpu_bytes") for stage in report.stages),
    }


def _total_seconds(report: Report) -> float:
    return sum(stage.get("seconds") or 0 for stage in report.stages)


def _highest_scores(report: Report) -> dict[str, float]:
    """Highest value of every score that some subject has."""
    values = {key: [row.get(key) for row in report.summary.values()] for key in SCORES}
    known = {key: [v for v in column if v is not None] for key, column in values.items()}
    return {key: max(column) for key, column in known.items() if column}


def _bottlenecks(report: Report) -> list[tuple[str, str]]:
    """Name and bottleneck of every profiled training."""
    return [
        (name, timing["bottleneck"])
        for name, timing in report.timings.items()
        if timing.get("profiled") and timing.get("bottleneck")
    ]


def _tiles(report: Report, best_row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the few numbers at the top of the page."""
    tiles = []
    for key in ("acc", "nmi", "ari"):
        if best_row.get(key) is not None:
            tiles.append((SCORES[key], format_score(best_row[key])))
    if "num_images" in report.data:
        tiles.append(("images", format_number(report.data["num_images"])))
    num_clusters = best_row.get("num_clusters") or report.num_clusters
    used_share = best_row.get("used_share", 1)
    if num_clusters and used_share == 1:
        tiles.append(("clusters", format_number(num_clusters)))
    elif num_clusters:
        used = round(used_share * num_clusters)
        tiles.append((f"of {format_number(num_clusters)} clusters used", format_number(used)))
    if seconds := _total_seconds(report):
        tiles.append(("total time", format_duration(seconds)))
    return tiles


def _cluster(cluster: Cluster, budget: ThumbnailBudget) -> dict[str, Any]:
    return {
        "cluster": cluster,
        "prototypes": budget.thumbnails(cluster.prototypes),
        "low_confidence": budget.thumbnails(cluster.low_confidence),
    }


def _anchor(anchor: Anchor, budget: ThumbnailBudget) -> dict[str, Any]:
    """Thumbnails of an anchor and its neighbours, and which of these have another label."""
    neighbours = []
    for image, score, label in zip(anchor.neighbours, anchor.scores, anchor.neighbour_labels):
        both_known = label is not None and anchor.label is not None
        neighbours.append(
            {
                "uri": budget.thumbnail(image),
                "score": score,
                "label": label,
                "has_other_label": both_known and label != anchor.label,
            }
        )
    return {
        "uri": budget.thumbnail(anchor.image),
        "label": anchor.label,
        "neighbours": [n for n in neighbours if n["uri"]],
    }


def _sizes(report: Report) -> list[dict[str, Any]]:
    """Drawings of the cluster sizes, with the numbers of used and of all clusters."""
    return [
        {
            "subject": name,
            "svg": figures.sizes(counts, name),
            "used": np.count_nonzero(counts),
            "total": len(counts),
        }
        for name, counts in report.cluster_sizes.items()
        if len(counts)
    ]


def _curves(stage: str, rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Metric and SVG: losses first, then the learning rate, then the others.

    Values that are not finite are left out.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if is_number and key not in ("step", "epoch"):
                series.setdefault(key, []).append((row["step"], value))
    drawings = []
    for key in sorted(series, key=_curve_rank)[:MAX_CURVES]:
        steps, values = zip(*series[key])
        drawings.append((key, figures.curve(steps, values, f"{stage}-{key}")))
    return drawings


def _curve_rank(metric: str) -> int:
    """Place of a metric's curve in the page; the smallest comes first."""
    if metric == "loss":
        return 0
    if "loss" in metric:
        return 1
    return 2 if metric in ("lr", "learning_rate") else 3


def _confusion(report: Report) -> str | None:
    """Drawing of the confusion matrix; None without counts."""
    counts = report.confusion
    if counts is None or not counts.sum():
        return None
    num_classes = counts.shape[0]
    names = [str(i) for i in range(num_classes)]
    if len(report.label_names) == num_classes:
        names = list(report.label_names)
    # The last column is for clusters without a class; it is omitted if it is empty.
    if not counts[:, -1].any():
        return figures.confusion(counts[:, :-1], names, names)
    return figures.confusion(counts, names, [*names, "none"])
