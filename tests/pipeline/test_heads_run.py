"""Heads through the pipeline, in this process: several numbers of clusters, TEMI on the same bank, the consensus, every head in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_scan.config import ConfigError
from dist_scan.data.assignments import Assignments
from dist_scan.engine.stop import StopFlag
from dist_scan.pipeline import Pipeline
from dist_scan.run_config import load_config
from dist_scan.world.world import current

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
  heads: &heads
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
    method: {kind: temi, num_clusters: 10, num_heads: 3, temperature: 1.0, momentum: 0.9}
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
    subjects: {temi_consensus: temi_consensus, consensus: consensus, consensus20: consensus20, fourth: fourth, temi: temi_chosen}
  report: {kind: report, evaluate: evaluate, best: consensus}
"""


def config(tmp_path: Path, *overrides):
    path = tmp_path / "heads.yaml"
    path.write_text(CONFIG.replace("&heads", ""))
    return load_config(path, [f"runtime.run_dir={tmp_path / 'run'}", *overrides])


def test_heads_of_several_numbers_and_temi_are_evaluated_one_by_one(tmp_path: Path) -> None:
    run = config(tmp_path)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    said: list[str] = []
    folders = Pipeline(run, current(), StopFlag(), said.append).run()
    assert "pixels: 300 images x 1 view x 192 in float16: 0.000107 GiB in 2 shards" in said
    assert (
        sum(
            "features of 300 images x 1 views x 192" in line and "read from host memory" in line
            for line in said
        )
        == 2
    )
    assert not [line for line in said if line.startswith("warning")]
    facts = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = facts["heads"]["heads"]
    assert [r["num_clusters"] for r in rows] == [10] * 3 + [20] * 3 and sum(
        r["chosen"] for r in rows
    ) == 2
    for row in rows:
        assert (
            0.2 < row["acc"] < 1
            and -1 <= row["stability"] <= 1
            and row["held_out_loss"] is not None
        )
    assert facts["fourth"]["num_clusters"] == 20 and facts["fourth"]["acc"] == rows[4]["acc"]
    assert (
        facts["consensus"]["acc"] > 0.5
        and facts["temi"]["acc"] > 0.4
        and facts["temi_consensus"]["acc"] > 0.4
    )
    assert "many_to_one" in rows[4] and Assignments.load(folders["consensus20"]).cluster.max() < 20
    assert "stability" in (tmp_path / "run" / "report.html").read_text().lower()


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.consensus.num_clusters=30", "allowed: 10, 20"),
        ("stages.consensus.head=6", "allowed: 0 to 5"),
        ("stages.consensus.model=neighbours", "publishes no model"),
        ("stages.heads.method.num_clusters=1", "at least 2"),
        ("stages.heads.method.num_clusters=[10, 1]", "at least 2"),
        ("stages.heads.method.num_clusters=[]", "at least 2"),
        (
            "stages.heads={kind: train, images: train, network: {name: pixels}, neighbours: neighbours, method: {kind: scan, num_clusters: 10, normalise: l2},"
            " optimizer: {lr: 1.0}, epochs: 1, global_batch: 100, held_out_share: 0.3, held_out_features: pixels}",
            "selects heads on images too; give held_out_images",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, override)


def test_a_share_that_holds_out_nothing_is_refused(tmp_path: Path) -> None:
    run = config(tmp_path, "stages.heads.held_out_share=1e-6")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    with pytest.raises(
        ValueError,
        match="stages.heads.held_out_share: 1e-06 of 300 images holds out none; allowed: 0, or enough.*0.33",
    ):
        Pipeline(run, current(), StopFlag(), lambda text: None).run()
