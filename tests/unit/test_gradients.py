"""The check for finite gradients, which decides whether an update is applied."""

from __future__ import annotations

import pytest
import torch

from dist_scan.engine.optimizer import all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_a_single_non_finite_number_is_found(value: float, position: int) -> None:
    gradients = [torch.randn(3, 5), torch.randn(7)]
    assert all_finite(gradients)
    gradients[position].view(-1)[4] = value
    assert not all_finite(gradients)


def test_large_numbers_are_finite() -> None:
    """Their squares, and their sum, are beyond float32."""
    large = torch.full((100,), 1e30)
    assert all_finite([large, torch.full((3,), -3e38)])
    assert not all_finite([large, torch.tensor([float("nan")])])


def test_no_gradients_are_finite() -> None:
    assert all_finite([])
