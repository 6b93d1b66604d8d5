"""What the loop refuses to apply: a gradient with a number that is none, and no other."""

from __future__ import annotations

import pytest
import torch

from dist_scan.engine.optimizer import all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_one_number_that_is_none_is_found(value, place) -> None:
    gradients = [torch.randn(3, 5), torch.randn(7)]
    assert all_finite(gradients)
    gradients[place].view(-1)[4] = value
    assert not all_finite(gradients)


def test_large_numbers_are_numbers() -> None:
    """Their squares are beyond fp32, and so is their sum."""
    assert all_finite([torch.full((100,), 1e30), torch.full((3,), -3e38)]) and not all_finite(
        [torch.full((100,), 1e30), torch.tensor([float("nan")])]
    )


def test_no_gradient_is_finite() -> None:
    assert all_finite([])
