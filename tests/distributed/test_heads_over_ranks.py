"""Losses of heads over ranks with different numbers of rows, none included.

The mean over ranks is the loss and the gradient of one rank that has all rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks

B, DIM = 24, 5
ROWS_PER_RANK = {1: [24], 2: [15, 9], 3: [4, 0, 20], 4: [1, 11, 7, 5]}


def step(loss_name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Loss [H] and gradients of weight and bias, means over ranks; gradients of all features."""
    from dist_scan.heads.autograd import (
        TemiObjective,
        mean_probabilities,
        scan_heads_loss,
        temi_heads_loss,
    )
    from dist_scan.world.collectives import all_mean, gather_rows
    from dist_scan.world.world import current

    world = current()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ends = np.cumsum([0, *ROWS_PER_RANK[world.world_size]])
    local = slice(ends[world.rank], ends[world.rank + 1])
    first, second = random(B, DIM), random(B, DIM)
    weight, bias = random(sum(sizes), DIM), random(sum(sizes))
    log_p = [random(2, B, c).log_softmax(2)[:, local].flatten(0, 1) for c in sizes]
    leaves = [x.clone().requires_grad_() for x in (first[local], second[local], weight, bias)]
    if loss_name == "scan":
        loss = scan_heads_loss(*leaves, sizes, 5.0).total
    else:
        marginals, _ = mean_probabilities([x.exp().sum(0) for x in log_p], len(log_p[0]))
        loss = temi_heads_loss(*leaves, sizes, TemiObjective(log_p, marginals, 0.6, 0.5))
    loss.sum().backward()
    dfirst, dsecond, dweight, dbias = (x.grad for x in leaves)
    results = [
        all_mean(loss.detach()),
        all_mean(dweight),
        all_mean(dbias),
        gather_rows(dfirst) / world.world_size,
        gather_rows(dsecond) / world.world_size,
    ]
    return [x.numpy() for x in results]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("loss_name", ["scan", "temi"])
def test_uneven_ranks_equal_one(loss_name: str, world_size: int) -> None:
    # On four ranks more columns than a group holds, so that several messages are sent.
    sizes = (6, 6, 9) if world_size < 4 else (3000, 1200, 5)
    expected = step(loss_name, torch.float64, sizes)
    for rank in run_ranks(step, world_size, loss_name, torch.float64, sizes):
        for got, want in zip(rank, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_uneven_ranks_equal_one_in_compiled_loops(world_size: int) -> None:
    sizes = (70, 70, 90)
    exact = step("scan", torch.float64, sizes)
    ranks = run_ranks(step, world_size, "scan", torch.float32, sizes)
    for rank in [step("scan", torch.float32, sizes), *ranks]:
        for got, want in zip(rank, exact, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
