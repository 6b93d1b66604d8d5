"""Prototypes against the definition, one cluster at a time."""

from __future__ import annotations

import numpy as np

from dist_scan.evaluate.prototypes import find_prototypes, low_confidence


def test_prototypes_are_the_definition() -> None:
    rng = np.random.default_rng(0)
    cluster, probability, x = (
        rng.integers(-1, 5, 200),
        rng.random(200),
        rng.normal(size=(200, 4)) * 3,
    )
    cluster[cluster == 3] = 2
    asked = []
    found = find_prototypes(cluster, probability, lambda rows: asked.append(rows) or x[rows], 6)
    assert sorted(found) == [0, 1, 2, 4] and len(asked) == 4
    assert find_prototypes(
        cluster, probability, lambda rows: x[rows], 6, only=np.array([1, 3])
    ) == {1: found[1]}
    for c, rows in found.items():
        members = [i for i in range(200) if cluster[i] == c]
        best = sorted(members, key=lambda i: -probability[i])[:10]
        mean = x[best].mean(axis=0)
        assert rows[0] == min(best, key=lambda i: np.linalg.norm(x[i] - mean))
        assert sorted(rows) == sorted(best) and rows[1:] == [i for i in best if i != rows[0]]


def test_a_small_cluster_uses_only_its_own() -> None:
    cluster = np.array([0, 1, 1, 0, 2])
    found = find_prototypes(
        cluster, np.array([0.9, 0.2, 0.8, 0.7, 0.3]), lambda rows: np.ones((len(rows), 2)), 3
    )
    assert {c: sorted(rows) for c, rows in found.items()} == {0: [0, 3], 1: [1, 2], 2: [4]}


def test_low_confidence_is_least_first() -> None:
    cluster, probability = np.array([0, 1, 0, 0, 1]), np.array([0.5, 0.9, 0.1, 0.3, 0.9])
    assert low_confidence(cluster, probability, 2) == {0: [2, 3], 1: [1, 4]}
    assert low_confidence(np.zeros(0, int), np.zeros(0), 2) == {}
