"""Figures of the report: inline SVG in the colours of the page, and thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Placeholder colours, used by nothing else; the page's CSS colours replace them in the SVG.
INK, ACCENT = "#010203", "#040506"
MAX_POINTS = 400
"""Points of a curve; longer series are averaged."""
MAX_NAMED_CLASSES, MAX_CLASSES_WITH_NUMBERS = 30, 20
"""A confusion matrix of more classes has no names, or no numbers in its cells."""
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.4,
    "axes.axisbelow": True,
    "axes.grid": True,
    "xtick.major.width": 0.4,
    "ytick.major.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.alpha": 0.1,
    "grid.linewidth": 0.6,
}
MEAN_LINE: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 3)), "alpha": 0.6}


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG that scales with the page; the same input gives the same text."""
    out = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = out.getvalue()
    # Leave out the XML header, the metadata, and the fixed size.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for attribute in ("height", "width"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    # Take font and colours from the page.
    text = re.sub(r"font: ([\d.]+)px '?sans-serif'?[^;\"]*", r"font-size: \1px", text)
    return text.replace(INK, "currentColor").replace(ACCENT, "var(--accent)")


def average_points(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points of a curve, each the mean of consecutive ones."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)[:-1]
    count = np.diff(np.r_[edges, len(steps)])
    return np.add.reduceat(steps, edges) / count, np.add.reduceat(values, edges) / count


def curve(steps: Sequence[float], values: Sequence[float], name: str) -> str:
    """A metric over the steps of a stage."""
    x, y = average_points(np.asarray(steps, float), np.asarray(values, float))
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.0, 1.75)
        axes.plot(
            x,
            y,
            color=ACCENT,
            linewidth=1.5,
            solid_joinstyle="round",
            marker="o" if len(x) < 3 else "",
            markersize=3,
        )
        axes.margins(x=0.01, y=0.08)
        axes.locator_params(nbins=4)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        return _svg(figure, f"curve-{name}")


def sizes(counts: np.ndarray, name: str) -> str:
    """Images per cluster, largest first, with a line at their mean."""
    ordered = np.sort(np.asarray(counts))[::-1]
    edges = np.arange(len(ordered) + 1) + 0.5
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.4, 2.3)
        axes.stairs(ordered, edges, fill=True, color=ACCENT, alpha=0.8, linewidth=0)
        axes.axhline(ordered.mean(), **MEAN_LINE)
        axes.set(
            xlabel="clusters, largest first",
            ylabel="images",
            xlim=(0.5, len(ordered) + 0.5),
            ylim=(0, None),
        )
        axes.locator_params(axis="x", integer=True, nbins=8)
        return _svg(figure, f"sizes-{name}")


def confusion(counts: np.ndarray, row_names: Sequence[str], column_names: Sequence[str]) -> str:
    """Confusion matrix whose rows (labels) are shares of their own sum."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    has_names = len(row_names) <= MAX_NAMED_CLASSES
    side = 6.6 if has_names else 7.4
    height = side * max(0.55, min(1.0, counts.shape[0] / counts.shape[1]))
    shades = LinearSegmentedColormap.from_list(
        "shades", [(0.2, 0.52, 0.54, 0.0), (0.2, 0.52, 0.54, 1.0)]
    )
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = _axes(side, height)
        axes.imshow(
            shares,
            cmap=shades,
            vmin=0,
            vmax=1,
            interpolation="nearest" if has_names else "antialiased",
            aspect="auto",
        )
        axes.set(xlabel="class matched to the cluster", ylabel="label")
        if has_names:
            _name_classes(axes, row_names, column_names)
        if len(row_names) <= MAX_CLASSES_WITH_NUMBERS:
            for i, j in zip(*np.nonzero(shares >= 0.005)):
                axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, "confusion")


def _name_classes(axes: Axes, row_names: Sequence[str], column_names: Sequence[str]) -> None:
    """Label the ticks; long names of columns are slanted."""
    is_long = max(map(len, column_names)) > 3
    axes.set_xticks(
        range(len(column_names)),
        column_names,
        rotation=45 if is_long else 0,
        ha="right" if is_long else "center",
    )
    axes.set_yticks(range(len(row_names)), row_names)


def dots(rows: Sequence[tuple[str, Sequence[float]]], name: str, baseline: str) -> str:
    """A line per row: a dot per seed, a bar at their mean, a dashed line at the baseline's mean."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.4, 0.55 + 0.34 * len(rows))
        for y, (row, values) in enumerate(rows):
            if not values:
                continue
            heights = [y] * len(values)
            mean = float(np.mean(values))
            axes.plot(
                values, heights, "o", color=ACCENT, markersize=5, alpha=0.55, markeredgewidth=0
            )
            axes.plot([mean, mean], [y - 0.3, y + 0.3], color=ACCENT, linewidth=2)
            if row == baseline:
                axes.axvline(mean, **MEAN_LINE)
        axes.set_yticks(range(len(rows)), [row for row, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        return _svg(figure, f"dots-{name}")


def thumbnail(image: np.ndarray) -> str:
    """Data URI of an image, uint8 [H, W, 3] or [H, W], its longer side at most 96 pixels.

    PNG or JPEG, whichever is smaller.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"an image has type {image.dtype} and shape {image.shape}; "
            "give uint8 [H, W, 3] or [H, W]"
        )
    picture = Image.fromarray(image).convert("RGB")
    picture.thumbnail((96, 96), Image.Resampling.LANCZOS)
    png = _encode(picture, "png", optimize=False)
    jpeg = _encode(picture, "jpeg", quality=82)
    # Tiny images are shown enlarged, where blocks of JPEG would be visible.
    is_tiny = picture.width <= 40 and len(png) < 4096
    kind, data = ("png", png) if is_tiny or len(png) <= len(jpeg) else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
