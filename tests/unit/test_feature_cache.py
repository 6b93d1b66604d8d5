"""The bank gives the same rows from every place, and the place is chosen by size, in words, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.data.feature_cache import FeatureCache, choose_placement
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import EpochPlan, FeatureFeed
from dist_scan.data.order import cached_views
from dist_scan.heads.features import HeadFeatures
from dist_scan.heads.products import as_one_tensor
from dist_scan.world.world import current

GIB = 2**30


def test_rows_are_the_same_from_every_place(tmp_path: Path) -> None:
    table = FeatureTable.create(tmp_path, 23, 3, 5, 4)
    rows = np.random.default_rng(0).normal(size=(23, 3, 5)).astype(np.float32)
    for shard in range(table.num_shards):
        table.write_shard(shard, rows[slice(*table.shard_range(shard))])
    index, view = np.array([22, 0, 7, 7, 13]), np.array([2, 0, 1, 2, 0])
    for place in ("device", "host", "mapped"):
        bank = FeatureCache(table, place, torch.device("cpu"))
        for views in (view, 1):
            found = bank.read(index, views)
            assert found.dtype == torch.float16 and np.array_equal(
                found.numpy(), rows.astype(np.float16)[index, views]
            )


def test_both_views_of_a_batch_are_halves_of_one_tensor_and_stay_so(tmp_path: Path) -> None:
    table = FeatureTable.create(tmp_path, 20, 4, 5, 3)
    for shard in range(table.num_shards):
        table.write_shard(
            shard,
            np.random.default_rng(shard)
            .normal(size=(len(range(*table.shard_range(shard))), 4, 5))
            .astype(np.float32),
        )
    feed = FeatureFeed(table, EpochPlan(np.arange(20), 6, 3, current()), torch.device("cpu"))
    batches = list(feed.batches(2, first_step=1))
    assert len(batches) == 2
    for batch in batches:
        index = batch.index.numpy()
        for slot, view in enumerate(batch.views):
            assert torch.equal(
                view,
                torch.from_numpy(table.rows(index, cached_views(index, 3, 2, slot, 4))).float(),
            )
        assert as_one_tensor(*batch.views) is not None and not torch.equal(*batch.views)
        for kind in ("none", "l2", "standardise"):
            features = HeadFeatures(None, 5, kind, *table.mean_and_std(), trained=False)
            pair = features.pair(*batch.views)
            assert as_one_tensor(*pair) is not None
            apart = features.pair(batch.views[0].clone(), batch.views[1].clone())
            for got, alone, view in zip(pair, apart, batch.views, strict=True):
                assert torch.equal(got, features(view)) and torch.equal(alone, got)
    for batch, only in zip(batches, feed.batches(2, first_step=1, views=(1,)), strict=True):
        assert len(only.views) == 1 and torch.equal(only.views[0], batch.views[1])


@pytest.mark.parametrize(
    "on_gpu, device, host, copies, place",
    [
        (True, 80, 500, 8, "device"),
        (True, 60, 900, 8, "host"),
        (True, 60, 500, 8, "mapped"),
        (False, 80, 100, 1, "host"),
        (False, 0, 80, 1, "mapped"),
    ],
)
def test_the_first_place_with_room_is_taken(on_gpu, device, host, copies, place) -> None:
    chosen, why = choose_placement(
        40 * GIB + (3 * GIB if place == "mapped" else 0), on_gpu, device * GIB, host * GIB, copies
    )
    assert chosen == place and "GiB" in why


def test_what_was_asked_for_is_given_or_refused() -> None:
    assert choose_placement(GIB, True, 80 * GIB, 80 * GIB, 1, "mapped") == (
        "mapped",
        "set by runtime.bank",
    )
    with pytest.raises(ValueError, match="no GPU; allowed: auto, host, mapped"):
        choose_placement(GIB, False, 0, 80 * GIB, 1, "device")
    with pytest.raises(ValueError, match="5.00 GiB of host.*allowed: auto, mapped"):
        choose_placement(6 * GIB, False, 0, 20 * GIB, 2, "host")
