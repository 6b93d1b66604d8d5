"""Search on real features: MoCo's, of ImageNet-50's validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_features import as_table, clusterings
from dist_scan.evaluate.metrics import neighbour_purity
from dist_scan.search.neighbours import mine_neighbours
from tests.support.shared_data import shared_data


@pytest.fixture
def real(tmp_path: Path):
    with np.load(shared_data("imagenet50-val-moco128.npz")) as data:
        return as_table(data["features"], tmp_path / "f"), data["labels"]


def test_the_purity_of_neighbours_is_what_was_seen(real, tmp_path: Path) -> None:
    table, labels = real
    ids = mine_neighbours(table, tmp_path / "n", 20).rows(np.arange(len(labels)))[0]
    assert [round(neighbour_purity(ids, labels, k), 3) for k in (1, 5, 20)] == [0.792, 0.754, 0.686]


def test_kmeans_finds_the_classes_about_as_well_as_was_seen(real) -> None:
    accuracy = clusterings(*real, 3, spherical=True, restarts=3)[:, 0]
    assert 0.66 < accuracy.mean() < 0.76  # docs/search.md: 0.71, 0.02 between seeds
