"""A method with a whole-set moment, killed in an epoch after it or asked to leave and taken up by other ranks: it does not cluster again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.faulted_run import LaunchResult, TinyRun

pytestmark = pytest.mark.timeout(600)
STAGE = """
  pretext: {kind: train, images: train, network: {name: resnet_small, width: 4}, method: {METHOD}, recipes: [RECIPES],
            optimizer: {kind: sgd, lr: 0.05}, epochs: 2, global_batch: 24}"""
METHODS = {
    "deepcluster": ("kind: deepcluster, num_clusters: 12, whiten_dim: 8, track: true", "digits", 1),
    "deepcluster_v2": (
        "kind: deepcluster_v2, num_clusters: 12, num_heads: 2, projection_dim: 8, hidden_dim: 16, track: true",
        "digits, digits",
        2,
    ),
}
ONLY_AFTER_THE_MOMENT = "runtime.checkpoint_s=1e9"
IN_THE_SECOND_EPOCH = 14  # of 2 x 10 steps


def stages(name: str) -> str:
    method, recipes, _ = METHODS[name]
    return STAGE.replace("METHOD", method).replace("RECIPES", recipes)


def clusterings(done: LaunchResult) -> int:
    """How often k-means came to its end, over all starts of the run (each says so in the run's log)."""
    return sum(
        "k-means: " in line and "took" in line
        for line in (done.folder / "logs" / "run.log").read_text().splitlines()
    )


def history(done: LaunchResult) -> np.ndarray:
    """[epochs, N] clusters."""
    with np.load(next(done.folder.glob("stages/pretext/*/history.npz"))) as kept:
        return kept["cluster"]


@pytest.mark.parametrize("name", METHODS)
def test_killed_after_the_moment_it_trains_on_with_the_same_clusters(name, tmp_path: Path) -> None:
    heads = METHODS[name][2]
    whole = TinyRun(tmp_path / "whole", stages(name))(ONLY_AFTER_THE_MOMENT)
    assert whole.code == 0 and clusterings(whole) == 2 * heads, whole.output
    done = TinyRun(tmp_path / "killed", stages(name))(
        ONLY_AFTER_THE_MOMENT, faults=[{"kind": "kill", "rank": 1, "step": IN_THE_SECOND_EPOCH}]
    )
    assert done.code == 0 and done.output.count("starting again") == 1, done.output
    assert clusterings(done) == 2 * heads, "it clustered again"
    assert done.losses() == whole.losses() and done.weights() == whole.weights(), (
        "not bit-identical"
    )
    assert np.array_equal(history(done), history(whole)) and not np.array_equal(*history(whole))


def test_taken_up_by_three_ranks_instead_of_two_it_does_not_cluster_again(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, stages("deepcluster"))
    asked = run(
        ONLY_AFTER_THE_MOMENT,
        faults=[{"kind": "signal", "rank": 1, "step": IN_THE_SECOND_EPOCH, "signal": "SIGTERM"}],
    )
    assert asked.code == 128 + 15 and clusterings(asked) == 2, asked.output
    done = run(ONLY_AFTER_THE_MOMENT, processes=3)
    assert done.code == 0 and "pretext: resumes" in done.output and clusterings(done) == 2, (
        done.output
    )
    assert set(done.losses()) == set(range(1, 21)) and (history(done) >= 0).all()
