"""A stage's peak is its own, not the one of the stage before."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dist_scan.monitoring import memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_a_large_stage_does_not_count_for_the_next() -> None:
    memory.reset_peak_memory()
    before = memory.peak_memory()["peak_host_bytes"]
    block = np.ones(200 * MIB, np.uint8)
    large = memory.peak_memory()["peak_host_bytes"]
    assert large >= before + 190 * MIB
    del block
    memory.reset_peak_memory()
    after = memory.peak_memory()
    assert after["peak_host_bytes"] <= large - 190 * MIB and after["peak_gpu_bytes"] == 0
