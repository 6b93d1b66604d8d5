"""RELIABILITY.md's row 18: another number of ranks at every start of one run."""
from __future__ import annotations

import pytest

from tests.faults.armed import LONG, PRETEXT, Run

pytestmark = pytest.mark.timeout(900)
STOPPED = 128 + 12
STAGES = PRETEXT + LONG


def shards(run: Run, stage: str) -> dict[str, int]:
    """The finished shards of a stage's table, each with the moment it was written."""
    return {p.name: p.stat().st_mtime_ns for p in run.folder.glob(f"stages/{stage}/*/*-[0-9]*.npy") if not p.name.startswith(".tmp")}


def test_row_18_four_ranks_then_two_then_three(tmp_path):
    """In float64 a run that changes its number of ranks twice has the losses of one that never did: the same images in every step."""
    whole = Run(tmp_path / "whole", PRETEXT)("stages.pretext.precision=fp64", processes=1)
    assert whole.code == 0, whole.said
    run = Run(tmp_path / "elastic", STAGES)
    for processes, fault in ((4, {"rank": 3, "step": 5}), (2, {"rank": 1, "step": 12}), (3, {"rank": 2, "at": "shard"})):
        done = run("stages.pretext.precision=fp64", processes=processes, faults=[{"kind": "signal", **fault}])
        assert done.code == STOPPED, done.said
    expected, found = whole.losses(), done.losses()
    assert list(found) == list(expected) and len({round(v, 3) for v in found.values()}) > 10
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5
    kept = shards(run, "features")
    done = run("stages.pretext.precision=fp64", processes=2)
    after = shards(run, "features")
    assert done.code == 0 and kept and kept.items() < after.items(), f"finished shards are kept, the others made\n{done.said}"
