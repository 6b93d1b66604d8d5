"""The bank gives the same rows from every place, and the place is chosen by size, in words, or refused."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_scan.data.feature_bank import FeatureBank, choose_place
from dist_scan.data.tables import FeatureTable
from dist_scan.world.world import free_bytes

GIB = 2**30


def test_rows_are_the_same_from_every_place(tmp_path):
    table = FeatureTable.create(tmp_path, 23, 3, 5, 4)
    rows = np.random.default_rng(0).normal(size=(23, 3, 5)).astype(np.float32)
    for shard in range(table.num_shards):
        table.write_shard(shard, rows[slice(*table.shard_range(shard))])
    index, view = np.array([22, 0, 7, 7, 13]), np.array([2, 0, 1, 2, 0])
    for place in ("device", "host", "mapped"):
        bank = FeatureBank(table, place, torch.device("cpu"))
        for views in (view, 1):
            found = bank.read(index, views)
            assert found.dtype == torch.float16 and np.array_equal(found.numpy(), rows.astype(np.float16)[index, views])


@pytest.mark.parametrize("on_gpu, device, host, copies, place", [
    (True, 80, 500, 8, "device"), (True, 60, 900, 8, "host"), (True, 60, 500, 8, "mapped"), (False, 80, 100, 1, "host"), (False, 0, 80, 1, "mapped")])
def test_the_first_place_with_room_is_taken(on_gpu, device, host, copies, place):
    chosen, why = choose_place(40 * GIB + (3 * GIB if place == "mapped" else 0), on_gpu, device * GIB, host * GIB, copies)
    assert chosen == place and "GiB" in why


def test_what_was_asked_for_is_given_or_refused():
    assert choose_place(GIB, True, 80 * GIB, 80 * GIB, 1, "mapped") == ("mapped", "asked for by runtime.bank")
    with pytest.raises(ValueError, match="no GPU; allowed: auto, host, mapped"):
        choose_place(GIB, False, 0, 80 * GIB, 1, "device")
    with pytest.raises(ValueError, match="5.00 GiB of host.*allowed: auto, mapped"):
        choose_place(6 * GIB, False, 0, 20 * GIB, 2, "host")


def test_free_memory_of_this_machine():
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
