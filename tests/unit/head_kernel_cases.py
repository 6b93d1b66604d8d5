"""Triton kernels of the heads against the PyTorch form.

Run by test_head_kernel.py in a process of its own: Triton decides when it is first imported whether
its interpreter runs the kernels, and PyTorch may have imported it before.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_scan.heads import autograd, gpu_kernels
from dist_scan.heads.autograd import scan_heads_loss
from dist_scan.heads.gpu_kernels import KernelHead
from dist_scan.heads.products import FeaturePair
from dist_scan.heads.torch_head import Head, TorchHead, entropy_and_gradient


def random_logits(b: int, clusters: int, scale: float) -> Tensor:
    return torch.randn(2 * b, clusters, generator=torch.Generator().manual_seed(b)) * scale


def run_head(head: Head, weight: float = 5.0) -> tuple[Tensor, Tensor]:
    """(anchor sum [C], loss) of a head whose logits become gradients."""
    total = head.anchor_sum()
    _, entropy_gradient = entropy_and_gradient(total / max(1, head.num_pairs), weight)
    return total, head.to_gradients_(entropy_gradient, torch.tensor(0.75, dtype=total.dtype))


@pytest.mark.parametrize("scale", [1, 30, 300])
@pytest.mark.parametrize("b, clusters, max_columns", [(5, 7, 2048), (40, 130, 64), (3, 64, 64)])
def test_kernels_equal_the_torch_form(
    monkeypatch: pytest.MonkeyPatch, b: int, clusters: int, max_columns: int, scale: float
) -> None:
    # 130 columns: three blocks, the last one short
    monkeypatch.setattr(gpu_kernels, "MAX_COLUMNS", max_columns)
    # 40 rows: two partial sums, the second one short
    monkeypatch.setattr(gpu_kernels, "ROWS_PER_SUM", 32)
    logits = random_logits(b, clusters, scale)
    original = random_logits(b, clusters, scale).double()
    expected = original.clone()
    total, nll = run_head(KernelHead(logits, b))
    expected_total, expected_nll = run_head(
        TorchHead(expected, b, lambda pairs: (original[pairs], original[pairs + b]))
    )
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert float(logits.abs().max()) > 0.1


def test_a_step_with_kernels_equals_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 6), (9, 6), (26, 6), (26,))
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]

    def step() -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        terms = scan_heads_loss(*leaves, (7, 7, 12), 5.0)
        (terms.total * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
        return [*terms, *(x.grad for x in leaves)]

    num_pairs: list[int] = []

    def make_kernel_head(x: FeaturePair, weight: Tensor, bias: Tensor) -> KernelHead:
        num_pairs.append(x.num_pairs)
        return KernelHead(x.logits(weight, bias), x.num_pairs)

    expected = step()
    monkeypatch.setattr(autograd, "uses_cpu_loops", lambda weight: False)
    monkeypatch.setattr(autograd, "make_head", make_kernel_head)
    for got, want in zip(step(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert num_pairs == [9, 9, 9]


def test_nan_gives_nan_and_no_rows_are_allowed() -> None:
    logits = random_logits(4, 6, 1)
    logits[1, 2] = float("nan")
    total, nll = run_head(KernelHead(logits, 4))
    assert torch.isnan(total).any()
    assert torch.isnan(nll)
    total, nll = run_head(KernelHead(torch.empty(0, 6), 0))
    assert total.tolist() == [0.0] * 6
    assert nll == 0
