"""What ranks say to each other, on real gloo processes; alone, everything is the identity."""

from __future__ import annotations

import pytest
import torch

from dist_scan.world import collectives as c
from dist_scan.world.world import current, wrap
from tests.support.ranks import run_ranks


def everything():
    r, w = current().rank, current().world_size
    x = torch.full((2,), float(r + 1))
    uneven = torch.full((r, 3), float(r))
    got = c.broadcast(torch.full((2,), float(r)), 1)
    handle_x = torch.full((2,), float(r))
    c.broadcast_async(handle_x, w - 1).wait()
    return {
        "sum": c.all_sum(x).tolist(),
        "max": c.all_max(x).tolist(),
        "mean": c.all_mean(x).tolist(),
        "rows": c.all_rows(x[None]).tolist(),
        "uneven": c.gather_rows(uneven)[:, 0].tolist(),
        "bc": got.tolist(),
        "async": handle_x.tolist(),
        "object": c.broadcast_object({"from": r}),
        "objects": c.gather_objects(r),
        "agree": (c.agree(r == 2), c.agree(False)),
    }


def test_every_rank_hears_the_same() -> None:
    for got in run_ranks(everything, 3):
        assert got == {
            "sum": [6, 6],
            "max": [3, 3],
            "mean": [2, 2],
            "rows": [[1, 1], [2, 2], [3, 3]],
            "uneven": [1, 2, 2],
            "bc": [1, 1],
            "async": [2, 2],
            "object": {"from": 0},
            "objects": [0, 1, 2],
            "agree": (True, False),
        }


def test_alone_everything_is_the_identity() -> None:
    x = torch.randn(3, 2)
    for f in (
        c.all_sum,
        c.all_mean,
        c.all_max,
        c.all_rows,
        c.gather_rows,
        c.broadcast,
        c.all_sum_grad,
    ):
        assert torch.equal(f(x), x)
    assert c.gather_objects(5) == [5] and c.agree(True) and not c.agree(False)


def loss_gradient(kind):
    """Gradient of a global loss after DDP's averaging, for a layer whose rows are dealt over ranks."""
    torch.manual_seed(0)
    layer = wrap(torch.nn.Linear(4, 3).double())
    x = torch.arange(48, dtype=torch.float64).reshape(12, 4).sin()
    w, r = current().world_size, current().rank
    z = layer(x[r * 12 // w : (r + 1) * 12 // w])
    if kind == "mean":
        c.all_mean(z.softmax(1).mean(0)).log().sum().backward()
    elif kind == "rows":
        torch.logsumexp(z @ c.all_rows(z).T, 1).mean().backward()
    else:  # a statistic of the whole batch inside every row's loss
        m = c.all_sum_grad(z.sum(0)) / 12
        ((z - m) ** 4).mean().backward()
    return next(layer.parameters()).grad.tolist()


@pytest.mark.parametrize("kind", ["mean", "rows", "statistic"])
def test_gradients_equal_those_of_one_rank(kind) -> None:
    alone = torch.tensor(run_ranks(loss_gradient, 1, kind)[0])
    for world_size in (2, 3):
        for got in run_ranks(loss_gradient, world_size, kind):
            assert torch.allclose(torch.tensor(got), alone, rtol=1e-10, atol=1e-12)
