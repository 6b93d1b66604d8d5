"""The k-means stage with whitening: directions of small variance count as much as the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_scan.config import DataConfig, RunConfig, SplitConfig
from dist_scan.data.assignments import Assignments
from dist_scan.data.feature_table import FeatureTable
from dist_scan.engine.stop import StopFlag
from dist_scan.search.agreement import assignment_nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.options import KMeansOptions
from dist_scan.search.whiten import fit_whitening, write_whitened_table
from dist_scan.stages.base import Context
from dist_scan.stages.kmeans import KMeansConfig, KMeansStage
from dist_scan.storage.artifacts import WORK
from dist_scan.world.world import World
from tests.support.feature_tables import write_table

SEED = 3
RUN = RunConfig(
    name="kmeans", seed=SEED, data=DataConfig(train=SplitConfig(source="none")), stages={}
)
UNIT_TRIANGLE = np.array([[0, 1], [0.87, -0.5], [-0.87, -0.5]])


@pytest.fixture
def grouped(tmp_path: Path) -> tuple[FeatureTable, np.ndarray]:
    """(features of 300 rows, their group).

    Three groups differ in two directions of small variance; two of large variance are noise.
    """
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 300)
    small = 0.05 * UNIT_TRIANGLE[group] + 0.005 * rng.standard_normal((300, 2))
    large = 3 * rng.uniform(-1, 1, (300, 2))
    return write_table(np.concatenate([large, small], 1), tmp_path / "features"), group


def run_stage(folder: Path, config: KMeansConfig) -> np.ndarray:
    """The cluster of each row."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    context = Context(
        run=RUN,
        name="kmeans",
        out=out,
        inputs={"features": folder / "features"},
        world=World(),
        stop=StopFlag(),
        log=print,
        folders={},
    )
    KMeansStage(config, context).run()
    return Assignments.load(out).cluster


def test_whitening_finds_groups_in_directions_of_small_variance(
    grouped: tuple[FeatureTable, np.ndarray], tmp_path: Path
) -> None:
    features, group = grouped
    plain = run_stage(tmp_path, KMeansConfig(features="features", num_clusters=3))
    white = run_stage(
        tmp_path, KMeansConfig(features="features", num_clusters=3, whiten_dim=4, restarts=20)
    )
    assert assignment_nmi(white, group) > assignment_nmi(plain, group) + 0.3
    whitened = write_whitened_table(features, fit_whitening(features, 4), tmp_path / "white")
    options = KMeansOptions(restarts=20, seed=SEED, normalise=True)
    assert np.array_equal(white, kmeans(whitened, 3, options).assignment)
    folder = tmp_path / "out" / WORK / "whitened"
    assert folder.is_dir(), "in the work folder, which is removed when the stage is finished"


def test_more_whitened_dimensions_than_features_are_an_error(
    grouped: tuple[FeatureTable, np.ndarray], tmp_path: Path
) -> None:
    config = KMeansConfig(features="features", num_clusters=3, whiten_dim=5)
    with pytest.raises(ValueError, match="5 whitened dimensions of 4; allowed: 1 to 4"):
        run_stage(tmp_path, config)


def test_whitened_rows_always_have_unit_length() -> None:
    config = KMeansConfig(features="features", num_clusters=3, whiten_dim=2, normalise=False)
    with pytest.raises(ValueError, match="stages.x.normalise: false, but whitened rows have unit"):
        config.check_settings("x", {})
