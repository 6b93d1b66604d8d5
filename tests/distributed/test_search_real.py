"""Search on real features: MoCo's, of ImageNet-50's validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_features import clusterings
from dist_scan.data.feature_table import FeatureTable
from dist_scan.evaluate.metrics import neighbour_purity
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import KMeansOptions
from tests.support.feature_tables import write_table
from tests.support.shared_data import shared_data


@pytest.fixture
def real_features(tmp_path: Path) -> tuple[FeatureTable, np.ndarray]:
    """(features, labels [N])."""
    with np.load(shared_data("imagenet50-val-moco128.npz")) as data:
        return write_table(data["features"], tmp_path / "features"), data["labels"]


def test_purity_of_neighbours_is_as_measured(
    real_features: tuple[FeatureTable, np.ndarray], tmp_path: Path
) -> None:
    table, labels = real_features
    neighbours = search_neighbours(table, tmp_path / "neighbours", 20)
    ids, _ = neighbours.rows(np.arange(len(labels)))
    purity = [round(neighbour_purity(ids, labels, k), 3) for k in (1, 5, 20)]
    assert purity == [0.792, 0.754, 0.686]


def test_kmeans_finds_the_classes_as_well_as_measured(
    real_features: tuple[FeatureTable, np.ndarray],
) -> None:
    """docs/search.md: an accuracy of 0.71, with a standard deviation of 0.02 over seeds."""
    options = KMeansOptions(spherical=True, restarts=3)
    accuracy = clusterings(*real_features, 3, options)[:, 0]
    assert 0.66 < accuracy.mean() < 0.76
