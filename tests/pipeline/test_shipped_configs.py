"""Every shipped config runs for a few steps, at a reduced scale by overrides alone, on real photographs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.support.launches import ROOT, run

CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.yaml") if not p.stem.startswith("compare_")
)
COMPARISONS = sorted((ROOT / "configs").glob("compare_*.yaml"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of scikit-learn's two photographs as an image folder with two classes: train (24) and val (16)."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 16)):
        for i in range(count):
            picture = load_sample_images().images[i % 2]
            top, left = (
                rng.integers(0, picture.shape[0] - 120),
                rng.integers(0, picture.shape[1] - 160),
            )
            folder = root / split / ("china", "flower")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(picture[top : top + 120, left : left + 160]).save(
                buffer, "JPEG", quality=90
            )
            (folder / f"{i:03d}.jpg").write_bytes(buffer.getvalue())
    return root


def reduced(name: str, photographs: Path) -> list[str]:
    """Overrides that make a config small; what a user would type for a trial."""
    from dist_scan.run_config import load_config

    out = [
        f"data.train.source={photographs / 'train'}",
        f"data.val.source={photographs / 'val'}",
        "data.size=24",
        "data.resolution=30",
    ]
    for stage, config in load_config(ROOT / "configs" / f"{name}.yaml").stages.items():
        at = f"stages.{stage}"
        if config.kind == "train":
            out += [
                f"{at}.epochs=1",
                f"{at}.steps_per_epoch=2",
                f"{at}.global_batch=8",
                f"{at}.precision=fp32",
            ]
            if config.num_neighbours:
                out += [f"{at}.num_neighbours={min(5, config.num_neighbours)}"]
            if config.features is not None:
                out += [
                    f"{at}.optimizer.lr=0.1"
                ]  # the recipe's belongs to the features of a trained network
            if config.network is not None:
                out += [
                    f"{at}.network.name=resnet18",
                    f"{at}.optimizer.lr=0.01",
                ]  # the recipe's is for batches a hundred times as large
            if hasattr(config.method, "whiten_dim"):
                out += [f"{at}.method.whiten_dim=8"]
            if hasattr(config.method, "queue_size"):
                out += [f"{at}.method.queue_size=32", f"{at}.method.bn_groups=2"]
        if config.kind == "probe":
            out += [
                f"{at}.epochs=1",
                f"{at}.steps_per_epoch=2",
                f"{at}.global_batch=8",
                f"{at}.layers=[layer1, features]",
            ]
        if config.kind == "embed":
            out += [f"{at}.num_shards=2", f"{at}.precision=fp32"] + (
                [f"{at}.views=2"] if config.views > 1 else []
            )
        if config.kind == "neighbours":
            out += [f"{at}.num_neighbours=5"]
        if hasattr(config, "num_clusters"):
            out += [f"{at}.num_clusters=4"]
        if hasattr(getattr(config, "method", None), "num_clusters"):
            out += [f"{at}.method.num_clusters=4"]
    return out


@pytest.mark.parametrize(
    "name", [c for c in CONFIGS if c != "quickstart" and not c.endswith("_digits")]
)
def test_it_runs_for_a_few_steps(name, photographs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(folder, *reduced(name, photographs), config=name)
    assert done.returncode == 0, done.stdout[-4000:]
    facts = json.loads((folder / "report.json").read_text())
    assert (
        facts["num_images"] in (16, 24)
        and 0 <= facts[facts["best"]]["acc"] <= 1
        and (folder / "report.html").exists()
    )


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_a_comparison_names_configs_and_subjects_that_are_there(path, tmp_path: Path) -> None:
    from dist_scan.compare.config import read_comparison
    from dist_scan.compare.runs import check_same_data, plan_runs

    comparison = read_comparison(path)
    runs = plan_runs(comparison, path.parent, tmp_path)
    check_same_data(runs, tmp_path)
    assert len(runs) == len(comparison.seeds) * len(comparison.members)
