"""The head step over ranks with different numbers of rows, none included: the mean over ranks is the one-rank loss and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.ranks import run_ranks

B, DIM = 24, 5
PARTS = {1: [24], 2: [15, 9], 3: [4, 0, 20], 4: [1, 11, 7, 5]}


def step(kind: str, sizes: tuple[int, ...]):
    """(loss [H], gradients of weight, bias and this rank's features; features put together over ranks), means over ranks."""
    from dist_scan.heads.autograd import mean_probabilities, scan_heads_loss, temi_heads_loss
    from dist_scan.world.collectives import all_mean, gather_rows
    from dist_scan.world.world import current

    world, gen, dtype = (
        current(),
        torch.Generator().manual_seed(0),
        torch.float64 if kind in ("scan", "temi") else torch.float32,
    )
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    ends = np.cumsum([0, *PARTS[world.world_size]])
    mine = slice(ends[world.rank], ends[world.rank + 1])
    first, second, weight, bias = (
        draw(B, DIM),
        draw(B, DIM),
        draw(sum(sizes), DIM),
        draw(sum(sizes)),
    )
    log_p = [draw(2, B, c).log_softmax(2)[:, mine].flatten(0, 1) for c in sizes]
    leaves = [x.clone().requires_grad_() for x in (first[mine], second[mine], weight, bias)]
    if kind.startswith("scan"):
        loss = scan_heads_loss(*leaves, sizes, 5.0).total
    else:
        loss = temi_heads_loss(
            *leaves, sizes, log_p, mean_probabilities([x.exp() for x in log_p])[0], 0.6, 0.5
        )
    loss.sum().backward()
    dfirst, dsecond, dweight, dbias = (x.grad for x in leaves)
    out = [
        all_mean(loss.detach()),
        all_mean(dweight),
        all_mean(dbias),
        gather_rows(dfirst) / world.world_size,
        gather_rows(dsecond) / world.world_size,
    ]
    return [x.numpy() for x in out]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["scan", "temi"])
def test_uneven_ranks_equal_one(kind, world_size: int) -> None:
    sizes = (
        (6, 6, 9) if world_size < 4 else (3000, 1200, 5)
    )  # more columns than a group holds: several messages
    alone = step(kind, sizes)
    for rank in run_ranks(step, world_size, kind, sizes):
        for got, want in zip(rank, alone, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_in_float32_by_compiled_loops_too(world_size: int) -> None:
    sizes = (70, 70, 90)
    exact, alone = step("scan", sizes), step("scan float32", sizes)
    for rank in [alone, *run_ranks(step, world_size, "scan float32", sizes)]:
        for got, want in zip(rank, exact, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
