"""A feature cache returns the same rows from every placement, which is chosen by size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.data.feature_cache import FeatureCache, Placement, choose_placement
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.feed import EpochPlan, FeatureFeed
from dist_scan.data.order import cached_views
from dist_scan.heads.features import HeadFeatures
from dist_scan.heads.products import as_one_tensor
from dist_scan.world.world import current

GIB = 2**30
CPU = torch.device("cpu")


def random_table(
    folder: Path, shape: tuple[int, int, int], num_shards: int
) -> tuple[FeatureTable, np.ndarray]:
    """(a table of random features, the features [N, V, D] float16)."""
    table = FeatureTable.create(folder, shape, num_shards)
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for shard in range(table.num_shards):
        table.write_shard(shard, features[slice(*table.shard_range(shard))])
    return table, features.astype(np.float16)


@pytest.mark.parametrize("placement", ["device", "host", "mapped"])
def test_rows_are_the_same_from_every_placement(placement: Placement, tmp_path: Path) -> None:
    table, features = random_table(tmp_path, (23, 3, 5), 4)
    cache = FeatureCache(table, placement, CPU)
    index = np.array([22, 0, 7, 7, 13])
    for view in (np.array([2, 0, 1, 2, 0]), 1):
        rows = cache.read(index, view)
        assert rows.dtype == torch.float16
        assert np.array_equal(rows.numpy(), features[index, view])


def test_views_of_a_batch_are_random_cached_views_in_one_tensor(tmp_path: Path) -> None:
    table, _ = random_table(tmp_path, (20, 4, 5), 3)
    feed = FeatureFeed(table, EpochPlan(np.arange(20), 6, 3, current()), CPU)
    batches = list(feed.batches(2, first_step=1))
    assert len(batches) == 2
    for batch in batches:
        index = batch.index.numpy()
        for slot, view in enumerate(batch.views):
            expected = table.rows(index, cached_views(index, 3, 2, slot, 4))
            assert torch.equal(view, torch.from_numpy(expected).float())
        assert as_one_tensor(*batch.views) is not None
        assert not torch.equal(*batch.views)
    second_views = feed.batches(2, first_step=1, slots=(1,))
    for batch, second in zip(batches, second_views, strict=True):
        assert len(second.views) == 1
        assert torch.equal(second.views[0], batch.views[1])


@pytest.mark.parametrize("kind", ["none", "l2", "standardise"])
def test_head_features_of_a_batch_stay_in_one_tensor(kind: str, tmp_path: Path) -> None:
    table, _ = random_table(tmp_path, (20, 4, 5), 3)
    feed = FeatureFeed(table, EpochPlan(np.arange(20), 6, 3, current()), CPU)
    features = HeadFeatures(None, 5, kind, *table.mean_and_std(), trained=False)
    for batch in feed.batches(2):
        pair = features.pair(*batch.views)
        assert as_one_tensor(*pair) is not None
        separate = features.pair(batch.views[0].clone(), batch.views[1].clone())
        for together, alone, view in zip(pair, separate, batch.views, strict=True):
            assert torch.equal(together, features(view))
            assert torch.equal(alone, together)


@pytest.mark.parametrize(
    "size, on_gpu, free_device, free_host, local_world_size, expected",
    [
        (40, True, 80, 500, 8, "device"),
        (40, True, 60, 900, 8, "host"),
        (43, True, 60, 500, 8, "mapped"),
        (40, False, 80, 100, 1, "host"),
        (43, False, 0, 80, 1, "mapped"),
    ],
)
def test_the_fastest_memory_with_enough_room_is_chosen(
    size: int, on_gpu: bool, free_device: int, free_host: int, local_world_size: int, expected: str
) -> None:
    placement, reason = choose_placement(
        size * GIB, on_gpu, free_device * GIB, free_host * GIB, local_world_size
    )
    assert placement == expected
    assert "GiB" in reason


def test_a_placement_from_the_config_is_used_or_refused() -> None:
    chosen = choose_placement(GIB, True, 80 * GIB, 80 * GIB, 1, "mapped")
    assert chosen == ("mapped", "set by runtime.feature_cache")
    with pytest.raises(ValueError, match="no GPU; allowed: auto, host, mapped"):
        choose_placement(GIB, False, 0, 80 * GIB, 1, "device")
    with pytest.raises(ValueError, match="5.00 GiB of host.*allowed: auto, mapped"):
        choose_placement(6 * GIB, False, 0, 20 * GIB, 2, "host")
