"""Methods that cluster before each epoch: a resumed epoch continues with the same clusters."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.support.faulted_run import LaunchResult, TinyRun

pytestmark = pytest.mark.timeout(600)
STAGE = """
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 4},
            method: {METHOD}, recipes: [RECIPES],
            optimizer: {kind: sgd, lr: 0.05}, epochs: 2, global_batch: 24}"""
METHODS = {
    "deepcluster": ("kind: deepcluster, num_clusters: 12, whiten_dim: 8, track: true", "digits", 1),
    "deepcluster_v2": (
        "kind: deepcluster_v2, num_clusters: 12, num_heads: 2, projection_dim: 8, hidden_dim: 16, "
        "track: true",
        "digits, digits",
        2,
    ),
}
"""Config, recipes and number of clusterings per epoch, by method."""
SAVE_AFTER_CLUSTERING_ONLY = "runtime.checkpoint_s=1e9"
STEP_IN_SECOND_EPOCH = 14  # of 2 x 10 steps


def stages(name: str) -> str:
    """The training stage of a method as YAML."""
    method, recipes, _ = METHODS[name]
    return STAGE.replace("METHOD", method).replace("RECIPES", recipes)


def count_clusterings(done: LaunchResult) -> int:
    """How often k-means has finished in all starts of the run, from its log."""
    lines = (done.folder / "logs" / "run.log").read_text().splitlines()
    return sum("k-means: " in line and "took" in line for line in lines)


def history(done: LaunchResult) -> np.ndarray:
    """The cluster of every image in every epoch, [epochs, N]."""
    with np.load(next(done.folder.glob("stages/pretext/*/history.npz"))) as arrays:
        return arrays["cluster"]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_after_clustering_resumes_with_the_same_clusters(
    name: str, tmp_path: Path
) -> None:
    per_epoch = METHODS[name][2]
    undisturbed = TinyRun(tmp_path / "undisturbed", stages(name))(SAVE_AFTER_CLUSTERING_ONLY)
    assert undisturbed.code == 0, undisturbed.output
    assert count_clusterings(undisturbed) == 2 * per_epoch
    done = TinyRun(tmp_path / "killed", stages(name))(
        SAVE_AFTER_CLUSTERING_ONLY,
        faults=[{"kind": "kill", "rank": 1, "step": STEP_IN_SECOND_EPOCH}],
    )
    assert done.code == 0, done.output
    assert done.output.count("starting again") == 1
    assert count_clusterings(done) == 2 * per_epoch
    assert done.losses() == undisturbed.losses()
    assert done.weights() == undisturbed.weights()
    assert np.array_equal(history(done), history(undisturbed))
    first_epoch, second_epoch = history(done)
    assert not np.array_equal(first_epoch, second_epoch)


def test_a_run_resumed_on_three_ranks_instead_of_two_does_not_cluster_again(
    tmp_path: Path,
) -> None:
    run = TinyRun(tmp_path, stages("deepcluster"))
    fault = {"kind": "signal", "rank": 1, "step": STEP_IN_SECOND_EPOCH, "signal": "SIGTERM"}
    stopped = run(SAVE_AFTER_CLUSTERING_ONLY, faults=[fault])
    assert stopped.code == 128 + signal.SIGTERM, stopped.output
    assert count_clusterings(stopped) == 2
    done = run(SAVE_AFTER_CLUSTERING_ONLY, processes=3)
    assert done.code == 0, done.output
    assert "pretext: resumes" in done.output
    assert count_clusterings(done) == 2
    assert set(done.losses()) == set(range(1, 21))
    assert (history(done) >= 0).all()
