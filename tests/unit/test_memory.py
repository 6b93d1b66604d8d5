"""Free memory, and the peak memory of each stage."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from dist_scan.monitoring import memory

MIB = 2**20


def test_free_memory_of_this_machine() -> None:
    assert MIB < memory.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_peak_of_a_stage_does_not_count_for_the_next() -> None:
    memory.reset_peak_memory()
    before = memory.peak_memory()["peak_host_bytes"]
    block = np.ones(200 * MIB, np.uint8)
    with_block = memory.peak_memory()["peak_host_bytes"]
    assert with_block >= before + 190 * MIB
    del block
    memory.reset_peak_memory()
    after = memory.peak_memory()
    assert after["peak_host_bytes"] <= with_block - 190 * MIB
    assert after["peak_gpu_bytes"] == 0
