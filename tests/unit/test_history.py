"""NMI of the clusters that a training recorded in every epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from dist_scan.data.assignments import save_history
from dist_scan.stages.evaluate import history_scores


def test_each_epoch_is_scored_over_the_images_that_have_a_cluster(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    labels[7] = -1
    cluster = rng.integers(0, 5, (200, 4))
    cluster[:, 1] = 4 * labels % 5  # a renaming of the labels
    cluster[:, 2] = -1  # an epoch without clusters
    cluster[:50, 3] = -1
    save_history(tmp_path, np.arange(4) * 2, cluster)
    history = history_scores(tmp_path, labels)["history"]
    assert history["epoch"] == [0, 2, 6]
    assert history["nmi"][1] == pytest.approx(1)
    is_labelled = labels >= 0
    for column, score in ((0, history["nmi"][0]), (3, history["nmi"][2])):
        rows = is_labelled & (cluster[:, column] >= 0)
        expected = normalized_mutual_info_score(
            labels[rows], cluster[rows, column], average_method="geometric"
        )
        assert score == pytest.approx(expected)


def test_without_labels_or_history_there_are_no_scores(tmp_path: Path) -> None:
    labels = np.zeros(5, int)
    assert history_scores(tmp_path, labels) == {}
    save_history(tmp_path, np.arange(1), np.zeros((5, 1)))
    assert history_scores(tmp_path, np.full(5, -1)) == {}
    assert history_scores(tmp_path, labels) != {}
