"""Every shipped config runs for a few steps on photographs, made small by overrides alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from dist_scan.compare.config import read_comparison
from dist_scan.compare.runs import plan_runs, shared_data
from dist_scan.config import StageConfig
from dist_scan.run_config import load_config
from dist_scan.stages.embed import EmbedConfig
from dist_scan.stages.neighbours import NeighboursConfig
from dist_scan.stages.probe import ProbeConfig
from dist_scan.stages.train import TrainConfig
from tests.support.launches import ROOT, run

CONFIGS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("compare_")
)
COMPARISONS = sorted((ROOT / "configs").glob("compare_*.yaml"))
FEW_STEPS = {"epochs": 1, "steps_per_epoch": 2, "global_batch": 8}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of scikit-learn's two photographs in two classes: 24 for train, 16 for val."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 16)):
        for i in range(count):
            photograph = load_sample_images().images[i % 2]
            top = generator.integers(0, photograph.shape[0] - 120)
            left = generator.integers(0, photograph.shape[1] - 160)
            folder = root / split / ("china", "flower")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            crop = Image.fromarray(photograph[top : top + 120, left : left + 160])
            crop.save(buffer, "JPEG", quality=90)
            (folder / f"{i:03d}.jpg").write_bytes(buffer.getvalue())
    return root


def overrides_for_a_trial(name: str, photographs: Path) -> list[str]:
    """The overrides that make a config small."""
    overrides = [
        f"data.train.source={photographs / 'train'}",
        f"data.val.source={photographs / 'val'}",
        "data.size=24",
        "data.resolution=30",
    ]
    for stage, config in load_config(ROOT / "configs" / f"{name}.yaml").stages.items():
        overrides += [
            f"stages.{stage}.{setting}={value}" for setting, value in small_settings(config).items()
        ]
    return overrides


def small_settings(config: StageConfig) -> dict[str, object]:
    """Settings with which a stage runs for a few seconds."""
    if isinstance(config, TrainConfig):
        return small_training(config)
    if isinstance(config, ProbeConfig):
        return {**FEW_STEPS, "layers": "[layer1, features]"}
    if isinstance(config, EmbedConfig):
        views = {"views": 2} if config.views > 1 else {}
        return {"num_shards": 2, "precision": "fp32", **views}
    if isinstance(config, NeighboursConfig):
        return {"num_neighbours": 5}
    return {"num_clusters": 4} if "num_clusters" in type(config).model_fields else {}


def small_training(config: TrainConfig) -> dict[str, object]:
    """A few steps on a small network; learning rates for small batches."""
    settings: dict[str, object] = {**FEW_STEPS, "precision": "fp32"}
    if config.num_neighbours:
        settings["num_neighbours"] = min(5, config.num_neighbours)
    if config.features is not None:
        settings["optimizer.lr"] = 0.1
    if config.network is not None:
        settings["network.name"] = "resnet18"
        settings["optimizer.lr"] = 0.01
    small_method = {"whiten_dim": 8, "queue_size": 32, "num_clusters": 4}
    for setting, value in small_method.items():
        if setting in type(config.method).model_fields:
            settings[f"method.{setting}"] = value
    if "method.queue_size" in settings:
        settings["method.bn_groups"] = 2
    return settings


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name != "quickstart" and not name.endswith("_digits")]
)
def test_a_shipped_config_runs_for_a_few_steps(
    name: str, photographs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = run(folder, *overrides_for_a_trial(name, photographs), config=name)
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["num_images"] in (16, 24)
    assert 0 <= report[report["best"]]["acc"] <= 1
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_shipped_comparison_is_valid(path: Path, tmp_path: Path) -> None:
    comparison = read_comparison(path)
    runs = plan_runs(comparison, path.parent, tmp_path)
    shared_data(runs)
    assert len(runs) == len(comparison.seeds) * len(comparison.members)
