"""RELIABILITY.md's row 12 in the neighbour search: a notice between two rounds and inside one, to one rank of two."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from dist_scan.data.feature_table import FeatureTable
from dist_scan.search.neighbours import DatabaseChunk, mine_neighbours
from dist_scan.search.options import NeighbourOptions
from tests.reference.neighbours import neighbours as slow_neighbours
from tests.support.feature_tables import random_rows, write_table
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)
SHARDS, K = 6, 20


def mining(root: Path, out: Path, fault: Path, inside: int | None):
    """One start of the search, a shard a round and 11 chunks a shard: what it ended with, and the shards that this rank searched."""
    from dist_scan.engine.stop import StopFlag
    from dist_scan.monitoring.progress import StopRequested
    from dist_scan.world.world import current
    from tests.support import faults

    stop, searched = StopFlag(), []
    stop.install()
    faults.Faults(fault, current().rank).arm()
    if inside is not None and current().rank == 0:  # in the middle of its work
        faults.call_before(
            DatabaseChunk,
            "search",
            lambda *_: (
                searched.append(0)
                or len(searched) == inside
                and os.kill(os.getpid(), signal.SIGUSR2)
            ),
        )
    try:
        found = mine_neighbours(
            FeatureTable.open(root),
            out,
            K,
            NeighbourOptions(chunk_rows=40, queries_per_round=1),
            stop_requested=lambda: stop.requested,
        )
    except StopRequested:
        return "stopped"
    return found.rows(np.arange(found.num_rows))


def finished(out: Path) -> dict[str, int]:
    """Files of shards, each with the moment it was written."""
    return {
        p.name: p.stat().st_mtime_ns
        for p in out.glob("*-[0-9]*.npy")
        if not p.name.startswith(".tmp")
    }


def test_a_notice_costs_the_shards_in_work_and_none_that_is_finished(tmp_path: Path) -> None:
    x, fault, out = random_rows(), tmp_path / "fault.json", tmp_path / "neighbours"
    write_table(x, tmp_path / "features", SHARDS)
    fault.write_text(json.dumps([{"kind": "signal", "rank": 1, "at": "shard", "step": 0}]))
    assert run_ranks(mining, 2, tmp_path / "features", out, fault, None) == ["stopped"] * 2
    one = finished(out)
    assert not fault.exists() and numbers(one) == 2, "the round in which it came is finished"
    assert run_ranks(mining, 2, tmp_path / "features", out, fault, 15) == ["stopped"] * 2
    two = finished(out)
    assert one.items() < two.items() and numbers(two) == 4, (
        "in the second round of this start: its first is kept, its own shards are not"
    )
    for got in run_ranks(mining, 2, tmp_path / "features", out, fault, None):
        ids, scores = slow_neighbours(x, K, "cosine")
        assert (got[0] == ids).all() and (got[1] == scores).all()
    assert two.items() < finished(out).items() and numbers(finished(out)) == SHARDS


def numbers(files: dict[str, int]) -> int:
    """How many shards these files are of."""
    return len({name.rsplit("-", 1)[1] for name in files})
