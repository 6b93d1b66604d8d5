"""MMDC's codes and the matching of targets to outputs, against slow, obvious versions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dist_scan.models.sphere_codes import SphereCodes
from dist_scan.search.matching import match_blocks, relabel


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_one_hot_codes_without_spread_are_the_means() -> None:
    codes = SphereCodes(500, 7, 7, "one_hot", 0.0, seed=3)
    ids = np.arange(507)
    assert np.array_equal(codes.codes(ids), np.eye(7)[codes.component(ids)])
    sizes = np.bincount(codes.component(ids[:500]), minlength=7)
    assert sizes.min() > 40 and len(set(sizes)) > 1, "sizes are drawn, not equal"
    assert np.array_equal(codes.component(ids[500:]), np.arange(7))
    assert not np.array_equal(
        codes.component(ids), SphereCodes(500, 7, 7, "one_hot", 0.0, seed=4).component(ids)
    )


def test_sigma_is_a_variance_around_the_mean_before_the_projection() -> None:
    codes = SphereCodes(20000, 2, 2, "one_hot", 0.0004, seed=0)
    ids = np.arange(20000)
    places, means = codes.codes(ids), np.eye(2)[codes.component(ids)]
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), 1)
    across = (places * means[:, ::-1]).sum(
        1
    )  # along the tangent the projection changes nothing to first order
    assert across.std() == pytest.approx(0.02, rel=0.03) and abs(across.mean()) < 6e-4
    np.testing.assert_allclose(codes.codes(20000 + np.arange(2)), np.eye(2))


def test_random_means_have_unit_length_and_a_dimension_of_their_own() -> None:
    codes = SphereCodes(10, 5, 16, "random", 0.0, seed=1)
    np.testing.assert_allclose(np.linalg.norm(codes.means, axis=1), 1)
    assert codes.codes(np.arange(10)).shape == (10, 16) and len(np.unique(codes.means, axis=0)) == 5
    with pytest.raises(ValueError, match="one-hot means; allowed: 5"):
        SphereCodes(10, 5, 16, "one_hot", 0.0, seed=1)
    with pytest.raises(ValueError, match="allowed 0..14"):
        codes.codes(np.array([15]))


def best_by_trying(outputs, targets):
    return min(
        sum(np.linalg.norm(o - targets[j]) for o, j in zip(outputs, p))
        for p in permutations(range(len(targets)))
    )


def test_matching_finds_the_best_permutation_inside_each_block() -> None:
    rng = np.random.default_rng(0)
    outputs, targets = unit(rng.normal(size=(13, 3))), unit(rng.normal(size=(13, 3)))
    order = match_blocks(outputs, targets, 5)
    for block in (slice(0, 5), slice(5, 10), slice(10, 13)):
        assert sorted(order[block]) == list(range(block.start, block.stop))
        cost = np.linalg.norm(outputs[block] - targets[order[block]], axis=1).sum()
        assert cost == pytest.approx(best_by_trying(outputs[block], targets[block]))


def test_the_cost_is_the_distance_and_not_its_square() -> None:
    """Outputs and targets on a circle for which the two costs want different permutations (found by trying)."""
    rng = np.random.default_rng(0)
    while True:
        outputs, targets = unit(rng.normal(size=(2, 2))), unit(rng.normal(size=(2, 2)))
        d = np.linalg.norm(outputs[:, None] - targets[None], axis=2)
        plain, squared = (
            d[0, 0] + d[1, 1] < d[0, 1] + d[1, 0],
            d[0, 0] ** 2 + d[1, 1] ** 2 < d[0, 1] ** 2 + d[1, 0] ** 2,
        )
        if plain != squared:
            break
    assert match_blocks(outputs, targets, 2).tolist() == ([0, 1] if plain else [1, 0])


def test_equal_targets_keep_the_order_of_their_rows() -> None:
    rng = np.random.default_rng(1)
    targets, outputs = np.eye(3)[rng.integers(0, 3, 40)], unit(rng.normal(size=(40, 3)))
    order = match_blocks(outputs, targets, 40)
    for c in range(3):
        got = order[targets[order][:, c] == 1]
        assert np.array_equal(got, np.flatnonzero(targets[:, c] == 1))


def test_only_the_blocks_asked_for_are_solved_and_they_do_not_change() -> None:
    rng = np.random.default_rng(2)
    outputs, targets = unit(rng.normal(size=(20, 4))), unit(rng.normal(size=(20, 4)))
    whole = match_blocks(outputs, targets, 8)
    part = match_blocks(outputs, targets, 8, range(7, 9))
    assert np.array_equal(part[:16], whole[:16]) and np.array_equal(part[16:], np.arange(16, 20))
    assert not np.array_equal(whole[16:], np.arange(16, 20))


def test_clusters_are_numbered_like_the_ones_before() -> None:
    rng = np.random.default_rng(3)
    before = rng.integers(0, 6, 300)
    renamed = np.array([4, 2, 0, 5, 1, 3])[before]
    flipped = rng.choice(300, 40, replace=False)
    renamed[flipped] = rng.integers(0, 6, 40)
    after = relabel(renamed, before, 6)
    kept = np.setdiff1d(np.arange(300), flipped)
    assert np.array_equal(after[kept], before[kept])
    assert np.array_equal(np.unique(np.stack([renamed, after]), axis=1)[0], np.arange(6)), (
        "a permutation of the numbers, no more"
    )
