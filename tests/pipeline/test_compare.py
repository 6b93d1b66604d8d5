"""The compare command, started as a user does: runs, skips finished runs, reports failures."""

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
COMPARISON = """
name: tiny
seeds: [0]
members:
  plain: {config: pixels.yaml}
  unit: {config: pixels.yaml, overrides: [stages.clusters.normalise=true]}
  more: {config: pixels.yaml, overrides: [stages.clusters.num_clusters=12]}
rows: {k-means: plain.found, on unit rows: unit.found, of 12: more.found}
baseline: k-means
"""
MEMBER_OF_ROW = {"k-means": "plain", "on unit rows": "unit", "of 12": "more"}


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the comparison in a folder to its end."""
    line = ["-m", "dist_scan", "compare", str(folder / "tiny.yaml"), "--out", str(folder / "out")]
    return subprocess.run(
        [sys.executable, *line, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )


def test_all_runs_make_one_table_and_only_unfinished_ones_run_again(tmp_path: Path) -> None:
    (tmp_path / "pixels.yaml").write_text(PIXELS)
    (tmp_path / "tiny.yaml").write_text(COMPARISON)
    out = tmp_path / "out"
    first = compare(tmp_path, "--at-once", "2")
    assert first.returncode == 0, first.stdout
    assert "| k-means" in first.stdout
    assert "ACC" in (out / "more-seed0" / "output.txt").read_text()
    assert (out / "compare.html").is_file()
    table = json.loads((out / "compare.json").read_text())
    assert table["num_images"] == 200
    for row, member in MEMBER_OF_ROW.items():
        report = json.loads((out / f"{member}-seed0" / "report.json").read_text())
        assert table["rows"][row]["0"] == report["found"]
        assert 0.3 < report["found"]["acc"] < 1
    assert table["rows"]["k-means"] != table["rows"]["on unit rows"]
    betons = list((out / "data" / "beton_train").glob("*/*.beton"))
    assert len(betons) == 1, "the data is built once"

    before = (out / "compare.json").read_bytes()
    (out / "unit-seed0" / "DONE").unlink()  # as if it had been killed
    again = compare(tmp_path)
    assert again.returncode == 0, again.stdout
    assert [line.rpartition("/")[2] for line in again.stdout.splitlines()[:3]] == [
        "plain-seed0: already done, skipped",
        "more-seed0: already done, skipped",
        "unit-seed0",
    ]
    assert "starts" not in again.stdout, "all stages of the run were finished"
    assert (out / "compare.json").read_bytes() == before


def test_a_run_that_fails_ends_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "pixels.yaml").write_text(PIXELS.replace("num_clusters: 10", "num_clusters: 300"))
    (tmp_path / "tiny.yaml").write_text(COMPARISON)
    done = compare(tmp_path)
    assert done.returncode == 2
    assert "300 clusters of 200 images" in done.stdout
    assert "Traceback" not in done.stdout
