"""SCAN's and TEMI's heads through the pipeline: several numbers of clusters, consensus, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_scan.config import ConfigError
from dist_scan.data.assignments import Assignments
from dist_scan.run_config import load_config
from tests.support.pipelines import run_pipeline

CONFIG = """
data:
  train: {source: "sklearn:digits", limit: 300}
  size: 8
  stored: raw
  resolution: 8
  mean: [0.3, 0.3, 0.3]
  std: [0.35, 0.35, 0.35]
stages:
  pixels: {kind: embed, pixels: true, num_shards: 2}
  neighbours: {kind: neighbours, features: pixels, num_neighbours: 5}
  heads:
    kind: train
    features: pixels
    network: {name: pixels}
    neighbours: neighbours
    method: {kind: scan, num_clusters: [10, 20], num_heads: 3}
    optimizer: {lr: 0.05}
    epochs: 12
    global_batch: 100
    held_out_share: 0.3
  temi:
    kind: train
    features: pixels
    network: {name: pixels}
    neighbours: neighbours
    method: {kind: temi, num_clusters: 10, num_heads: 3, temperature: 1.0, teacher_momentum: 0.9}
    optimizer: {kind: adam, lr: 0.01}
    epochs: 12
    global_batch: 100
    held_out_share: 0.3
  consensus: {kind: consensus, model: heads, features: pixels}
  consensus20: {kind: consensus, model: heads, features: pixels, num_clusters: 20}
  fourth: {kind: consensus, model: heads, features: pixels, head: 4}
  temi_consensus: {kind: consensus, model: temi, features: pixels}
  temi_chosen: {kind: assign, model: temi, features: pixels}
  evaluate:
    kind: evaluate
    heads: heads
    subjects:
      temi_consensus: temi_consensus
      consensus: consensus
      consensus20: consensus20
      fourth: fourth
      temi: temi_chosen
  report: {kind: report, evaluate: evaluate, best: consensus}
"""
HELD_OUT_FEATURES_FOR_IMAGES = """stages.heads={
  kind: train, images: train, network: {name: pixels}, neighbours: neighbours,
  method: {kind: scan, num_clusters: 10, normalise: l2}, optimizer: {lr: 1.0},
  epochs: 1, global_batch: 100, held_out_share: 0.3, held_out_features: pixels}"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config's file."""
    path = tmp_path / "heads.yaml"
    path.write_text(CONFIG)
    return path


def test_the_report_evaluates_every_head_and_the_consensus(config: Path, tmp_path: Path) -> None:
    folders, lines = run_pipeline(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    heads = report["heads"]["heads"]
    assert [head["num_clusters"] for head in heads] == [10, 10, 10, 20, 20, 20]
    assert sum(head["selected"] for head in heads) == 2, "one for each number of clusters"
    for head in heads:
        assert 0.2 < head["acc"] < 1
        assert -1 <= head["stability"] <= 1
        assert head["held_out_loss"] is not None
    assert "many_to_one" in heads[4]
    assert report["fourth"]["num_clusters"] == 20
    assert report["fourth"]["acc"] == heads[4]["acc"]
    assert report["consensus"]["acc"] > 0.5
    assert report["temi"]["acc"] > 0.4
    assert report["temi_consensus"]["acc"] > 0.4
    assert Assignments.load(folders["consensus20"]).cluster.max() < 20
    assert "stability" in (tmp_path / "run" / "report.html").read_text().lower()
    assert "pixels: 300 images x 1 view x 192 in float16: 0.000107 GiB in 2 shards" in lines
    cached = [line for line in lines if "features of 300 images x 1 views x 192" in line]
    assert len(cached) == 2 and all("read from host memory" in line for line in cached)
    assert not [line for line in lines if line.startswith("warning")]


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.consensus.num_clusters=30", "allowed: 10, 20"),
        ("stages.consensus.head=6", "allowed: 0 to 5"),
        ("stages.consensus.model=neighbours", "publishes no model"),
        ("stages.heads.method.num_clusters=1", "at least 2"),
        ("stages.heads.method.num_clusters=[10, 1]", "at least 2"),
        ("stages.heads.method.num_clusters=[]", "at least 2"),
        (HELD_OUT_FEATURES_FOR_IMAGES, "selects heads on images too; give held_out_images"),
    ],
)
def test_invalid_heads_are_refused_before_any_work(
    config: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, [override])


def test_a_share_that_holds_out_no_image_is_refused(config: Path, tmp_path: Path) -> None:
    message = (
        "stages.heads.held_out_share: 1e-06 of 300 images holds out none; "
        "allowed: 0, or enough.*0.33"
    )
    with pytest.raises(ValueError, match=message):
        run_pipeline(config, tmp_path / "run", "stages.heads.held_out_share=1e-6")
