"""SCAN's heads on images, as published, against heads on cached features.

If all views are the same, both trainings are equal up to the float16 rounding of the cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dist_scan.monitoring.log import read_rows
from tests.support.pipelines import run_pipeline

CONFIG = """
data: {train: {source: "sklearn:digits", limit: 300}, size: 16, resolution: 16, stored: raw}
stages:
  pretext:
    kind: train
    images: train
    network: {name: resnet_small, width: 4}
    method: {kind: simclr, projection_dim: 8}
    recipes: [digits, digits]
    optimizer: {lr: 0.3}
    epochs: 8
    global_batch: 100
  bank: {kind: embed, backbone: pretext, num_shards: 2}
  neighbours: {kind: neighbours, features: bank, num_neighbours: 5}
runtime: {log_every: 1}
"""
HEADS = """
kind: train, backbone: pretext, neighbours: neighbours, optimizer: {lr: 2.0}, epochs: 5,
global_batch: 60, held_out_share: 0.3,
method: {kind: scan, num_clusters: 10, num_heads: 3, normalise: l2, train_backbone: false}
"""
SOURCES = {
    "cached": "features: bank",
    "fresh": "images: train, recipes: [center, center]",
    "augmented": "images: train, recipes: [digits, digits]",
}


def head_weights(folder: Path) -> dict[str, np.ndarray]:
    """The published weights of the heads, by name."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        tensors |= load_file(file)
    return {
        name: value for name, value in tensors.items() if "weight" in name and value.shape[0] == 10
    }


def test_heads_on_images_equal_heads_on_cached_features_of_the_same_views(tmp_path: Path) -> None:
    config, run = tmp_path / "fresh.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    stages = [f"stages.{name}={{{source}, {HEADS}}}" for name, source in SOURCES.items()]
    folders, _ = run_pipeline(config, run, *stages)
    losses = {}
    for name in SOURCES:
        rows = read_rows(run / "logs" / f"{name}.metrics.jsonl")
        losses[name] = np.array([row["loss"] for row in rows if "loss" in row])
    assert len(losses["cached"]) == 15
    assert np.ptp(losses["cached"]) > 0.01, "nothing was learnt"
    difference = {
        name: float(np.abs(losses[name] - losses["cached"]).max())
        for name in ("fresh", "augmented")
    }
    assert difference["fresh"] < 2e-4, (losses["fresh"], losses["cached"])
    assert difference["augmented"] > 10 * difference["fresh"], difference
    fresh, cached = head_weights(folders["fresh"]), head_weights(folders["cached"])
    assert fresh
    for name, value in fresh.items():
        assert np.allclose(value, cached[name], atol=2e-3), name
