"""The k-means stage whitens when it is asked to: directions of little variance count as much as the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dist_scan.data.assignments import Assignments
from dist_scan.search.agreement import assignment_nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.options import KMeansOptions
from dist_scan.search.whiten import fit_whitening, write_whitened_table
from dist_scan.stages.kmeans import KMeansConfig, KMeansStage
from dist_scan.storage.artifacts import WORK
from tests.distributed.test_search import table


@pytest.fixture
def hidden(tmp_path: Path):
    """(table of 300 rows, their group): three groups apart in two small directions, beside two large ones that mean nothing."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 300)
    small = 0.05 * np.array([[0, 1], [0.87, -0.5], [-0.87, -0.5]])[
        group
    ] + 0.005 * rng.standard_normal((300, 2))
    return table(
        np.concatenate([3 * rng.uniform(-1, 1, (300, 2)), small], 1), tmp_path / "features"
    ), group


def clustered(folder, **settings) -> np.ndarray:
    context = SimpleNamespace(
        out=folder / "out",
        inputs={"features": folder / "features"},
        run=SimpleNamespace(seed=3),
        world=SimpleNamespace(rank=0),
        stop=SimpleNamespace(requested=False),
    )
    context.out.mkdir(exist_ok=True)
    KMeansStage(KMeansConfig(features="features", num_clusters=3, **settings), context).run()
    return Assignments.load(context.out).cluster


def test_whitening_finds_groups_in_small_directions(hidden, tmp_path: Path) -> None:
    features, group = hidden
    plain, white = clustered(tmp_path), clustered(tmp_path, whiten_dim=4, restarts=20)
    assert assignment_nmi(white, group) > assignment_nmi(plain, group) + 0.3
    made = write_whitened_table(features, fit_whitening(features, 4), tmp_path / "white")
    assert np.array_equal(
        white, kmeans(made, 3, KMeansOptions(restarts=20, seed=3, normalise=True)).assignment
    )
    assert (tmp_path / "out" / WORK / "whitened").is_dir(), (
        "beside what is published: it goes with the stage's work"
    )


def test_whitening_that_cannot_be_is_refused(hidden, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 whitened dimensions of 4; allowed: 1 to 4"):
        clustered(tmp_path, whiten_dim=5)
    with pytest.raises(
        ValueError, match="stages.x.normalise: false, but whitened rows get unit length"
    ):
        KMeansConfig(features="features", num_clusters=3, whiten_dim=2, normalise=False).check(
            "x", None, {}
        )
