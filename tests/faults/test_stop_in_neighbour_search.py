"""Row 12 of docs/reliability.md in the neighbour search: stop requests to one of two ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from dist_scan.data.feature_table import FeatureTable
from dist_scan.engine.stop import StopFlag
from dist_scan.monitoring.progress import StopRequested
from dist_scan.search.neighbours import RunningSearch, search_neighbours
from dist_scan.search.options import NeighbourOptions
from dist_scan.world.world import current
from tests.reference.neighbours import neighbours as reference_neighbours
from tests.support import faults
from tests.support.feature_tables import random_rows, write_table
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)
NUM_SHARDS = 6
NUM_NEIGHBOURS = 20


def search_in_folder(
    features: Path, out: Path, fault_file: Path, stop_at_chunk: int | None
) -> tuple[np.ndarray, ...] | Literal["stopped"]:
    """Start the search, with one shard per round and 11 chunks per shard; returns its rows.

    Rank 0 receives a signal at the chunk ``stop_at_chunk``, counted from 1.
    """
    stop = StopFlag()
    stop.install()
    faults.Faults(fault_file, current().rank).arm()
    num_searched = 0

    def count_chunk(*args: Any) -> None:
        nonlocal num_searched
        num_searched += 1
        if num_searched == stop_at_chunk:
            os.kill(os.getpid(), signal.SIGUSR2)

    if current().rank == 0:
        faults.call_before(RunningSearch, "search_block", count_chunk)
    options = NeighbourOptions(chunk_rows=40, queries_per_round=1)
    try:
        table = search_neighbours(
            FeatureTable.open(features),
            out,
            NUM_NEIGHBOURS,
            options,
            stop_requested=lambda: stop.requested,
        )
    except StopRequested:
        return "stopped"
    return table.rows(np.arange(table.num_rows))


def finished_files(out: Path) -> dict[str, int]:
    """Files of finished shards, with the time at which each was written."""
    return {
        path.name: path.stat().st_mtime_ns
        for path in out.glob("*-[0-9]*.npy")
        if not path.name.startswith(".tmp")
    }


def count_shards(files: dict[str, int]) -> int:
    """Number of shards to which the files belong."""
    return len({name.rsplit("-", 1)[1] for name in files})


def test_a_stop_request_costs_the_current_shards_and_no_finished_one(tmp_path: Path) -> None:
    rows = random_rows()
    features, fault_file, out = (tmp_path / name for name in ("features", "fault.json", "out"))
    write_table(rows, features, NUM_SHARDS)

    # Between two rounds: the current round is finished.
    fault_file.write_text(json.dumps([{"kind": "signal", "rank": 1, "at": "shard", "step": 0}]))
    assert run_ranks(search_in_folder, 2, features, out, fault_file, None) == ["stopped"] * 2
    assert not fault_file.exists()
    after_first = finished_files(out)
    assert count_shards(after_first) == 2

    # Inside the second round of this start: the first round is finished, the second is lost.
    assert run_ranks(search_in_folder, 2, features, out, fault_file, 15) == ["stopped"] * 2
    after_second = finished_files(out)
    assert after_first.items() < after_second.items()
    assert count_shards(after_second) == 4

    expected_ids, expected_scores = reference_neighbours(rows, NUM_NEIGHBOURS, "cosine")
    for ids, scores in run_ranks(search_in_folder, 2, features, out, fault_file, None):
        assert (ids == expected_ids).all()
        assert (scores == expected_scores).all()
    assert after_second.items() < finished_files(out).items()
    assert count_shards(finished_files(out)) == NUM_SHARDS
