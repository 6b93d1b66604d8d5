"""Losses against slow float64 references, at small and very large logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_scan.losses import (
    classification_loss,
    confident_cross_entropy,
    info_nce,
    instance_discrimination_loss,
    mmdc_loss,
    nt_xent,
    scan_loss,
    scan_loss_released,
    temi_loss,
    temi_pair_weights,
)
from tests.reference import losses as reference


def random_rows(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random_rows(*shape, seed=seed), dim=1)


@pytest.mark.parametrize("scale", [1, 30, 300])
def test_scan_loss_and_gradient(scale: float) -> None:
    a, n = random_rows(3, 16, 7, scale=scale), random_rows(3, 16, 7, seed=1, scale=scale)
    leaves = [x.clone().requires_grad_() for x in (a, n)]
    exact = [x.double().requires_grad_() for x in (a, n)]
    total = scan_loss(*leaves, 5.0).total
    expected = torch.stack([reference.scan(x, y, 5.0) for x, y in zip(*exact)])
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    head_weights = torch.tensor([1.0, 2.0, 0.5])
    (total * head_weights).sum().backward()
    (expected * head_weights).sum().backward()
    for got, want in zip(leaves, exact):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)


def test_scan_gradient_by_differences() -> None:
    a, n = (random_rows(2, 4, 3, seed=s).double().requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda x, y: scan_loss(x, y, 3.0).total, (a, n))


def test_released_form_agrees_at_small_logits_and_loses_the_gradient_at_large_ones() -> None:
    a, n = random_rows(1, 8, 5), random_rows(1, 8, 5, seed=1)
    torch.testing.assert_close(scan_loss_released(a, n, 5.0).total, scan_loss(a, n, 5.0).total)
    a = torch.tensor([[[400.0, 0.0]]]).requires_grad_()
    n = torch.tensor([[[0.0, 400.0]]]).requires_grad_()
    (lost,) = torch.autograd.grad(scan_loss_released(a, n, 0.0).total.sum(), n)
    assert lost.abs().max() < 1e-6
    (exact,) = torch.autograd.grad(scan_loss(a, n, 0.0).total.sum(), n)
    assert exact.abs().max() > 0.4


def test_bfloat16_logits_give_a_float32_loss() -> None:
    logits = random_rows(1, 4, 3).bfloat16()
    assert scan_loss(logits, logits, 1.0).total.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_temi_loss(beta: float) -> None:
    sizes, b = (5, 7), 6
    student = [random_rows(2 * b, c, seed=h).double() for h, c in enumerate(sizes)]
    teacher = [random_rows(2 * b, c, seed=10 + h).double() for h, c in enumerate(sizes)]
    marginals = [random_rows(c, seed=20 + h).double().softmax(0) for h, c in enumerate(sizes)]
    teacher_log_p = [logits.log_softmax(1) for logits in teacher]
    weights = temi_pair_weights(teacher_log_p)
    losses = [
        temi_loss(logits.log_softmax(1), teacher_log_p[h], marginals[h], weights, beta)
        for h, logits in enumerate(student)
    ]
    expected = reference.temi(student, teacher, marginals, beta)
    torch.testing.assert_close(torch.stack(losses), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_nt_xent(symmetric: bool) -> None:
    a, b = (unit_rows(9, 6, seed=s) for s in (0, 1))
    expected = reference.nt_xent(a, b, 0.1, symmetric)
    loss = nt_xent(a, b, 0.1, symmetric).double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_info_nce() -> None:
    queries, keys, queue = unit_rows(9, 6, seed=9), unit_rows(9, 6, seed=77), unit_rows(30, 6)
    expected = reference.info_nce(queries, keys, queue, 0.07)
    loss = info_nce(queries, keys, queue, 0.07).double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_instance_discrimination_is_a_softmax_over_the_memory() -> None:
    z, memory, index = unit_rows(4, 6), unit_rows(20, 6, seed=1), torch.tensor([3, 19, 0, 3])
    losses = [
        torch.logsumexp(memory @ z[i] / 0.1, 0) - memory[row] @ z[i] / 0.1
        for i, row in enumerate(index)
    ]
    loss = instance_discrimination_loss(z, index, memory, 0.1)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_classification_loss_and_its_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    loss, accuracy = classification_loss(logits, torch.tensor([0, 1, 1]))
    expected = sum(float(torch.log1p(torch.tensor(x).exp())) for x in (-2.0, -1.0, 3.0)) / 3
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(accuracy) == pytest.approx(2 / 3)
    assert not accuracy.requires_grad


def test_mmdc_loss_is_the_squared_distance_over_the_dimension() -> None:
    outputs, targets = unit_rows(5, 4), unit_rows(5, 4, seed=1)
    distances = (outputs - targets).norm(dim=1)
    torch.testing.assert_close(mmdc_loss(outputs, targets), (distances**2).mean() / 4)


@pytest.mark.parametrize("class_balance", [False, True])
@pytest.mark.parametrize("scale", [1, 30, 300])
def test_confident_cross_entropy(class_balance: bool, scale: float) -> None:
    strong = random_rows(40, 5, scale=scale).requires_grad_()
    weak = random_rows(40, 5, seed=1, scale=2.0)
    exact = strong.detach().double().requires_grad_()
    found = confident_cross_entropy(strong, weak, 0.6, class_balance)
    expected = reference.confident(exact, weak, 0.6, class_balance)
    assert 0 < found.num_confident < 40
    assert found.num_confident == found.mask.sum()
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.backward()
    assert strong.grad is not None
    torch.testing.assert_close(strong.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_without_a_confident_row_the_loss_is_zero_and_has_a_graph() -> None:
    strong = random_rows(4, 3).requires_grad_()
    found = confident_cross_entropy(strong, torch.zeros(4, 3), 0.99, True)
    found.loss.backward()
    assert found.loss == 0
    assert found.num_confident == 0
    assert strong.grad is not None
    assert not strong.grad.any()


def test_confident_means_strictly_above_the_threshold() -> None:
    weak = torch.tensor([[0.0, 0.0], [0.1, 0.0]], dtype=torch.float64)  # probabilities .5 and .525
    found = confident_cross_entropy(torch.randn(2, 2, dtype=torch.float64), weak, 0.5, False)
    assert found.mask.tolist() == [False, True]
    assert float(found.num_confident) == 1
