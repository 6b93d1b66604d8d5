"""The order of rows is a function of (seed, epoch): splitting it over ranks changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dist_scan.data.order import (
    cached_views,
    check_divisible,
    clustered_order,
    epoch_order,
    neighbour_columns,
    rank_plan,
    released_order,
    split_held_out,
    uniform_over_clusters,
)

NUM_CLUSTERS = 50


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_have_the_global_batch_in_order(world_size: int) -> None:
    order = epoch_order(np.arange(1000), 3, 5)
    alone = rank_plan(order, 96, 0, 1)
    parts = [rank_plan(order, 96, rank, world_size) for rank in range(world_size)]
    assert (np.concatenate(parts, axis=1) == alone).all()
    assert alone.shape == (10, 96)
    assert len(np.unique(alone)) == 960


def test_resuming_inside_an_epoch_gives_the_remaining_steps() -> None:
    order = epoch_order(np.arange(500), 0, 0)
    whole = rank_plan(order, 50, 1, 2)
    assert (rank_plan(order, 50, 1, 2, first_step=4) == whole[4:]).all()


def test_order_depends_on_epoch_and_seed_only() -> None:
    rows = np.arange(4000)
    order = epoch_order(rows, 0, 0)
    assert (order == epoch_order(rows, 0, 0)).all()
    assert (np.sort(order) == rows).all()
    for other in (epoch_order(rows, 0, 1), epoch_order(rows, 1, 0), rows):
        assert (order == other).mean() < 0.01


def test_indivisible_batch_names_the_nearest_divisible_ones() -> None:
    message = "128 is not divisible by 3 processes; nearest that are: 126, 129"
    with pytest.raises(ValueError, match=message):
        check_divisible(128, 3)


def test_neighbours_are_uniform_and_include_the_row_itself_only_if_asked() -> None:
    index = np.arange(60000)
    columns = neighbour_columns(index, 0, 0, 20, self_as_candidate=False)
    assert columns.min() == 0
    assert columns.max() == 19
    assert np.abs(np.bincount(columns) / len(index) - 1 / 20).max() < 0.005
    released = neighbour_columns(index, 0, 0, 20, self_as_candidate=True)
    assert abs((released == -1).mean() - 1 / 21) < 0.004
    assert released.max() == 19


def test_cached_views_are_uniform_and_independent_between_slots() -> None:
    index = np.arange(20000)
    anchor = cached_views(index, 0, 0, 0, 4)
    neighbour = cached_views(index, 0, 0, 1, 4)
    assert set(np.unique(anchor)) == {0, 1, 2, 3}
    assert abs((anchor == neighbour).mean() - 0.25) < 0.02


def test_held_out_rows_depend_on_seed_and_row_only() -> None:
    train, held_out = split_held_out(10000, 0.1, 0)
    assert len(np.intersect1d(train, held_out)) == 0
    assert len(train) + len(held_out) == 10000
    assert abs(len(held_out) - 1000) < 100
    _, of_more_images = split_held_out(20000, 0.1, 0)
    assert (of_more_images[: len(held_out)] == held_out).all()


def relative_entropy(clusters: np.ndarray) -> float:
    """Entropy of the frequencies of clusters, divided by log(NUM_CLUSTERS)."""
    p = np.bincount(clusters, minlength=NUM_CLUSTERS) / len(clusters)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(NUM_CLUSTERS))


@pytest.fixture
def zipf_clusters() -> np.ndarray:
    """Clusters, of very different sizes, of 20,000 rows."""
    weight = 1 / np.arange(1, NUM_CLUSTERS + 1)
    return np.random.default_rng(0).choice(NUM_CLUSTERS, 20000, p=weight / weight.sum())


def test_uniform_sampler_balances_clusters_and_released_order_does_not(
    zipf_clusters: np.ndarray,
) -> None:
    rows = np.arange(len(zipf_clusters))
    uniform = uniform_over_clusters(rows, zipf_clusters, 1, 2)
    released = released_order(rows, zipf_clusters, 1, 2)
    assert len(uniform) == len(released) == len(rows)
    counts = np.bincount(zipf_clusters[uniform], minlength=NUM_CLUSTERS)
    assert counts.min() >= 350
    assert counts.max() <= 20000 // NUM_CLUSTERS + 1
    assert relative_entropy(zipf_clusters[uniform]) > 0.9999
    unbalanced = relative_entropy(zipf_clusters)
    assert unbalanced < 0.99
    assert abs(relative_entropy(zipf_clusters[released]) - unbalanced) < 0.01
    # The released code visits about half of the rows (49.6 % were measured).
    assert 0.4 < len(np.unique(released)) / len(rows) < 0.6


def test_uniform_sampler_repeats_rows_of_small_clusters_only(zipf_clusters: np.ndarray) -> None:
    rows = np.arange(len(zipf_clusters)) * 3 + 7
    drawn = uniform_over_clusters(rows, zipf_clusters, 0, 0)
    large = np.flatnonzero(np.bincount(zipf_clusters) > 500)
    times = np.bincount((drawn - 7) // 3, minlength=len(rows))
    assert times[np.isin(zipf_clusters, large)].max() == 1
    assert times.max() > 1
    assert (drawn == uniform_over_clusters(rows, zipf_clusters, 0, 0)).all()
    assert (drawn != uniform_over_clusters(rows, zipf_clusters, 0, 1)).mean() > 0.9


@pytest.mark.parametrize("sampler", [uniform_over_clusters, released_order, clustered_order])
def test_rows_without_a_cluster_are_never_drawn(sampler: Callable[..., np.ndarray]) -> None:
    clusters = np.repeat([0, 1, -1, 3], 25)
    drawn = sampler(np.arange(100), clusters, 0, 0)
    assert len(drawn) == 100
    assert not np.isin(drawn, np.flatnonzero(clusters < 0)).any()
    with pytest.raises(ValueError, match="none of the 4 rows has a cluster"):
        sampler(np.arange(4), np.full(4, -1), 0, 0)
