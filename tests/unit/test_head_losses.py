"""The head step on features: losses and gradients against float64 references, at small and very large logits."""

from __future__ import annotations

import pytest
import torch

from dist_scan.heads.autograd import scan_heads_loss, temi_heads_loss
from dist_scan.heads.products import head_slices
from dist_scan.heads.torch_head import to_gradients_
from tests.reference import losses as reference

SIZES, DIM, B = (7, 7, 12), 6, 24


def rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(scale: float, features_too: bool):
    """(first, second, weight, bias) in float32, and the same as float64 leaves; logits of about `scale`, exact in float32: features
    and weights are small whole numbers, so that only the loss is measured and not the product's rounding."""
    whole = lambda *shape, seed: (rows(*shape, seed=seed) * 3).round()  # noqa: E731
    tensors = [
        whole(B, DIM, seed=0),
        whole(B, DIM, seed=1),
        whole(sum(SIZES), DIM, seed=2) * max(scale / 32, 2**-5),
        whole(sum(SIZES), seed=3),
    ]
    wanted = (features_too, features_too, True, True)
    return [
        [x.clone().to(kind).requires_grad_(w) for x, w in zip(tensors, wanted)]
        for kind in (torch.float32, torch.float64)
    ]


def gradients(leaves, loss):
    (loss * torch.tensor([1.0, 2.0, 0.5], dtype=loss.dtype)).sum().backward()
    return [x.grad.double() for x in leaves if x.requires_grad]


@pytest.mark.parametrize("scale", [1, 32, 320])
@pytest.mark.parametrize("features_too", [False, True])
def test_scan_heads(scale, features_too) -> None:
    mine, slow = given(scale, features_too)
    found = scan_heads_loss(*mine, SIZES, 5.0)
    logits = [[x @ slow[2][at].T + slow[3][at] for x in slow[:2]] for at in head_slices(SIZES)]
    assert max(float(x.detach().abs().max()) for pair in logits for x in pair) >= scale
    expected = torch.stack([reference.scan(a, n, 5.0) for a, n in logits])
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, found.consistency - 5 * found.entropy)
    for got, want in zip(gradients(mine, found.total), gradients(slow, expected), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-5 * max(1.0, float(want.abs().max()))
        )


@pytest.mark.parametrize("scale", [1, 32, 320])
def test_temi_heads(scale) -> None:
    mine, slow = given(scale, True)
    teacher = [(rows(2 * B, c, seed=9 + h) * scale / 4) for h, c in enumerate(SIZES)]
    marginals = [rows(c, seed=20 + h).softmax(0) for h, c in enumerate(SIZES)]
    found = temi_heads_loss(*mine, SIZES, [t.log_softmax(1) for t in teacher], marginals, 0.6, 0.5)
    student = [
        (torch.cat(slow[:2]) @ slow[2][at].T + slow[3][at]) / 0.5 for at in head_slices(SIZES)
    ]
    expected = reference.temi(student, teacher, marginals, 0.6)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5)
    for got, want in zip(gradients(mine, found), gradients(slow, expected), strict=True):
        if torch.isfinite(
            want
        ).all():  # the reference multiplies probabilities: its gradient is lost where they underflow, ours is not
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max()))
            )
        else:
            assert scale == 320 and torch.isfinite(got).all()


def test_rows_that_underflow_in_the_middle_of_a_block_are_done_from_their_logits() -> None:
    a, n = rows(6, 5, seed=0), rows(6, 5, seed=1)
    a[2], n[2], a[4], n[4] = (
        torch.tensor([200.0, 0, 0, 0, 0]),
        torch.tensor([0, 0, 0, 0, 190.0]),
        torch.tensor([0, 90.0, 0, 0, 0]),
        torch.tensor([0, 0, 95.0, 0, 0]),
    )
    p, q, asked = a.softmax(1), n.softmax(1), []
    slow = [x.double().requires_grad_() for x in (a, n)]
    loss = to_gradients_(
        p, q, torch.zeros(5), lambda low: asked.append(low.tolist()) or (a[low], n[low])
    )
    expected = reference.scan(*slow, 0.0) * 6
    expected.backward()
    assert asked == [[2, 4]]
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    for got, x in zip((p, q), slow):
        torch.testing.assert_close(got.double(), x.grad, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_handed_on_once() -> None:
    mine, _ = given(1, False)
    total = scan_heads_loss(*mine, SIZES, 5.0).total.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_no_number_stays_no_number() -> None:
    mine, _ = given(1, False)
    with torch.no_grad():
        mine[0][3, 1] = float("nan")
    total = scan_heads_loss(*mine, SIZES, 5.0).total
    assert torch.isnan(total).all()
