"""Triton's kernels of the head step against the PyTorch form. Run by test_head_kernel.py in a process of its own: Triton decides when it is
first imported whether its interpreter runs the kernels, and PyTorch may have imported it before."""

from __future__ import annotations

import pytest
import torch

from dist_scan.heads import autograd as head_step
from dist_scan.heads import gpu_kernels as kernel
from dist_scan.heads.autograd import scan_heads_loss


def logits(b: int, clusters: int, scale: float) -> torch.Tensor:
    return torch.randn(2 * b, clusters, generator=torch.Generator().manual_seed(b)) * scale


def done(head, weight: float = 5.0):
    """(anchor sum [C], the sum of -log<p, q>) of a head whose logits become gradients; the slope from the anchor sum, as in a step."""
    total = head.anchor_sum()
    entropy_gradient = head_step.entropy_and_gradient(total / max(1, head.b), weight)[1]
    return total, head.to_gradients_(entropy_gradient, torch.tensor(0.75, dtype=total.dtype))


@pytest.mark.parametrize("scale", [1, 30, 300])
@pytest.mark.parametrize("b, clusters, columns", [(5, 7, 2048), (40, 130, 64), (3, 64, 64)])
def test_the_kernels_are_the_torch_form(
    monkeypatch: pytest.MonkeyPatch, b, clusters, columns, scale
) -> None:
    monkeypatch.setattr(
        kernel, "MOST_COLUMNS", columns
    )  # 130 columns: three blocks, the last one short
    monkeypatch.setattr(
        kernel, "ROWS_PER_SUM", 32
    )  # 40 rows: two partial sums, the second one short
    mine, given = logits(b, clusters, scale), logits(b, clusters, scale)
    slow = given.double()
    total, nll = done(kernel.KernelHead(mine, b))
    wanted_total, wanted_nll = done(
        head_step.TorchHead(slow, b, lambda rows: (given[rows].double(), given[rows + b].double()))
    )
    torch.testing.assert_close(total.double(), wanted_total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.double(), slow, rtol=1e-5, atol=1e-5)
    assert float(mine.abs().max()) > 0.1


def test_a_step_with_the_kernels_is_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    gen, sizes = torch.Generator().manual_seed(0), (7, 7, 12)
    tensors = [torch.randn(*shape, generator=gen) for shape in ((9, 6), (9, 6), (26, 6), (26,))]

    def step():
        leaves = [x.clone().requires_grad_() for x in tensors]
        terms = scan_heads_loss(*leaves, sizes, 5.0)
        (terms.total * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
        return [*terms, *(x.grad for x in leaves)]

    wanted, opened = step(), []
    monkeypatch.setattr(head_step, "uses_cpu_loops", lambda weight: False)
    monkeypatch.setattr(
        head_step,
        "make_head",
        lambda x, weight, bias: (
            opened.append(x.b) or kernel.KernelHead(x.logits(weight, bias), x.b)
        ),
    )
    for got, want in zip(step(), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert opened == [9, 9, 9]


def test_no_number_stays_no_number_and_no_row_is_no_work() -> None:
    mine = logits(4, 6, 1)
    mine[1, 2] = float("nan")
    total, nll = done(kernel.KernelHead(mine, 4))
    assert torch.isnan(total).any() and torch.isnan(nll)
    total, nll = done(kernel.KernelHead(torch.empty(0, 6), 0))
    assert total.tolist() == [0.0] * 6 and nll == 0


def test_what_the_kernels_cannot_read_is_refused() -> None:
    for bad in (logits(4, 6, 1).double(), torch.zeros(6, 8).T, logits(5, 6, 1)):
        with pytest.raises(ValueError, match="contiguous float32"):
            kernel.KernelHead(bad, 4)
