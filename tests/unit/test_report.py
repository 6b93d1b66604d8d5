"""The page stands on its own, leaves out what is absent, stays small, and says what it left out."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_scan.report import figures
from dist_scan.report.html import Anchor, Cluster, Report, summary_table, write_report

RNG = np.random.default_rng(0)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Ids, texts and addresses of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.sources, self.links, self.words = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs) -> None:
        named = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [named["id"]] if tag == "section" else []
        self.sources += [named[k] for k in ("src", "srcset", "xlink:href") if k in named]
        self.links += [named["href"]] if "href" in named else []

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


def image(side: int = 8) -> np.ndarray:
    return RNG.integers(0, 255, (side, side, 3), dtype=np.uint8)


def full() -> Report:
    scores = {
        "acc": 0.5,
        "nmi": 0.25,
        "nmi_variant": "geometric",
        "ari": 0.125,
        "ami": None,
        "seconds": 61.0,
        "used_share": 1.0,
        "largest_share": 0.2,
        "num_clusters": 4,
    }
    return Report(
        title="A <b>title</b>",
        created="today",
        summary={"kmeans_pixels": scores, "mine": {**scores, "acc": 0.75}},
        stages=[
            {
                "name": "heads",
                "kind": "train",
                "state": "done",
                "seconds": 12.0,
                "fingerprint": "f" * 64,
                "peak_host_bytes": 3 * 2**30,
            },
            {
                "name": "late",
                "kind": "report",
                "state": "run",
                "seconds": None,
                "fingerprint": "e" * 64,
            },
        ],
        timings={
            "heads": {
                "profiled": True,
                "verdict": "data wait is 41% of a step",
                "steps": 300,
                "images_per_s": 1234.5,
                "first_step_s": 2.0,
                "sections": [
                    {
                        "section": "data_wait",
                        "share": 0.41,
                        "mean_ms": 4.1,
                        "max_ms": 5.0,
                        "max_rank": 1,
                    }
                ],
                "seconds_by_rank": {"forward": [1.0, 2.0]},
            },
            "short": {"steps": 0, "first_step_s": 1.0, "profiled": True},
        },
        curves={
            "heads": [{"step": s, "loss": 1 / (s + 1), "lr": float("nan")} for s in range(30)],
            "nothing": [{"step": 1}],
        },
        cluster_sizes={"mine": np.array([5, 0, 3, 2])},
        confusion=np.array([[8, 2, 0], [1, 0, 0]]),
        label_names=["cat & dog", "b"],
        heads=[{"head": 0, "loss": -1.5, "chosen": True}],
        clusters=[Cluster(3, 12, [image()], [image()], "cat & dog", 0.9, 0.8)],
        num_clusters=4,
        neighbours=[Anchor(image(), [image(), image()], [0.9, 0.5], "b", ["b", "a"])],
        neighbour_purity={"5": 0.5},
        warnings=["collapsed: do this"],
        facts={"num_images": 12345},
        config_yaml="a: <script>1</script>",
        environment={"world_size": 2},
    )


def page_of(report: Report, tmp_path: Path) -> tuple[str, Page]:
    write_report(report, tmp_path / "new" / "report.html")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]
    text = (tmp_path / "new" / "report.html").read_text()
    return text, Page(text)


def test_a_full_page_stands_on_its_own(tmp_path: Path) -> None:
    text, page = page_of(full(), tmp_path)
    assert page.ids == [
        "summary",
        "clusters",
        "neighbours",
        "sizes",
        "confusion",
        "heads",
        "curves",
        "stages",
        "about",
    ]
    assert page.sources and all(s.startswith(("data:image/", "#")) for s in page.sources)
    assert all(link.startswith(("#", "data:image/")) for link in page.links) and {
        f"#{i}" for i in page.ids
    } <= set(page.links)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    words = " ".join(page.words)
    for wanted in (
        "A <b>title</b>",
        "cat & dog",
        "geometric",
        "0.750",
        "12,345",
        "collapsed: do this",
        "a: <script>1</script>",
        "k-means on pixels",
        "Shown: 1 of 4 clusters",
        "50 %",
        "3.00 GiB",
        "data wait is 41% of a step",
        "5.00 (rank 1)",
    ):
        assert wanted in words, wanted
    assert text.count('class="different"') == 1
    assert text.count('class="verdict"') == 1 and text.index('class="verdict"') < text.index(
        "<main>"
    )


def test_the_head_shows_the_best_or_the_last(tmp_path: Path) -> None:
    from dataclasses import replace

    for best, shown in ((None, "0.750"), ("kmeans_pixels", "0.500")):
        text, _ = page_of(replace(full(), best=best), tmp_path)
        assert f'<div class="tile"><b>{shown}</b><span>ACC' in text


def test_what_is_absent_is_left_out(tmp_path: Path) -> None:
    _, page = page_of(Report("t", "now"), tmp_path)
    assert page.ids == ["about"] and not page.sources


def test_without_labels_no_score_is_shown(tmp_path: Path) -> None:
    row = {
        "acc": None,
        "nmi": None,
        "nmi_variant": "arithmetic",
        "seconds": 5.0,
        "num_clusters": 4,
        "used_share": 0.5,
        "largest_share": 0.5,
    }
    _, page = page_of(
        Report(
            "t",
            "now",
            {"scan": row},
            clusters=[Cluster(0, 3, [image()])],
            neighbours=[Anchor(image(), [image()])],
        ),
        tmp_path,
    )
    words = " ".join(page.words)
    assert (
        "ACC" not in words
        and "NMI" not in words
        and "No labels" in words
        and "Cluster 0" in words
        and "of 4 clusters used" in words
    )


def test_a_thousand_clusters_stay_under_20_mb(tmp_path: Path) -> None:
    big = image(96)  # noise at full size: nothing compresses worse
    report = Report(
        "t",
        "now",
        clusters=[Cluster(c, 9, [big] * 10, [big] * 10) for c in range(1000)],
        num_clusters=1000,
        cluster_sizes={"scan": np.arange(1000)},
        confusion=RNG.integers(0, 9, (1000, 1001)),
    )
    text, page = page_of(report, tmp_path)
    assert len(text) < 20e6
    assert "pictures were left out" in " ".join(page.words) and "of 1,000 clusters" in " ".join(
        page.words
    )


def test_confusion_rows_are_shares_of_their_own_label() -> None:
    svg = figures.confusion(np.array([[90, 10], [1, 3]]), ["a", "b"], ["a", "b"])
    assert [w for w in re.findall(r">(\d+)</text>", svg)] == ["90", "10", "25", "75"]


def test_drawings_take_the_pages_colours_and_repeat() -> None:
    drawn = figures.curve(range(5000), np.sin(np.arange(5000)), "x")
    assert drawn == figures.curve(range(5000), np.sin(np.arange(5000)), "x")
    assert (
        "currentColor" in drawn
        and "var(--accent)" in drawn
        and "#010203" not in drawn
        and len(drawn) < 40_000
    )
    x, y = figures.thin(np.arange(1003.0), np.full(1003, 2.0))
    assert len(x) == figures.MAX_POINTS and (y == 2).all() and (np.diff(x) > 0).all()


def test_thumbnails_are_small_and_faithful() -> None:
    smooth = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (200, 1, 3))
    kind, data = figures.thumbnail(smooth).split(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (96, 64) and kind.startswith("data:image/")
    assert (
        abs(
            np.asarray(shown.convert("L")).astype(int)[32, [5, 48, 90]] - np.array([15, 128, 242])
        ).max()
        < 8
    )
    tiny = image(16)
    assert (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(figures.thumbnail(tiny).split(",")[1]))))
        == tiny
    ).all()
    with pytest.raises(ValueError, match="float"):
        figures.thumbnail(np.zeros((4, 4, 3)))


def test_the_table_at_the_end() -> None:
    text = summary_table(
        {
            "kmeans_pixels": {"acc": 0.70512, "nmi": 0.7, "ari": 0.6, "seconds": 2.04},
            "selflabel": {"acc": None, "seconds": 123.0},
        }
    )
    lines = text.splitlines()
    assert (
        lines[0].split() == ["ACC", "NMI", "ARI", "seconds"]
        and len({len(line) for line in lines}) == 1
    )
    assert lines[2].split() == ["k-means", "on", "pixels", "0.705", "0.700", "0.600", "2.0"]
    assert lines[3].split() == ["Self-labelled", "-", "-", "-", "123.0"]
