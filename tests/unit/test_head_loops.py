"""Compiled CPU loops of the heads against the PyTorch form, also where products underflow."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_scan.heads import cpu_loops, products
from dist_scan.heads.autograd import make_head, scan_heads_by_group, scan_heads_loss
from dist_scan.heads.cpu_loops import (
    PAIRS_PER_CHUNK,
    LoopHead,
    exponentiate_row,
    scan_heads_in_loops,
)
from dist_scan.heads.products import FeaturePair, HeadGradients, RecomputeLogits
from dist_scan.heads.torch_head import Head, TorchHead, entropy_and_gradient

SCALE = 0.75


def logits_and_bias(b: int, clusters: int, size: float) -> tuple[Tensor, Tensor]:
    """(logits [2b, C] without their bias, bias [C]) in whole eighths: their sum is exact."""
    generator = torch.Generator().manual_seed(b)

    def eighths(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size * 8).round() / 8

    return eighths(2 * b, clusters), eighths(clusters)


def rows_of(logits: Tensor) -> RecomputeLogits:
    """Pairs -> their rows of logits [2b, C]."""
    b = len(logits) // 2
    return lambda pairs: (logits[pairs], logits[pairs + b])


def run_head(head: Head, weight: float = 5.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchor sum, loss, gradients, their sum over rows), with the entropy of the anchor sum."""
    total = head.anchor_sum().clone()
    _, entropy_gradient = entropy_and_gradient(total / max(1, head.num_pairs), weight)
    nll = head.to_gradients_(entropy_gradient, torch.tensor(SCALE, dtype=total.dtype))
    return total, nll, head.logits, head.logits.sum(0) if head.dbias is None else head.dbias


def loop_head(b: int, clusters: int, size: float) -> LoopHead:
    logits, bias = logits_and_bias(b, clusters, size)
    return LoopHead(logits, bias, b, rows_of(logits + bias))


@pytest.mark.parametrize("size", [1, 30, 300])
@pytest.mark.parametrize(
    "b, clusters", [(5, 7), (PAIRS_PER_CHUNK + 3, 130), (2 * PAIRS_PER_CHUNK, 1000), (3, 1)]
)
def test_loops_equal_the_torch_form(b: int, clusters: int, size: float) -> None:
    logits, bias = logits_and_bias(b, clusters, size)
    whole = (logits + bias).double()
    expected = run_head(TorchHead(whole.clone(), b, rows_of(whole)))
    found = run_head(loop_head(b, clusters, size))
    # Entropy gradients reach -87, of which float32 keeps 4e-6; gradients are differences of those.
    tolerances = {"anchor sum": 1e-5, "nll": 1e-5, "gradients": 4e-5}
    for (name, atol), got, want in zip(tolerances.items(), found, expected):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    gradients, dbias = found[2].double(), found[3]
    float32_error = 1e-6 * gradients.abs().sum(0) + 1e-9
    assert ((dbias - gradients.sum(0)).abs() <= float32_error).all()
    assert clusters == 1 or float(gradients.abs().max()) > 0.1


def test_exponentials_are_right_to_two_units_and_never_infinite() -> None:
    edges = [-88.0, -200.0, -np.inf, np.nan]
    x = np.concatenate([-np.linspace(0, 87, 200_001), edges]).astype(np.float32)
    found, expected = x.copy(), np.exp(x[:-4].astype(np.float64))
    exponentiate_row(found, np.zeros_like(found), np.float32(0))
    assert float(np.abs(found[:-4] / expected - 1).max()) < 2.5e-7
    assert found[0] == 1
    assert (found[-4:-1] < 2e-38).all()
    assert np.isnan(found[-1])


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    on_one = run_head(loop_head(5 * PAIRS_PER_CHUNK + 1, 33, 30))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    on_three = run_head(loop_head(5 * PAIRS_PER_CHUNK + 1, 33, 30))
    for one, three in zip(on_one, on_three, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    "place, value",
    [
        ((1, 2), float("nan")),
        ((6, 0), float("nan")),
        ((0, 0), float("inf")),
        ((1, 2), -float("nan")),
    ],
)
def test_nan_and_infinity_give_nan(place: tuple[int, int], value: float) -> None:
    logits, bias = logits_and_bias(4, 6, 1)
    logits[place] = value
    total, nll, gradients, dbias = run_head(LoopHead(logits, bias, 4, rows_of(logits)))
    assert torch.isnan(nll)
    assert torch.isnan(gradients[place[0]]).all()
    assert torch.isnan(dbias).all()
    is_anchor = place[0] < 4
    assert torch.isnan(total).all() == is_anchor


def test_no_rows_are_allowed() -> None:
    empty = torch.empty(0, 6)
    total, nll, _, dbias = run_head(LoopHead(empty, torch.zeros(6), 0, rows_of(empty)))
    assert total.tolist() == dbias.tolist() == [0.0] * 6
    assert nll == 0


@pytest.mark.parametrize("dtype, kind", [(torch.float32, LoopHead), (torch.float64, TorchHead)])
def test_the_dtype_decides_the_form(dtype: torch.dtype, kind: type) -> None:
    views, weight, bias = torch.randn(2, 4, 3), torch.randn(5, 3), torch.randn(5)
    x = FeaturePair(*views, dtype, max_head_size=0)
    assert isinstance(make_head(x, weight.to(dtype), bias.to(dtype)), kind)


def both_ways(
    x: FeaturePair, weight: Tensor, bias: Tensor, sizes: tuple[int, ...]
) -> list[list[Tensor]]:
    """[consistency, entropy, dweight, dbias, dx] of all heads in loops, and head by head."""
    ways: tuple[Callable[[HeadGradients], tuple[Tensor, Tensor]], ...] = (
        lambda gradients: scan_heads_in_loops(x, weight, bias, gradients, 5.0),
        lambda gradients: scan_heads_by_group(x, weight, bias, gradients, 5.0, whole_batch=True),
    )
    results = []
    for way in ways:
        gradients = HeadGradients(x, weight, bias, sizes, with_features=True)
        terms = way(gradients)
        assert gradients.dx is not None
        results.append([*terms, gradients.dweight, gradients.dbias, gradients.dx])
    return results


@pytest.mark.parametrize("sizes", [(7, 7, 12), (200,), (3, 3)])
def test_heads_that_share_memory_equal_heads_one_by_one(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    views = torch.randn(2, 70, 6, generator=generator) * 3
    weight = torch.randn(sum(sizes), 6, generator=generator)
    bias = torch.randn(sum(sizes), generator=generator)
    x = FeaturePair(*views, torch.float32, max_head_size=1000)
    for one, other in zip(*both_ways(x, weight, bias, sizes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nan_in_an_anchor_gives_nan_as_in_pytorch() -> None:
    views, weight, bias = torch.randn(2, 9, 3), torch.randn(5, 3), torch.zeros(5)
    views[0, 4, 1] = float("nan")
    x = FeaturePair(*views, torch.float32, max_head_size=1000)
    feature_gradients = []
    for consistency, entropy, _, _, dx in both_ways(x, weight, bias, (5,)):
        assert torch.isnan(consistency).all()
        assert torch.isnan(entropy).all()
        feature_gradients.append(dx.isnan())
    assert torch.equal(*feature_gradients)
    assert feature_gradients[0][0, :9].all()


def test_one_head_of_logits_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[weakref.ref[LoopHead]] = []
    counts: list[int] = []

    class CountedHead(LoopHead):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            heads.append(weakref.ref(self))
            counts.append(sum(head() is not None for head in heads))

    monkeypatch.setattr(cpu_loops, "LoopHead", CountedHead)
    products.release_buffers()
    weight = torch.randn(35, 3, requires_grad=True)
    terms = scan_heads_loss(*torch.randn(2, 8, 3), weight, torch.zeros(35), (5, 10, 20), 5.0)
    terms.total.sum().backward()
    assert counts == [1, 1, 1]
    assert products.LOGITS_BUFFER.memory.size == 16 * 20
    products.release_buffers()
    assert products.LOGITS_BUFFER.memory.size == 0


def run_script(script: str, cache_dir: Path) -> str:
    """Standard output of Python code in a process with its own cache of compiled code."""
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(cache_dir),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_compiled_code_works_without_a_writable_cache(tmp_path: Path) -> None:
    """In a process whose files may not grow: numba's cache cannot be written."""
    script = """
import resource, signal
import torch
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from dist_scan.heads.cpu_loops import column_sums
print(column_sums(torch.ones(3, 2).numpy()))
"""
    assert run_script(script, tmp_path) == "[3. 3.]\n"


def test_a_process_that_compiles_and_one_that_loads_the_cache_give_the_same_bits(
    tmp_path: Path,
) -> None:
    script = """
import torch
from dist_scan.heads.autograd import scan_heads_loss
torch.manual_seed(0)
views, weight = torch.randn(2, 33, 16), torch.randn(1000, 16, requires_grad=True)
terms = scan_heads_loss(*views, weight, torch.randn(1000), (1000,), 5.0)
terms.total.sum().backward()
print(terms.total.item().hex(), weight.grad.double().abs().sum().item().hex())
"""
    assert run_script(script, tmp_path) == run_script(script, tmp_path)
