"""Collectives on real gloo processes; with a single rank they are the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_scan.world import collectives as c
from dist_scan.world.world import current, wrap_ddp
from tests.support.ranks import run_ranks


def results_of_all() -> dict[str, Any]:
    """The result of every collective on this rank, with inputs that depend on the rank."""
    rank = current().rank
    x = torch.full((2,), float(rank + 1))
    sent = torch.full((2,), float(rank))
    c.broadcast_async(sent, current().world_size - 1).wait()
    return {
        "sum": c.all_sum(x).tolist(),
        "max": c.all_max(x).tolist(),
        "mean": c.all_mean(x).tolist(),
        "rows": c.all_rows(x[None]).tolist(),
        "rows of different number": c.gather_rows(torch.full((rank, 3), rank))[:, 0].tolist(),
        "broadcast": c.broadcast(torch.full((2,), float(rank)), 1).tolist(),
        "broadcast_async": sent.tolist(),
        "broadcast_object": c.broadcast_object({"from": rank}),
        "on_rank_0": c.on_rank_0(lambda: rank),
        "gather_objects": c.gather_objects(rank),
        "any_rank": (c.any_rank(rank == 2), c.any_rank(False)),
    }


def test_all_ranks_get_the_same_results() -> None:
    for results in run_ranks(results_of_all, 3):
        assert results == {
            "sum": [6, 6],
            "max": [3, 3],
            "mean": [2, 2],
            "rows": [[1, 1], [2, 2], [3, 3]],
            "rows of different number": [1, 2, 2],
            "broadcast": [1, 1],
            "broadcast_async": [2, 2],
            "broadcast_object": {"from": 0},
            "on_rank_0": 0,
            "gather_objects": [0, 1, 2],
            "any_rank": (True, False),
        }


def test_collectives_are_the_identity_on_a_single_rank() -> None:
    x = torch.randn(3, 2)
    for collective in (c.all_sum, c.all_mean, c.all_max, c.all_rows, c.gather_rows, c.broadcast):
        assert torch.equal(collective(x), x)
    assert c.gather_objects(5) == [5]
    assert c.any_rank(True) and not c.any_rank(False)


def gradient_of_global_loss(kind: str) -> list[list[float]]:
    """Gradient after DDP's averaging, for a layer whose 12 rows are distributed over the ranks."""
    torch.manual_seed(0)
    layer = wrap_ddp(torch.nn.Linear(4, 3).double())
    x = torch.arange(48, dtype=torch.float64).reshape(12, 4).sin()
    z = layer(x.tensor_split(current().world_size)[current().rank])
    if kind == "mean":
        c.all_mean(z.softmax(1).mean(0)).log().sum().backward()
    else:
        torch.logsumexp(z @ c.all_rows(z).T, 1).mean().backward()
    return next(layer.parameters()).grad.tolist()


@pytest.mark.parametrize("kind", ["mean", "rows"])
def test_gradients_equal_those_of_a_single_rank(kind: str) -> None:
    expected = torch.tensor(run_ranks(gradient_of_global_loss, 1, kind)[0])
    for world_size in (2, 3):
        for gradient in run_ranks(gradient_of_global_loss, world_size, kind):
            torch.testing.assert_close(torch.tensor(gradient), expected, rtol=1e-10, atol=1e-12)
