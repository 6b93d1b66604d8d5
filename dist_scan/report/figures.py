"""The report's figures: inline SVG that takes the page's colours, and thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

INK, ACCENT = (
    "#010203",
    "#040506",
)  # stand-ins that nothing else has; the page's CSS colours take their place
MAX_POINTS = 400
STYLE = {
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


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG whose ink is the page's text colour and whose accent is the page's accent; same input, same text."""
    out = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    text = re.sub(r"font: ([\d.]+)px '?sans-serif'?[^;\"]*", r"font-size: \1px", text)
    return text.replace(INK, "currentColor").replace(ACCENT, "var(--accent)")


def _axes(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, each the mean of its bin: a long curve stays a small drawing."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MAX_POINTS + 1).astype(int)[:-1]
    count = np.diff(np.r_[edges, len(steps)])
    return np.add.reduceat(steps, edges) / count, np.add.reduceat(values, edges) / count


def curve(steps: Sequence[float], values: Sequence[float], name: str) -> str:
    """One metric over the steps of one stage."""
    x, y = thin(np.asarray(steps, float), np.asarray(values, float))
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
    """Images per cluster, largest first, with the line at which all would be equally large."""
    ordered = np.sort(np.asarray(counts))[::-1]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.4, 2.3)
        axes.stairs(
            ordered,
            np.arange(len(ordered) + 1) + 0.5,
            fill=True,
            color=ACCENT,
            alpha=0.8,
            linewidth=0,
        )
        axes.axhline(ordered.mean(), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        axes.set(
            xlabel="clusters, largest first",
            ylabel="images",
            xlim=(0.5, len(ordered) + 0.5),
            ylim=(0, None),
        )
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
        return _svg(figure, f"sizes-{name}")


def confusion(counts: np.ndarray, row_names: Sequence[str], column_names: Sequence[str]) -> str:
    """Rows (labels) as shares of their own sum, so that rare classes read like common ones."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shades = LinearSegmentedColormap.from_list(
        "shades", [(0.2, 0.52, 0.54, 0.0), (0.2, 0.52, 0.54, 1.0)]
    )
    few = len(row_names) <= 30
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        side = 6.6 if few else 7.4
        figure, axes = _axes(side, side * max(0.55, min(1.0, counts.shape[0] / counts.shape[1])))
        axes.imshow(
            share,
            cmap=shades,
            vmin=0,
            vmax=1,
            interpolation="nearest" if few else "antialiased",
            aspect="auto",
        )
        axes.set(xlabel="class matched to the cluster", ylabel="label")
        if few:
            axes.set_xticks(
                range(len(column_names)),
                column_names,
                rotation=45 if max(map(len, column_names)) > 3 else 0,
                ha="right" if max(map(len, column_names)) > 3 else "center",
            )
            axes.set_yticks(range(len(row_names)), row_names)
        if len(row_names) <= 20:
            for i, j in zip(*np.nonzero(share >= 0.005)):
                axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, "confusion")


def thumbnail(image: np.ndarray, side: int = 96) -> str:
    """uint8 [H, W, 3] (or [H, W]) as a data URI, its longer side at most `side`; PNG or JPEG, whichever is smaller."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"an image has type {image.dtype} and shape {image.shape}; give uint8 [H, W, 3] or [H, W]"
        )
    picture = Image.fromarray(image).convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    coded = {}
    for kind, options in {"png": {"optimize": False}, "jpeg": {"quality": 82}}.items():
        out = io.BytesIO()
        picture.save(out, kind, **options)
        coded[kind] = out.getvalue()
    small = (
        picture.width <= 40 and len(coded["png"]) < 4096
    )  # tiny pictures are shown enlarged: no JPEG blocks there
    kind = "png" if small else min(coded, key=lambda k: len(coded[k]))
    return f"data:image/{kind};base64,{base64.b64encode(coded[kind]).decode()}"


def dots(rows: Sequence[tuple[str, Sequence[float]]], name: str, baseline: str = "") -> str:
    """One line per row, first at the top: a dot per seed, a bar at the mean, a dashed line at the baseline's mean."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.4, 0.55 + 0.34 * len(rows))
        for y, (row, values) in enumerate(rows):
            if len(values):
                axes.plot(
                    values,
                    [y] * len(values),
                    "o",
                    color=ACCENT,
                    markersize=5,
                    alpha=0.55,
                    markeredgewidth=0,
                )
                axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=ACCENT, linewidth=2)
                if row == baseline:
                    axes.axvline(
                        np.mean(values), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6
                    )
        axes.set_yticks(range(len(rows)), [row for row, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        return _svg(figure, f"dots-{name}")
