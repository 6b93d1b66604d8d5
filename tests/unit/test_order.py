"""An epoch is a function of (seed, epoch): dealing it to ranks changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from dist_scan.data.order import (
    batch_per_rank,
    cached_views,
    epoch_order,
    labelled_order,
    neighbour_columns,
    rank_plan,
    released_order,
    split_held_out,
    uniform_over_labels,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_hold_the_global_batch_in_order(world_size: int) -> None:
    order = epoch_order(np.arange(1000), 3, 5)
    alone = rank_plan(order, 96, 0, 1)
    parts = [rank_plan(order, 96, r, world_size) for r in range(world_size)]
    assert (np.concatenate(parts, axis=1) == alone).all()
    assert alone.shape == (10, 96) and len(np.unique(alone)) == 960


def test_resuming_inside_an_epoch_gives_the_rest() -> None:
    order = epoch_order(np.arange(500), 0, 0)
    assert (rank_plan(order, 50, 1, 2, first_step=4) == rank_plan(order, 50, 1, 2)[4:]).all()


def test_epochs_and_seeds_differ_and_repeat() -> None:
    rows = np.arange(4000)
    a, b, c = epoch_order(rows, 0, 0), epoch_order(rows, 0, 1), epoch_order(rows, 1, 0)
    assert (a == epoch_order(rows, 0, 0)).all()
    for x, y in ((a, b), (a, c), (a, rows)):
        assert (x == y).mean() < 0.01
    assert (np.sort(a) == rows).all()


def test_a_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="128 is not divisible by 3 processes; nearest that are: 126, 129"
    ):
        batch_per_rank(128, 3)


def test_partners_are_uniform_and_self_only_when_asked() -> None:
    index = np.arange(60000)
    plain = neighbour_columns(index, 0, 0, 20, False)
    assert plain.min() == 0 and plain.max() == 19
    assert np.abs(np.bincount(plain) / len(index) - 1 / 20).max() < 0.005
    released = neighbour_columns(index, 0, 0, 20, True)
    assert abs((released == -1).mean() - 1 / 21) < 0.004 and released.max() == 19


def test_cached_views_cover_all_and_differ_between_slots() -> None:
    index = np.arange(20000)
    a, b = cached_views(index, 0, 0, 0, 4), cached_views(index, 0, 0, 1, 4)
    assert set(np.unique(a)) == {0, 1, 2, 3} and abs((a == b).mean() - 0.25) < 0.02


def test_held_out_rows_do_not_depend_on_anything_but_seed_and_row() -> None:
    train, held = split_held_out(10000, 0.1, 0)
    assert (
        len(np.intersect1d(train, held)) == 0
        and len(train) + len(held) == 10000
        and abs(len(held) - 1000) < 100
    )
    assert (split_held_out(20000, 0.1, 0)[1][: len(held)] == held).all()


def entropy(labels: np.ndarray, num_labels: int) -> float:
    """Of how often labels are met, as a share of log(num_labels)."""
    p = np.bincount(labels, minlength=num_labels) / len(labels)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(num_labels))


@pytest.fixture
def zipf():
    """20,000 rows in 50 clusters of very different sizes."""
    share = 1 / np.arange(1, 51)
    return np.random.default_rng(0).choice(50, 20000, p=share / share.sum())


def test_the_uniform_sampler_meets_labels_equally_often_and_the_released_order_does_not(
    zipf,
) -> None:
    rows = np.arange(len(zipf))
    uniform, released = (draw(rows, zipf, 1, 2) for draw in (uniform_over_labels, released_order))
    assert len(uniform) == len(released) == len(rows)
    counts = np.bincount(zipf[uniform], minlength=50)
    assert (
        counts.min() >= 350
        and counts.max() <= 20000 // 50 + 1
        and entropy(zipf[uniform], 50) > 0.9999
    )
    assert abs(entropy(zipf[released], 50) - entropy(zipf, 50)) < 0.01 < 1 - entropy(zipf, 50)
    assert 0.4 < len(np.unique(released)) / len(rows) < 0.6  # FIDELITY.md 0.3: 49.6 %


def test_the_uniform_sampler_repeats_only_what_is_short_and_is_a_function(zipf) -> None:
    rows = np.arange(len(zipf)) * 3 + 7
    drawn = uniform_over_labels(rows, zipf, 0, 0)
    large = np.flatnonzero(np.bincount(zipf) > 500)
    times = np.bincount((drawn - 7) // 3, minlength=len(rows))
    assert times[np.isin(zipf, large)].max() == 1 and times.max() > 1
    assert (drawn == uniform_over_labels(rows, zipf, 0, 0)).all() and (
        drawn != uniform_over_labels(rows, zipf, 0, 1)
    ).mean() > 0.9


@pytest.mark.parametrize("draw", [uniform_over_labels, released_order, labelled_order])
def test_rows_without_a_label_sit_out(draw) -> None:
    rows, labels = np.arange(100), np.repeat([0, 1, -1, 3], 25)
    drawn = draw(rows, labels, 0, 0)
    assert len(drawn) == 100 and not np.isin(drawn, np.arange(50, 75)).any()
    with pytest.raises(ValueError, match="none of the 4 rows has a pseudo-label"):
        draw(np.arange(4), np.full(4, -1), 0, 0)
