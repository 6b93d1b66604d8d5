"""The report page needs no other files, leaves out what is absent, stays small, and says so."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_scan.report import figures
from dist_scan.report.html import Anchor, Cluster, Report, summary_table, write_report

RNG = np.random.default_rng(0)
VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Section ids, text, sources and links of a page; fails if a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.section_ids: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert not self.open_tags, self.open_tags

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        if tag == "section":
            self.section_ids.append(attributes["id"])
        self.sources += [attributes[k] for k in ("src", "srcset", "xlink:href") if k in attributes]
        if "href" in attributes:
            self.links.append(attributes["href"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def random_image(side: int = 8) -> np.ndarray:
    return RNG.integers(0, 255, (side, side, 3), dtype=np.uint8)


def full_report() -> Report:
    """A report with something in every section."""
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
    finished_stage = {
        "name": "heads",
        "kind": "train",
        "state": "done",
        "seconds": 12.0,
        "fingerprint": "f" * 64,
        "peak_host_bytes": 3 * 2**30,
    }
    running_stage = {
        "name": "late",
        "kind": "report",
        "state": "run",
        "seconds": None,
        "fingerprint": "e" * 64,
    }
    section = {"section": "data_wait", "share": 0.41, "mean_ms": 4.1, "max_ms": 5.0, "max_rank": 1}
    timing = {
        "profiled": True,
        "bottleneck": "data wait is 41% of a step",
        "steps": 300,
        "images_per_s": 1234.5,
        "first_step_s": 2.0,
        "sections": [section],
        "seconds_by_rank": {"forward": [1.0, 2.0]},
    }
    return Report(
        title="A <b>title</b>",
        summary={"kmeans_pixels": scores, "mine": {**scores, "acc": 0.75}},
        stages=[finished_stage, running_stage],
        timings={
            "heads": timing,
            "short": {"steps": 0, "first_step_s": 1.0, "profiled": True},
        },
        curves={
            "heads": [{"step": s, "loss": 1 / (s + 1), "lr": float("nan")} for s in range(30)],
            "nothing": [{"step": 1}],
        },
        cluster_sizes={"mine": np.array([5, 0, 3, 2])},
        confusion=np.array([[8, 2, 0], [1, 0, 0]]),
        label_names=["cat & dog", "b"],
        heads=[{"head": 0, "loss": -1.5, "selected": True}],
        clusters=[Cluster(3, 12, [random_image()], [random_image()], "cat & dog", 0.9, 0.8)],
        num_clusters=4,
        neighbours=[
            Anchor(random_image(), [random_image(), random_image()], [0.9, 0.5], "b", ["b", "a"])
        ],
        neighbour_purity={"5": 0.5},
        warnings=["collapsed: do this"],
        data={"num_images": 12345},
        config_yaml="a: <script>1</script>",
        environment={"world_size": 2},
    )


def write_and_parse(report: Report, tmp_path: Path) -> tuple[str, Page]:
    """HTML of a report, and the page parsed. Nothing but the page is written."""
    write_report(report, tmp_path / "new" / "report.html")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]
    html = (tmp_path / "new" / "report.html").read_text()
    return html, Page(html)


def test_a_full_page_has_all_sections_and_needs_no_other_files(tmp_path: Path) -> None:
    html, page = write_and_parse(full_report(), tmp_path)
    sections = "summary clusters neighbours sizes confusion heads curves stages about"
    assert page.section_ids == sections.split()
    assert page.sources
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert {f"#{i}" for i in page.section_ids} <= set(page.links)
    assert not re.search(r"url\((?!#)|@import|<script|<link", html)


def test_a_full_page_shows_the_values(tmp_path: Path) -> None:
    html, page = write_and_parse(full_report(), tmp_path)
    for expected in (
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
        assert expected in page.text, expected
    assert html.count('class="other-label"') == 1
    assert html.count('class="bottleneck"') == 1
    assert html.index('class="bottleneck"') < html.index("<main>")


@pytest.mark.parametrize(("best", "accuracy"), [(None, "0.750"), ("kmeans_pixels", "0.500")])
def test_the_top_shows_the_best_subject_or_the_last(
    best: str | None, accuracy: str, tmp_path: Path
) -> None:
    html, _ = write_and_parse(replace(full_report(), best=best), tmp_path)
    assert f'<div class="tile"><b>{accuracy}</b><span>ACC' in html


def test_sections_without_contents_are_left_out(tmp_path: Path) -> None:
    _, page = write_and_parse(Report("t"), tmp_path)
    assert page.section_ids == ["about"]
    assert not page.sources


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
    report = Report(
        "t",
        {"scan": row},
        clusters=[Cluster(0, 3, [random_image()])],
        neighbours=[Anchor(random_image(), [random_image()], [0.5], None, [None])],
    )
    _, page = write_and_parse(report, tmp_path)
    for absent in ("ACC", "NMI"):
        assert absent not in page.text
    for expected in ("No labels", "Cluster 0", "of 4 clusters used"):
        assert expected in page.text


def test_a_thousand_clusters_stay_below_20_mb(tmp_path: Path) -> None:
    # Noise at full size: nothing compresses worse.
    noise = random_image(96)
    report = Report(
        "t",
        clusters=[Cluster(c, 9, [noise] * 10, [noise] * 10) for c in range(1000)],
        num_clusters=1000,
        cluster_sizes={"scan": np.arange(1000)},
        confusion=RNG.integers(0, 9, (1000, 1001)),
    )
    html, page = write_and_parse(report, tmp_path)
    assert len(html) < 20e6
    assert "images were left out" in page.text
    assert "of 1,000 clusters" in page.text


def test_confusion_rows_are_shares_of_their_own_sum() -> None:
    svg = figures.confusion(np.array([[90, 10], [1, 3]]), ["a", "b"], ["a", "b"])
    assert re.findall(r">(\d+)</text>", svg) == ["90", "10", "25", "75"]


def test_drawings_use_the_colours_of_the_page_and_are_reproducible() -> None:
    drawn = figures.curve(range(5000), np.sin(np.arange(5000)), "x")
    assert drawn == figures.curve(range(5000), np.sin(np.arange(5000)), "x")
    assert "currentColor" in drawn
    assert "var(--accent)" in drawn
    assert figures.INK not in drawn
    assert len(drawn) < 40_000


def test_long_curves_are_averaged() -> None:
    x, y = figures.average_points(np.arange(1003.0), np.full(1003, 2.0))
    assert len(x) == figures.MAX_POINTS
    assert (y == 2).all()
    assert (np.diff(x) > 0).all()


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_thumbnails_are_small_and_look_like_the_image() -> None:
    gradient = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (200, 1, 3))
    uri = figures.thumbnail(gradient)
    assert uri.startswith("data:image/")
    shown = decode(uri)
    assert shown.size == (96, 64)
    brightness = np.asarray(shown.convert("L")).astype(int)[32, [5, 48, 90]]
    assert abs(brightness - np.array([15, 128, 242])).max() < 8
    tiny = random_image(16)
    assert (np.asarray(decode(figures.thumbnail(tiny))) == tiny).all()
    with pytest.raises(ValueError, match="float"):
        figures.thumbnail(np.zeros((4, 4, 3)))


def test_the_table_at_the_end_of_a_run() -> None:
    text = summary_table(
        {
            "kmeans_pixels": {"acc": 0.70512, "nmi": 0.7, "ari": 0.6, "seconds": 2.04},
            "selflabel": {"acc": None, "seconds": 123.0},
        }
    )
    head, _, kmeans, selflabel = text.splitlines()
    assert head.split() == ["ACC", "NMI", "ARI", "seconds"]
    assert len({len(line) for line in text.splitlines()}) == 1
    assert kmeans.split() == ["k-means", "on", "pixels", "0.705", "0.700", "0.600", "2.0"]
    assert selflabel.split() == ["Self-labelled", "-", "-", "-", "123.0"]
