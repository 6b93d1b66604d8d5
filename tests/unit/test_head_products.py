"""Products of features and heads, and the buffers they reuse."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dist_scan.heads.autograd import scan_heads_loss
from dist_scan.heads.products import FeaturePair, ScratchBuffer, as_one_tensor

SEPARATE, CONCATENATED = 0, 1000
"""max_head_size for which two tensors stay separate or are concatenated."""


@pytest.mark.parametrize("b", [0, 3])
@pytest.mark.parametrize("max_head_size", [SEPARATE, CONCATENATED])
def test_separate_and_concatenated_views_give_the_same_products(b: int, max_head_size: int) -> None:
    first, second, weight, bias, dlogits = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((b, 4), (b, 4), (5, 4), (5,), (2 * b, 5))
    )
    whole = torch.cat([first, second])
    x = FeaturePair(first, second, torch.float64, max_head_size)
    torch.testing.assert_close(x.logits(weight), whole @ weight.T)
    torch.testing.assert_close(x.logits(weight, bias), whole @ weight.T + bias)
    dweight = torch.full((5, 4), torch.nan, dtype=torch.float64)
    x.weight_gradient(dlogits, dweight)
    torch.testing.assert_close(dweight, dlogits.T @ whole)
    pairs = torch.arange(b)[1:]
    recomputed = x.recompute_logits(weight, bias)(pairs)
    for got, view in zip(recomputed, (first, second), strict=True):
        torch.testing.assert_close(got, view[pairs] @ weight.T + bias)


def test_halves_of_one_tensor_are_used_without_a_copy() -> None:
    whole = torch.arange(32.0).view(8, 4)
    first, second = whole.chunk(2)
    joined = as_one_tensor(first, second)
    assert joined is not None
    assert joined.data_ptr() == whole.data_ptr()
    assert torch.equal(joined, whole)
    x = FeaturePair(first, second, torch.float32, SEPARATE)
    assert x.parts[0].data_ptr() == whole.data_ptr()


def test_other_tensors_are_not_taken_for_halves_of_one() -> None:
    whole = torch.arange(32.0).view(8, 4)
    first, second = whole.chunk(2)
    for views in (
        (second, first),
        (first, second.clone()),
        (first, whole[5:]),
        (whole[:3], whole[3:]),
        (first, second.double()),
        (whole[:, :2], whole[:, 2:]),
        (whole[0:8:2], whole[1:8:2]),
    ):
        assert as_one_tensor(*views) is None, views
        if len(views[0]) == len(views[1]):
            x = FeaturePair(*views, torch.float32, CONCATENATED)
            assert torch.equal(x.parts[0], torch.cat([view.float() for view in views]))


def test_views_of_one_row_or_column_may_have_any_stride() -> None:
    x, weight = torch.arange(32.0).view(4, 8), torch.randn(5, 4)
    for first, second in (
        (x[:1, :4], x[1:2, 4:]),
        (x[:1, :4], x[:1, 4:]),
        (x[:4, :1].T, x[:4, 1:2].T),
        x[:1].chunk(2, 1),
    ):
        logits = FeaturePair(first, second, torch.float32, SEPARATE).logits(weight)
        torch.testing.assert_close(logits, torch.cat([first, second]) @ weight.T)


def test_anchors_and_neighbours_must_have_the_same_shape() -> None:
    with pytest.raises(ValueError, match="one neighbour for each anchor"):
        FeaturePair(torch.zeros(6, 4), torch.zeros(5, 4), torch.float32, SEPARATE)


def test_a_buffer_is_never_used_by_two_tensors() -> None:
    buffer, like = ScratchBuffer(), torch.zeros(6, 3)
    first = buffer.empty((6, 3), like)
    address, view = first.data_ptr(), first[2:3]
    assert buffer.empty((6, 3), like).data_ptr() != address
    del first
    assert buffer.empty((6, 3), like).data_ptr() != address, "a view of it is alive"
    leaf = torch.zeros(1, 3, requires_grad=True)
    leaf.grad = view
    del view
    assert buffer.empty((6, 3), like).data_ptr() != address, "it is the gradient of a parameter"
    leaf.grad = None
    reused = buffer.empty((6, 3), like)
    assert reused.data_ptr() == address
    assert reused.shape == like.shape
    assert reused.dtype == like.dtype
    assert buffer.empty((7, 3), like).data_ptr() != address, "in use"
    del reused
    part = buffer.empty((2, 3), like)
    assert part.data_ptr() == address, "a smaller tensor fits"
    assert part.shape == (2, 3)
    del part
    other = buffer.empty((6, 3), torch.zeros(1, dtype=torch.float64))
    assert other.dtype == torch.float64
    assert other.shape == (6, 3)


def test_two_threads_never_get_the_same_memory() -> None:
    buffer, like = ScratchBuffer(), torch.zeros(1)
    overwritten: list[int] = []

    def write_and_check(number: int) -> None:
        for _ in range(3000):
            mine = buffer.empty((4,), like)
            mine.fill_(number)
            if not bool((mine == number).all()):
                overwritten.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write_and_check, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not overwritten


def test_a_gradient_that_is_still_used_is_not_overwritten_by_the_next_step() -> None:
    weight = torch.randn(10, 3, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    gradients = []
    for seed in range(3):
        views = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(seed))
        scan_heads_loss(*views, weight, bias, (5, 5), 5.0).total.sum().backward()
        assert weight.grad is not None
        gradients.append((weight.grad, weight.grad.clone()))
        weight.grad = None
    assert all(torch.equal(gradient, copy) for gradient, copy in gradients)
    assert not torch.equal(gradients[0][0], gradients[1][0])
