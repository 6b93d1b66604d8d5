"""The compare command as a user starts it: real runs, skipped when done, told when one fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.launches import ROOT, environment

PIXELS = """
data: {train: {source: "sklearn:digits", limit: 200}, size: 16, stored: raw, resolution: 16}
stages:
  pixels: {kind: embed, pixels: true, num_shards: 2}
  clusters: {kind: kmeans, features: pixels, num_clusters: 10, normalise: false, restarts: 1}
  evaluate: {kind: evaluate, images: train, subjects: {found: clusters}}
  report: {kind: report, images: train, evaluate: evaluate, best: found}
"""
COMPARE = """
name: tiny
seeds: [0]
members:
  plain: {config: pixels.yaml}
  unit: {config: pixels.yaml, overrides: [stages.clusters.normalise=true]}
  more: {config: pixels.yaml, overrides: [stages.clusters.num_clusters=12]}
rows: {k-means: plain.found, on unit rows: unit.found, of 12: more.found}
baseline: k-means
"""


def compare(folder, *arguments):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "dist_scan",
            "compare",
            str(folder / "tiny.yaml"),
            "--out",
            str(folder / "out"),
            *arguments,
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )


def test_it_runs_what_is_missing_and_writes_one_table(tmp_path: Path) -> None:
    (tmp_path / "pixels.yaml").write_text(PIXELS)
    (tmp_path / "tiny.yaml").write_text(COMPARE)
    first = compare(tmp_path, "--at-once", "2")
    assert first.returncode == 0, first.stdout
    assert "ACC" in (tmp_path / "out" / "more-seed0" / "output.txt").read_text()
    table = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert table["num_images"] == 200
    for name, member in (("k-means", "plain"), ("on unit rows", "unit"), ("of 12", "more")):
        own = json.loads((tmp_path / "out" / f"{member}-seed0" / "report.json").read_text())[
            "found"
        ]
        assert table["rows"][name]["0"] == own and 0.3 < own["acc"] < 1
    assert table["rows"]["k-means"] != table["rows"]["on unit rows"]
    assert "| k-means" in first.stdout and (tmp_path / "out" / "compare.html").is_file()
    assert len(list((tmp_path / "out" / "data" / "beton_train").glob("*/*.beton"))) == 1, (
        "the data is built once"
    )
    before = (tmp_path / "out" / "compare.json").read_bytes()
    (
        tmp_path / "out" / "unit-seed0" / "DONE"
    ).unlink()  # as if it had been killed: it alone starts again
    again = compare(tmp_path)
    assert again.returncode == 0, again.stdout
    lines = again.stdout.splitlines()
    assert [line.rpartition("/")[2] for line in lines[:3]] == [
        "plain-seed0: already done, skipped",
        "more-seed0: already done, skipped",
        "unit-seed0",
    ]
    assert (
        "starts" not in again.stdout and (tmp_path / "out" / "compare.json").read_bytes() == before
    )


def test_a_member_that_fails_is_told_and_ends_it(tmp_path: Path) -> None:
    (tmp_path / "pixels.yaml").write_text(PIXELS.replace("num_clusters: 10", "num_clusters: 300"))
    (tmp_path / "tiny.yaml").write_text(COMPARE)
    done = compare(tmp_path)
    assert (
        done.returncode == 2
        and "300 clusters of 200 images" in done.stdout
        and "Traceback" not in done.stdout
    )
