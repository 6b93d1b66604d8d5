"""A method that clusters before each epoch: resumed in the epoch, it does not cluster again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.fault_checks import assert_equal_runs
from tests.support.faulted_run import LaunchResult, TinyRun

pytestmark = pytest.mark.timeout(600)
STAGE = """
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 4},
            method: {METHOD}, recipes: [RECIPES],
            optimizer: {kind: sgd, lr: 0.05}, epochs: 2, global_batch: 24}"""
DEEPCLUSTER = STAGE.replace(
    "METHOD", "kind: deepcluster, num_clusters: 12, whiten_dim: 8, track: true"
).replace("RECIPES", "digits")
DEEPCLUSTER_V2 = STAGE.replace(
    "METHOD",
    "kind: deepcluster_v2, num_clusters: 12, num_heads: 2, projection_dim: 8, hidden_dim: 16, "
    "track: true",
).replace("RECIPES", "digits, digits")
NO_TIMED_SAVES = "runtime.checkpoint_s=1e9"
"""The only checkpoints are then those after the clustering."""
STEP_IN_SECOND_EPOCH = 14  # of 2 x 10 steps


def num_clusterings(result: LaunchResult) -> int:
    """How often k-means has finished, over all starts of the run."""
    lines = (result.folder / "logs" / "run.log").read_text().splitlines()
    return sum("k-means: " in line and "took" in line for line in lines)


def history(result: LaunchResult) -> np.ndarray:
    """The clusters [epochs, N] that the method has recorded."""
    with np.load(next(result.folder.glob("stages/pretext/*/history.npz"))) as arrays:
        return arrays["cluster"]


@pytest.mark.parametrize(
    ("stages", "num_heads"),
    [(DEEPCLUSTER, 1), (DEEPCLUSTER_V2, 2)],
    ids=["deepcluster", "deepcluster_v2"],
)
def test_killed_after_clustering_it_continues_with_the_same_clusters(
    stages: str, num_heads: int, tmp_path: Path
) -> None:
    expected = TinyRun(tmp_path / "undisturbed", stages)(NO_TIMED_SAVES)
    assert expected.code == 0, expected.output
    assert num_clusterings(expected) == 2 * num_heads
    kill = {"kind": "kill", "rank": 1, "step": STEP_IN_SECOND_EPOCH}
    result = TinyRun(tmp_path / "killed", stages)(NO_TIMED_SAVES, faults=[kill])
    assert_equal_runs(result, expected)
    assert result.output.count("starting again") == 1
    assert num_clusterings(result) == 2 * num_heads
    assert np.array_equal(history(result), history(expected))
    assert not np.array_equal(*history(expected)), "the epochs have different clusters"


def test_resumed_by_three_ranks_instead_of_two_it_does_not_cluster_again(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, DEEPCLUSTER)
    stop = {"kind": "signal", "rank": 1, "step": STEP_IN_SECOND_EPOCH, "signal": "SIGTERM"}
    stopped = run(NO_TIMED_SAVES, faults=[stop])
    assert stopped.code == 128 + 15, stopped.output
    assert num_clusterings(stopped) == 2
    result = run(NO_TIMED_SAVES, processes=3)
    assert result.code == 0, result.output
    assert "pretext: resumes" in result.output
    assert num_clusterings(result) == 2
    assert set(result.losses()) == set(range(1, 21))
    assert (history(result) >= 0).all()
