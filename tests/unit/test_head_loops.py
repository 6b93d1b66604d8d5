"""The compiled loops of the head step against the PyTorch form in float64, at logits that underflow; with any number of threads the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dist_scan.heads.autograd import make_head
from dist_scan.heads.cpu_loops import ROWS, LoopHead
from dist_scan.heads.products import FeaturePair, ScratchBuffer, as_one_tensor
from dist_scan.heads.torch_head import TorchHead, entropy_and_gradient

SCALE = 0.75


def given(b: int, clusters: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits without their bias, bias) in whole eighths: their sum is exact."""
    gen = torch.Generator().manual_seed(b)
    eighths = lambda *shape: (torch.randn(*shape, generator=gen) * size * 8).round() / 8  # noqa: E731
    return eighths(2 * b, clusters), eighths(clusters)


def done(head, weight: float = 5.0):
    """(anchor sum, the sum of -log<p, q>, gradients, their sum over rows); the slope from the anchor sum, as in a step."""
    total = head.anchor_sum().clone()
    entropy_gradient = entropy_and_gradient(total / max(1, head.b), weight)[1]
    nll = head.to_gradients_(entropy_gradient, torch.tensor(SCALE, dtype=total.dtype))
    return total, nll, head.logits, head.logits.sum(0) if head.dbias is None else head.dbias


def loops(b: int, clusters: int, size: float) -> LoopHead:
    logits, bias = given(b, clusters, size)
    whole = logits + bias
    return LoopHead(logits, bias, b, lambda rows: (whole[rows], whole[rows + b]))


@pytest.mark.parametrize("size", [1, 30, 300])
@pytest.mark.parametrize("b, clusters", [(5, 7), (ROWS + 3, 130), (2 * ROWS, 1000), (3, 1)])
def test_the_loops_are_the_torch_form(b, clusters, size) -> None:
    logits, bias = given(b, clusters, size)
    whole = (logits + bias).double()
    wanted = done(TorchHead(whole.clone(), b, lambda rows: (whole[rows], whole[rows + b])))
    found = done(loops(b, clusters, size))
    for name, got, want in zip(("anchor sum", "nll", "gradients"), found, wanted):
        atol = (
            4e-5 if name == "gradients" else 1e-5
        )  # slopes reach -87, of which float32 keeps 4e-6: anchors' gradients are differences of such numbers
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    rows = found[2].double()
    assert ((found[3] - rows.sum(0)).abs() <= 1e-6 * rows.abs().sum(0) + 1e-9).all(), (
        "dbias is the gradients' sum, as float32 adds up"
    )
    assert clusters == 1 or float(found[2].abs().max()) > 0.1


def test_exponentials_are_right_to_two_units_and_reach_no_infinity() -> None:
    import numpy as np

    from dist_scan.heads.cpu_loops import exponentials

    x = np.concatenate([-np.linspace(0, 87, 200_001), [-88.0, -200.0, -np.inf, np.nan]]).astype(
        np.float32
    )
    found, wanted = x.copy(), np.exp(x[:-4].astype(np.float64))
    exponentials(found, np.zeros_like(found), np.float32(0))
    assert float(np.abs(found[:-4] / wanted - 1).max()) < 2.5e-7 and found[0] == 1
    assert (found[-4:-1] < 2e-38).all() and np.isnan(found[-1])


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = done(loops(5 * ROWS + 1, 33, 30))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, three in zip(alone, done(loops(5 * ROWS + 1, 33, 30)), strict=True):
        assert torch.equal(one, three)


def test_no_number_stays_no_number_and_no_row_is_no_work() -> None:
    for place, value in (
        ((1, 2), float("nan")),
        ((6, 0), float("nan")),
        ((0, 0), float("inf")),
        ((1, 2), -float("nan")),
    ):
        logits, bias = given(4, 6, 1)
        logits[place] = value
        total, nll, gradients, dbias = done(
            LoopHead(logits, bias, 4, lambda rows: (logits[rows], logits[rows + 4]))
        )
        assert (
            torch.isnan(nll) and torch.isnan(gradients[place[0]]).all() and torch.isnan(dbias).all()
        )
        assert torch.isnan(total).all() == (place[0] < 4)
    total, nll, _, dbias = done(
        LoopHead(torch.empty(0, 6), torch.zeros(6), 0, lambda rows: (rows, rows))
    )
    assert total.tolist() == dbias.tolist() == [0.0] * 6 and nll == 0


def test_what_the_loops_cannot_read_is_refused_and_goes_to_pytorch() -> None:
    for bad in (given(4, 6, 1)[0].double(), torch.zeros(6, 8).T, given(5, 6, 1)[0]):
        with pytest.raises(ValueError, match="contiguous float32"):
            LoopHead(bad, torch.zeros(6), 4, lambda rows: (rows, rows))
    views, weight, bias = torch.randn(2, 4, 3), torch.randn(5, 3), torch.randn(5)
    for kind, head in ((torch.float32, LoopHead), (torch.float64, TorchHead)):
        assert isinstance(
            make_head(FeaturePair(*views, kind, apart=True), weight.to(kind), bias.to(kind)), head
        )


@pytest.mark.parametrize("b", [0, 3])
def test_rows_apart_are_rows_together(b) -> None:
    first, second, weight, bias, dlogits = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((b, 4), (b, 4), (5, 4), (5,), (2 * b, 5))
    )
    x, out = (
        torch.cat([first, second]),
        [torch.full((5, 4), torch.nan, dtype=torch.float64) for _ in range(2)],
    )
    for apart in (False, True):
        rows = FeaturePair(first, second, torch.float64, apart)
        torch.testing.assert_close(rows.logits(weight), x @ weight.T)
        torch.testing.assert_close(rows.logits(weight, bias), x @ weight.T + bias)
        rows.weight_gradient(dlogits, out[apart])
        torch.testing.assert_close(out[apart], dlogits.T @ x)
        at = torch.arange(b)[1:]
        for got, view in zip(rows.again(weight, bias)(at), (first, second), strict=True):
            torch.testing.assert_close(got, view[at] @ weight.T + bias)


def test_halves_of_one_tensor_are_one_product_without_a_copy_and_nothing_else_is() -> None:
    whole = torch.arange(32.0).view(8, 4)
    first, second = whole.chunk(2)
    assert as_one_tensor(first, second).data_ptr() == whole.data_ptr() and torch.equal(
        as_one_tensor(first, second), whole
    )
    assert (
        FeaturePair(first, second, torch.float32, apart=True).parts[0].data_ptr()
        == whole.data_ptr()
    )
    for other in (
        (second, first),
        (first, second.clone()),
        (first, whole[5:]),
        (whole[:3], whole[3:]),
        (first, second.double()),
        (whole[:, :2], whole[:, 2:]),
        (whole[0:8:2], whole[1:8:2]),
    ):
        assert as_one_tensor(*other) is None, other
        if len(other[0]) == len(other[1]):
            assert torch.equal(
                FeaturePair(*other, torch.float32, apart=False).parts[0],
                torch.cat([x.float() for x in other]),
            )


def test_one_row_views_have_strides_of_any_kind() -> None:
    x, weight = torch.arange(32.0).view(4, 8), torch.randn(5, 4)
    for first, second in (
        (x[:1, :4], x[1:2, 4:]),
        (x[:1, :4], x[:1, 4:]),
        (x[:4, :1].T, x[:4, 1:2].T),
        x[:1].chunk(2, 1),
    ):
        torch.testing.assert_close(
            FeaturePair(first, second, torch.float32, apart=True).logits(weight),
            torch.cat([first, second]) @ weight.T,
        )


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="one neighbour for each anchor"):
        FeaturePair(torch.zeros(6, 4), torch.zeros(5, 4), torch.float32, apart=True)
    with pytest.raises(ValueError, match="bias.*float64"):
        LoopHead(
            torch.zeros(8, 6), torch.zeros(6, dtype=torch.float64), 4, lambda rows: (rows, rows)
        )


def test_no_number_in_an_anchor_spoils_all_as_in_pytorch() -> None:
    from dist_scan.heads.autograd import scan_heads_by_group
    from dist_scan.heads.cpu_loops import scan_heads_in_loops
    from dist_scan.heads.products import HeadGradients

    views, weight, bias = torch.randn(2, 9, 3), torch.randn(5, 3), torch.zeros(5)
    views[0, 4, 1] = float("nan")
    x, gradients = FeaturePair(*views, torch.float32, apart=False), []
    for way in (scan_heads_in_loops, lambda *given: scan_heads_by_group(*given, whole_batch=True)):
        back = HeadGradients(x, weight, bias, (5,), features_too=True)
        assert all(torch.isnan(term).all() for term in way(x, weight, bias, back, 5.0))
        gradients.append(back.dx.isnan())
    assert torch.equal(*gradients) and gradients[0][0, :9].all()


def test_heads_of_different_sizes_hold_the_logits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_scan.heads import cpu_loops as head_loops
    from dist_scan.heads import products as head_products
    from dist_scan.heads.autograd import scan_heads_loss

    held, alive = [], []

    class Counted(head_loops.LoopHead):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            alive.append(weakref.ref(self))
            held.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(head_loops, "LoopHead", Counted)
    head_products.release_buffers()
    scan_heads_loss(
        *torch.randn(2, 8, 3),
        torch.randn(35, 3, requires_grad=True),
        torch.zeros(35),
        (5, 10, 20),
        5.0,
    ).total.sum().backward()
    assert held == [1, 1, 1] and head_products.LOGITS_BUFFER.kept.size == 16 * 20
    head_products.release_buffers()
    assert head_products.LOGITS_BUFFER.kept.size == 0


def test_threads_are_never_lent_the_same_memory() -> None:
    spare, like, wrong, interval = ScratchBuffer(), torch.zeros(1), [], sys.getswitchinterval()

    def borrow(number: int) -> None:
        for _ in range(3000):
            mine = spare.empty((4,), like)
            mine.fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(borrow, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_full_disk_only_costs_the_compiled_code(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow: numba's cache cannot be written."""
    script = (
        "import resource, torch; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from dist_scan.heads.cpu_loops import column_sums; print(column_sums(torch.ones(3, 2).numpy()))"
    )
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "[3. 3.]\n", done.stderr


@pytest.mark.parametrize("sizes", [(7, 7, 12), (200,), (3, 3)])
def test_heads_in_one_memory_are_heads_in_turn(sizes) -> None:
    from dist_scan.heads.autograd import scan_heads_by_group
    from dist_scan.heads.cpu_loops import scan_heads_in_loops
    from dist_scan.heads.products import HeadGradients

    gen = torch.Generator().manual_seed(len(sizes))
    views, weight, bias = (
        torch.randn(2, 70, 6, generator=gen) * 3,
        torch.randn(sum(sizes), 6, generator=gen),
        torch.randn(sum(sizes), generator=gen),
    )
    x = FeaturePair(*views, torch.float32, apart=False)
    made = []
    for terms in (
        lambda back: scan_heads_in_loops(x, weight, bias, back, 5.0),
        lambda back: scan_heads_by_group(x, weight, bias, back, 5.0, whole_batch=True),
    ):
        back = HeadGradients(x, weight, bias, sizes, features_too=True)
        made.append([*terms(back), back.dweight, back.dbias, back.dx])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_spare_memory_is_never_lent_twice_at_once() -> None:
    spare, like = ScratchBuffer(), torch.zeros(6, 3)
    first = spare.empty((6, 3), like)
    place, part = first.data_ptr(), first[2:3]
    assert spare.empty((6, 3), like).data_ptr() != place
    del first
    assert spare.empty((6, 3), like).data_ptr() != place, "a view of it is alive"
    leaf = torch.zeros(1, 3, requires_grad=True)
    leaf.grad = part
    del part
    assert spare.empty((6, 3), like).data_ptr() != place, "it is somebody's gradient"
    leaf.grad = None
    again = spare.empty((6, 3), like)
    assert again.data_ptr() == place and again.shape == like.shape and again.dtype == like.dtype
    assert spare.empty((7, 3), like).data_ptr() != place, "lent"
    del again
    part = spare.empty((2, 3), like)
    assert part.data_ptr() == place and part.shape == (2, 3), "less than there is"
    del part
    other = spare.empty((6, 3), torch.zeros(1, dtype=torch.float64))
    assert other.dtype == torch.float64 and other.shape == (6, 3)


def test_a_gradient_that_is_kept_is_not_written_into_by_the_next_step() -> None:
    from dist_scan.heads.autograd import scan_heads_loss

    weight, bias, kept = (
        torch.randn(10, 3, requires_grad=True),
        torch.zeros(10, requires_grad=True),
        [],
    )
    for seed in range(3):
        views = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(seed))
        scan_heads_loss(*views, weight, bias, (5, 5), 5.0).total.sum().backward()
        kept.append((weight.grad, weight.grad.clone()))
        weight.grad = None
    assert all(torch.equal(grad, copy) for grad, copy in kept) and not torch.equal(
        kept[0][0], kept[1][0]
    )
