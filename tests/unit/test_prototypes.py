"""Prototypes against their definition, one cluster at a time."""

from __future__ import annotations

import numpy as np

from dist_scan.evaluate.prototypes import find_prototypes, low_confidence


def test_prototypes_follow_the_definition() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.integers(-1, 5, 200)
    probability = rng.random(200)
    x = rng.normal(size=(200, 4)) * 3
    cluster[cluster == 3] = 2
    calls = []

    def features(rows: np.ndarray) -> np.ndarray:
        calls.append(rows)
        return x[rows]

    found = find_prototypes(cluster, probability, features, 6)
    assert sorted(found) == [0, 1, 2, 4]
    assert len(calls) == 4
    for c, rows in found.items():
        members = [i for i in range(200) if cluster[i] == c]
        best = sorted(members, key=lambda i: -probability[i])[:10]
        mean = x[best].mean(axis=0)
        assert rows[0] == min(best, key=lambda i: np.linalg.norm(x[i] - mean))
        assert sorted(rows) == sorted(best)
        assert rows[1:] == [i for i in best if i != rows[0]]
    selected = find_prototypes(cluster, probability, features, 6, only=np.array([1, 3]))
    assert selected == {1: found[1]}


def test_a_small_cluster_uses_only_its_own_images() -> None:
    cluster = np.array([0, 1, 1, 0, 2])
    probability = np.array([0.9, 0.2, 0.8, 0.7, 0.3])
    found = find_prototypes(cluster, probability, lambda rows: np.ones((len(rows), 2)), 3)
    assert {c: sorted(rows) for c, rows in found.items()} == {0: [0, 3], 1: [1, 2], 2: [4]}


def test_low_confidence_images_come_least_confident_first() -> None:
    cluster, probability = np.array([0, 1, 0, 0, 1]), np.array([0.5, 0.9, 0.1, 0.3, 0.9])
    assert low_confidence(cluster, probability, 2) == {0: [2, 3], 1: [1, 4]}
    assert low_confidence(np.zeros(0, int), np.zeros(0), 2) == {}
