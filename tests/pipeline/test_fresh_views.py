"""SCAN's heads on images, augmented and sent through the network at every step as published, against the cached bank: with views that are the
same the two are one training, up to float16's rounding of what is cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dist_scan.engine.stop import StopFlag
from dist_scan.monitoring.log import read_rows
from dist_scan.pipeline import Pipeline
from dist_scan.run_config import load_config
from dist_scan.world.world import current

HEADS = """{{kind: train, {source}, backbone: pretext, neighbours: neighbours, method: {{kind: scan, num_clusters: 10, num_heads: 3, normalise: l2{more}}},
    optimizer: {{lr: 2.0}}, epochs: 5, global_batch: 60, held_out_share: 0.3}}"""
CONFIG = f"""
data: {{train: {{source: "sklearn:digits", limit: 300}}, size: 16, resolution: 16, stored: raw}}
stages:
  pretext: {{kind: train, images: train, network: {{name: resnet_small, width: 4}}, method: {{kind: simclr, projection_dim: 8}}, recipes: [digits, digits], optimizer: {{lr: 0.3}},
             epochs: 8, global_batch: 100}}
  bank: {{kind: embed, backbone: pretext, num_shards: 2}}
  neighbours: {{kind: neighbours, features: bank, num_neighbours: 5}}
  cached: {HEADS.format(source="features: bank", more="")}
  fresh: {HEADS.format(source="images: train, recipes: [center, center]", more=", train_backbone: false")}
  augmented: {HEADS.format(source="images: train, recipes: [digits, digits]", more=", train_backbone: false")}
runtime: {{log_every: 1}}
"""


def test_fresh_views_equal_cached_ones_when_the_views_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "fresh.yaml").write_text(CONFIG)
    run = load_config(tmp_path / "fresh.yaml", [f"runtime.run_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "logs").mkdir(parents=True)
    folders = Pipeline(run, current(), StopFlag(), lambda text: None).run()
    losses, weights = {}, {}
    for name in ("cached", "fresh", "augmented"):
        rows = [
            r for r in read_rows(tmp_path / "run" / "logs" / f"{name}.metrics.jsonl") if "loss" in r
        ]
        losses[name] = np.array([r["loss"] for r in rows])
        files = list(folders[name].rglob("*.safetensors"))
        weights[name] = {
            key: value
            for file in files
            for key, value in load_file(file).items()
            if "weight" in key and value.shape[0] == 10
        }
    assert len(losses["cached"]) == 15 and np.ptp(losses["cached"]) > 0.01, "something was learnt"
    apart = {
        name: float(np.abs(losses[name] - losses["cached"]).max())
        for name in ("fresh", "augmented")
    }
    assert apart["fresh"] < 2e-4, (losses["fresh"], losses["cached"])
    assert apart["augmented"] > 10 * apart["fresh"], f"another view is another loss: {apart}"
    assert weights["fresh"] and all(
        np.allclose(value, weights["cached"][key], atol=2e-3)
        for key, value in weights["fresh"].items()
    )
