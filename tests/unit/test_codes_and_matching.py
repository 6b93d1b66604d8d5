"""MMDC's codes and the matching of targets to outputs, against slow, obvious versions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dist_scan.models.sphere_codes import SphereCodes
from dist_scan.search.matching import match_blocks, match_clusters


def normalise(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_one_hot_codes_without_variance_are_the_means() -> None:
    codes = SphereCodes(500, 7, 7, "one_hot", 0.0, seed=3)
    ids = np.arange(507)
    assert np.array_equal(codes.codes(ids), np.eye(7)[codes.component(ids)])
    sizes = np.bincount(codes.component(ids[:500]), minlength=7)
    assert sizes.min() > 40
    assert len(set(sizes)) > 1, "sizes are drawn, not equal"
    assert np.array_equal(codes.component(ids[500:]), np.arange(7))
    other_seed = SphereCodes(500, 7, 7, "one_hot", 0.0, seed=4)
    assert not np.array_equal(codes.component(ids), other_seed.component(ids))


def test_variance_is_that_of_the_noise_before_normalisation() -> None:
    codes = SphereCodes(20000, 2, 2, "one_hot", 0.0004, seed=0)
    ids = np.arange(20000)
    places, means = codes.codes(ids), np.eye(2)[codes.component(ids)]
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), 1)
    # Along the tangent, normalisation changes nothing to first order.
    across = (places * means[:, ::-1]).sum(1)
    assert across.std() == pytest.approx(0.02, rel=0.03)
    assert abs(across.mean()) < 6e-4
    np.testing.assert_allclose(codes.codes(20000 + np.arange(2)), np.eye(2))


def test_random_means_have_unit_length_in_any_dimension() -> None:
    codes = SphereCodes(10, 5, 16, "random", 0.0, seed=1)
    np.testing.assert_allclose(np.linalg.norm(codes.means, axis=1), 1)
    assert codes.codes(np.arange(10)).shape == (10, 16)
    assert len(np.unique(codes.means, axis=0)) == 5
    with pytest.raises(ValueError, match="allowed: 0..14"):
        codes.codes(np.array([15]))


def test_one_hot_means_need_a_dimension_each() -> None:
    with pytest.raises(ValueError, match="one-hot means; allowed: 5"):
        SphereCodes(10, 5, 16, "one_hot", 0.0, seed=1)


def smallest_cost(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Sum of distances under the best permutation, by trying all."""
    return min(
        sum(float(np.linalg.norm(o - targets[j])) for o, j in zip(outputs, permutation))
        for permutation in permutations(range(len(targets)))
    )


def test_matching_finds_the_best_permutation_inside_each_block() -> None:
    rng = np.random.default_rng(0)
    outputs, targets = normalise(rng.normal(size=(13, 3))), normalise(rng.normal(size=(13, 3)))
    order = match_blocks(outputs, targets, 5)
    for block in (slice(0, 5), slice(5, 10), slice(10, 13)):
        assert sorted(order[block]) == list(range(block.start, block.stop))
        cost = np.linalg.norm(outputs[block] - targets[order[block]], axis=1).sum()
        assert cost == pytest.approx(smallest_cost(outputs[block], targets[block]))


def test_the_cost_of_matching_is_the_distance_and_not_its_square() -> None:
    """Draws outputs and targets on a circle until the two costs want different permutations."""
    rng = np.random.default_rng(0)
    while True:
        outputs, targets = normalise(rng.normal(size=(2, 2))), normalise(rng.normal(size=(2, 2)))
        d = np.linalg.norm(outputs[:, None] - targets[None], axis=2)
        keep_by_distance = d[0, 0] + d[1, 1] < d[0, 1] + d[1, 0]
        keep_by_square = d[0, 0] ** 2 + d[1, 1] ** 2 < d[0, 1] ** 2 + d[1, 0] ** 2
        if keep_by_distance != keep_by_square:
            break
    expected = [0, 1] if keep_by_distance else [1, 0]
    assert match_blocks(outputs, targets, 2).tolist() == expected


def test_equal_targets_keep_the_order_of_their_rows() -> None:
    rng = np.random.default_rng(1)
    targets, outputs = np.eye(3)[rng.integers(0, 3, 40)], normalise(rng.normal(size=(40, 3)))
    order = match_blocks(outputs, targets, 40)
    for c in range(3):
        matched = order[targets[order][:, c] == 1]
        assert np.array_equal(matched, np.flatnonzero(targets[:, c] == 1))


def test_blocks_without_requested_rows_stay_as_they_are() -> None:
    rng = np.random.default_rng(2)
    outputs, targets = normalise(rng.normal(size=(20, 4))), normalise(rng.normal(size=(20, 4)))
    whole = match_blocks(outputs, targets, 8)
    part = match_blocks(outputs, targets, 8, range(7, 9))
    assert np.array_equal(part[:16], whole[:16])
    assert np.array_equal(part[16:], np.arange(16, 20))
    assert not np.array_equal(whole[16:], np.arange(16, 20))


def test_relabelled_clusters_have_the_numbers_of_the_previous_ones() -> None:
    rng = np.random.default_rng(3)
    previous = rng.integers(0, 6, 300)
    renamed = np.array([4, 2, 0, 5, 1, 3])[previous]
    changed = rng.choice(300, 40, replace=False)
    renamed[changed] = rng.integers(0, 6, 40)
    found = match_clusters(previous, renamed, 6)[renamed]
    unchanged = np.setdiff1d(np.arange(300), changed)
    assert np.array_equal(found[unchanged], previous[unchanged])
    pairs = np.unique(np.stack([renamed, found]), axis=1)
    assert np.array_equal(pairs[0], np.arange(6)), "a permutation of the numbers"
