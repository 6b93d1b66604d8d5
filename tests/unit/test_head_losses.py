"""Fused losses of heads on features against `losses` in float64, at small and very large logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_scan.heads.autograd import TemiObjective, scan_heads_loss, temi_heads_loss
from dist_scan.heads.products import head_slices
from dist_scan.heads.torch_head import probabilities_to_gradients_
from dist_scan.losses import scan_loss, temi_loss, temi_pair_weights

SIZES, DIM, B = (7, 7, 12), 6, 24


def random_rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_leaves(scale: float, with_features: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(anchors, neighbours, weight, bias) as float32 leaves, and the same in float64.

    Logits are of about `scale`. Features and weights are small whole numbers, so that logits are
    exact in float32 and only the loss is measured, not the rounding of the product.
    """

    def whole_numbers(*shape: int, seed: int) -> Tensor:
        return (random_rows(*shape, seed=seed) * 3).round()

    tensors = [
        whole_numbers(B, DIM, seed=0),
        whole_numbers(B, DIM, seed=1),
        whole_numbers(sum(SIZES), DIM, seed=2) * max(scale / 32, 2**-5),
        whole_numbers(sum(SIZES), seed=3),
    ]
    needs_gradient = (with_features, with_features, True, True)

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        return [
            x.clone().to(dtype).requires_grad_(needed) for x, needed in zip(tensors, needs_gradient)
        ]

    return leaves(torch.float32), leaves(torch.float64)


def head_logits(leaves: list[Tensor], head: slice) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of the anchors and of the neighbours."""
    anchors, neighbours, weight, bias = leaves
    return anchors @ weight[head].T + bias[head], neighbours @ weight[head].T + bias[head]


def gradients(leaves: list[Tensor], loss_H: Tensor) -> list[Tensor]:
    (loss_H * torch.tensor([1.0, 2.0, 0.5], dtype=loss_H.dtype)).sum().backward()
    return [x.grad.double() for x in leaves if x.grad is not None]


@pytest.mark.parametrize("scale", [1, 32, 320])
@pytest.mark.parametrize("with_features", [False, True])
def test_scan_heads_loss_equals_scan_loss(scale: float, with_features: bool) -> None:
    fused, plain = make_leaves(scale, with_features)
    terms = scan_heads_loss(*fused, SIZES, 5.0)
    logits = [head_logits(plain, head) for head in head_slices(SIZES)]
    assert max(float(x.detach().abs().max()) for pair in logits for x in pair) >= scale
    expected = torch.cat([scan_loss(a[None], n[None], 5.0).total for a, n in logits])
    torch.testing.assert_close(terms.total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.total, terms.consistency - 5 * terms.entropy)
    for got, want in zip(gradients(fused, terms.total), gradients(plain, expected), strict=True):
        atol = 1e-5 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("scale", [1, 32, 320])
def test_temi_heads_loss_equals_temi_loss(scale: float) -> None:
    fused, plain = make_leaves(scale, with_features=True)
    teacher = [random_rows(2 * B, c, seed=9 + h) * scale / 4 for h, c in enumerate(SIZES)]
    teacher_log_p = [logits.log_softmax(1) for logits in teacher]
    marginals = [random_rows(c, seed=20 + h).softmax(0) for h, c in enumerate(SIZES)]
    objective = TemiObjective(teacher_log_p, marginals, beta=0.6, temperature=0.5)
    losses = temi_heads_loss(*fused, SIZES, objective)

    exact_log_p = [logits.double().log_softmax(1) for logits in teacher]
    pair_weights = temi_pair_weights(exact_log_p)
    plain_losses = []
    for h, head in enumerate(head_slices(SIZES)):
        student_log_p = (torch.cat(head_logits(plain, head)) / 0.5).log_softmax(1)
        plain_losses.append(
            temi_loss(student_log_p, exact_log_p[h], marginals[h].double(), pair_weights, 0.6)
        )
    expected = torch.stack(plain_losses)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=1e-5)
    for got, want in zip(gradients(fused, losses), gradients(plain, expected), strict=True):
        atol = 1e-5 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)


def test_underflowed_rows_are_recomputed_from_their_logits() -> None:
    a, n = random_rows(6, 5, seed=0), random_rows(6, 5, seed=1)
    a[2] = torch.tensor([200.0, 0, 0, 0, 0])
    n[2] = torch.tensor([0, 0, 0, 0, 190.0])
    a[4] = torch.tensor([0, 90.0, 0, 0, 0])
    n[4] = torch.tensor([0, 0, 95.0, 0, 0])
    recomputed: list[list[int]] = []

    def recompute_logits(rows: Tensor) -> tuple[Tensor, Tensor]:
        recomputed.append(rows.tolist())
        return a[rows], n[rows]

    p, q = a.softmax(1), n.softmax(1)
    nll = probabilities_to_gradients_(p, q, torch.zeros(5), recompute_logits)
    plain = [x.double().requires_grad_() for x in (a, n)]
    expected = scan_loss(plain[0][None], plain[1][None], 0.0).total.sum() * 6
    expected.backward()
    assert recomputed == [[2, 4]]
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for got, x in zip((p, q), plain):
        torch.testing.assert_close(got.double(), x.grad, rtol=1e-5, atol=1e-5)


def test_the_gradient_can_be_taken_once() -> None:
    fused, _ = make_leaves(1, with_features=False)
    total = scan_heads_loss(*fused, SIZES, 5.0).total.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_nan_in_a_feature_gives_nan() -> None:
    fused, _ = make_leaves(1, with_features=False)
    with torch.no_grad():
        fused[0][3, 1] = float("nan")
    assert torch.isnan(scan_heads_loss(*fused, SIZES, 5.0).total).all()
