"""The clusters that a training kept for every round meet the labels: one NMI a round, rounds without clusters left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from dist_scan.data.assignments import save_history
from dist_scan.stages.evaluate import EvaluateConfig, EvaluateStage


def history(folder, labels):
    stage = EvaluateStage(
        EvaluateConfig(subjects={"found": "training"}),
        SimpleNamespace(inputs={"subjects.found": folder}),
    )
    return stage._history("found", labels).get("history")


def test_each_round_is_scored_over_the_images_it_has(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, cluster = rng.integers(0, 3, 200), rng.integers(0, 5, (200, 4))
    cluster[:, 1] = 4 * labels % 5  # a renaming: it agrees wholly
    cluster[:, 2] = -1  # a round that came to nothing
    cluster[:50, 3] = -1
    labels[7] = -1
    save_history(tmp_path, np.arange(4) * 2, cluster)
    found, known = history(tmp_path, labels), labels >= 0
    assert found["epoch"] == [0, 2, 6] and found["nmi"][1] == pytest.approx(1)
    for round_, value, rows in (
        (0, found["nmi"][0], known),
        (3, found["nmi"][2], known & (cluster[:, 3] >= 0)),
    ):
        assert value == pytest.approx(
            normalized_mutual_info_score(
                labels[rows], cluster[rows, round_], average_method="geometric"
            )
        )


def test_without_labels_or_history_there_is_none(tmp_path: Path) -> None:
    assert history(tmp_path, np.zeros(5, int)) is None
    save_history(tmp_path, np.arange(1), np.zeros((5, 1)))
    assert (
        history(tmp_path, np.full(5, -1)) is None
        and history(tmp_path, np.zeros(5, int)) is not None
    )
