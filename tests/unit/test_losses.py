"""Losses against slow float64 references, at small and very large logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dist_scan.losses import (
    confident_cross_entropy,
    info_nce,
    nt_xent,
    scan_loss,
    scan_loss_released,
)
from tests.reference import losses as reference


def rows(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1, 30, 300])
@pytest.mark.parametrize("permuted", [False, True])
def test_scan_loss_and_gradient(scale, permuted) -> None:
    a, n = rows(3, 16, 7, scale=scale), rows(3, 16, 7, seed=1, scale=scale)
    if permuted:  # as ClusterHeads gives them
        a, n = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (a, n))
    mine, slow = (
        [x.clone().requires_grad_() for x in (a, n)],
        [x.double().requires_grad_() for x in (a, n)],
    )
    total = scan_loss(*mine, 5.0).total
    expected = torch.stack([reference.scan(x, y, 5.0) for x, y in zip(*slow)])
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    head_weights = torch.tensor([1.0, 2.0, 0.5])
    (total * head_weights).sum().backward()
    (expected * head_weights).sum().backward()
    for m, s in zip(mine, slow):
        torch.testing.assert_close(m.grad.double(), s.grad, rtol=1e-5, atol=1e-5)


def test_scan_gradient_by_differences() -> None:
    a, n = rows(2, 4, 3).double().requires_grad_(), rows(2, 4, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: scan_loss(x, y, 3.0).total, (a, n))


def test_the_released_form_agrees_at_small_logits_and_loses_the_gradient_at_large_ones() -> None:
    a, n = rows(1, 8, 5), rows(1, 8, 5, seed=1)
    torch.testing.assert_close(scan_loss_released(a, n, 5.0).total, scan_loss(a, n, 5.0).total)
    a, n = (
        torch.tensor([[[400.0, 0.0]]]).requires_grad_(),
        torch.tensor([[[0.0, 400.0]]]).requires_grad_(),
    )
    scan_loss_released(a, n, 0.0).total.sum().backward()
    assert n.grad.abs().max() < 1e-6
    n.grad = None
    scan_loss(a, n, 0.0).total.sum().backward()
    assert n.grad.abs().max() > 0.4


def test_bf16_logits_are_widened() -> None:
    assert (
        scan_loss(rows(1, 4, 3).bfloat16(), rows(1, 4, 3).bfloat16(), 1.0).total.dtype
        == torch.float32
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_nt_xent(symmetric) -> None:
    a, b = (F.normalize(rows(9, 6, seed=s), dim=1) for s in (0, 1))
    expected = reference.nt_xent(a, b, 0.1, symmetric)
    torch.testing.assert_close(
        nt_xent(a, b, 0.1, symmetric).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_info_nce() -> None:
    q, k, queue = (F.normalize(rows(n, 6, seed=n), dim=1) for n in (9, 9, 30)[0:1] * 2 + (30,))
    k = F.normalize(rows(9, 6, seed=77), dim=1)
    torch.testing.assert_close(
        info_nce(q, k, queue, 0.07).double(),
        reference.info_nce(q, k, queue, 0.07),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("scale", [1, 30, 300])
def test_confident_cross_entropy(balance, scale) -> None:
    strong, weak = rows(40, 5, scale=scale).requires_grad_(), rows(40, 5, seed=1, scale=2.0)
    slow = strong.detach().double().requires_grad_()
    found = confident_cross_entropy(strong, weak, 0.6, balance)
    expected = reference.confident(slow, weak, 0.6, balance)
    assert 0 < found.count < 40 and found.count == found.mask.sum()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.backward()
    torch.testing.assert_close(strong.grad.double(), slow.grad, rtol=1e-5, atol=1e-6)


def test_nobody_confident_is_a_zero_with_a_graph() -> None:
    strong = rows(4, 3).requires_grad_()
    found = confident_cross_entropy(strong, torch.zeros(4, 3), 0.99, True)
    found.loss.backward()
    assert (
        found.loss == 0 and found.count == 0 and strong.grad is not None and not strong.grad.any()
    )


def test_confident_means_above_the_threshold_not_at_it() -> None:
    weak = torch.tensor([[0.0, 0.0], [0.1, 0.0]], dtype=torch.float64)  # probabilities .5 and .525
    found = confident_cross_entropy(torch.randn(2, 2, dtype=torch.float64), weak, 0.5, False)
    assert found.mask.tolist() == [False, True] and float(found.count) == 1
