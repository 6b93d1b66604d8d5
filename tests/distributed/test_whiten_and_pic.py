"""Whitening and power iteration clustering: equal to slow references, and bit for bit to themselves on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.neighbours import mine_neighbours
from dist_scan.search.options import NeighbourOptions
from dist_scan.search.pic import pic
from dist_scan.search.whiten import fit_table_whitening, fit_whitening, write_whitened_table
from dist_scan.world.world import current
from tests.distributed.test_search import table
from tests.reference.pic import pic as slow_pic
from tests.reference.whitening import whitened as slow_whitened
from tests.support.ranks import run_ranks


def correlated(n=700, d=40, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3 * rng.standard_normal(d)
    ).astype(np.float16)


def share(x, cut):
    """This rank's rows: contiguous, or every W-th."""
    w = current()
    return (
        x[w.rank * len(x) // w.world_size : (w.rank + 1) * len(x) // w.world_size]
        if cut == "contiguous"
        else x[w.rank :: w.world_size]
    )


def whiten_share(x, dim, cut):
    w = fit_whitening(share(x, cut), dim)
    return w.mean.tobytes(), w.components.tobytes(), w.eigenvalues.tobytes(), w.apply(x).tobytes()


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_whitening_equals_the_reference(factor) -> None:
    x = correlated().astype(np.float64) * factor
    got = fit_whitening(x, 12).apply(x)
    assert np.allclose(got, slow_whitened(x, 12), atol=2e-5)
    assert np.allclose(np.cov(got.T, bias=True), np.eye(12), atol=1e-4)


def test_whitening_equals_faiss_up_to_sign_and_scale() -> None:
    import faiss

    x = correlated().astype(np.float32)
    peer = faiss.PCAMatrix(x.shape[1], 12, -0.5)
    peer.train(x)
    got, theirs = fit_whitening(x, 12).apply(x), peer.apply(x)
    cosine = (got * theirs).sum(0) / np.linalg.norm(got, axis=0) / np.linalg.norm(theirs, axis=0)
    assert np.allclose(np.abs(cosine), 1, atol=1e-4)


def test_whitening_is_the_same_bits_on_any_number_of_ranks_and_cut() -> None:
    x = correlated()
    alone = run_ranks(whiten_share, 1, x, 12, "contiguous")[0]
    for world_size, cut in ((2, "contiguous"), (3, "strided"), (4, "contiguous")):
        for got in run_ranks(whiten_share, world_size, x, 12, cut):
            assert got == alone


def test_a_row_is_whitened_alone_as_among_others_and_for_any_number_of_threads() -> None:
    x = correlated()
    w = fit_whitening(x, 12)
    together = w.apply(x)
    torch.set_num_threads(2)
    try:
        assert (w.apply(x) == together).all()
    finally:
        torch.set_num_threads(1)
    assert (np.concatenate([w.apply(x[i : i + 1]) for i in range(50)]) == together[:50]).all()


def table_whitened(root, out):
    t = FeatureTable.open(root)
    made = write_whitened_table(t, fit_table_whitening(t, 8), out)
    return made.rows(np.arange(made.num_rows)).tobytes()


def test_a_table_is_whitened_by_shards(tmp_path: Path) -> None:
    x = correlated()
    table(x, tmp_path / "f")
    alone = run_ranks(table_whitened, 1, tmp_path / "f", tmp_path / "1")[0]
    assert all(got == alone for got in run_ranks(table_whitened, 3, tmp_path / "f", tmp_path / "3"))
    rows = np.frombuffer(alone, np.float16).reshape(len(x), 8).astype(np.float64)
    want = slow_whitened(x.astype(np.float64), 8)
    assert np.allclose(rows, want / np.linalg.norm(want, axis=1, keepdims=True), atol=2e-3)


def test_a_table_of_another_whitening_is_not_taken_up(tmp_path: Path) -> None:
    x = correlated()
    one, other = table(x, tmp_path / "f"), table(x[::-1] * 2, tmp_path / "g")
    made = write_whitened_table(one, fit_table_whitening(one, 8), tmp_path / "w").rows(
        np.arange(len(x))
    )
    assert (
        write_whitened_table(one, fit_table_whitening(one, 8), tmp_path / "w").rows(
            np.arange(len(x))
        )
        == made
    ).all()
    for source, by in ((other, other), (other, one)):
        with pytest.raises(ValueError, match="of another whitening"):
            write_whitened_table(source, fit_table_whitening(by, 8), tmp_path / "w")


def test_rows_that_cannot_be_whitened_are_refused() -> None:
    x = correlated()
    with pytest.raises(ValueError, match="allowed: \\[n, D\\]"):
        fit_whitening(x[0], 3)
    with pytest.raises(
        ValueError, match="12 rows cannot be whitened to 12 dimensions; allowed: at most 11"
    ):
        fit_whitening(x[:12], 12)
    with pytest.raises(ValueError, match="allowed: 1 to 40"):
        fit_whitening(x, 41)
    flat = x.copy()
    flat[:, 5:] = 1
    with pytest.raises(ValueError, match="vary in 5 directions only"):
        fit_whitening(flat, 6)
    broken = x.astype(np.float32)
    broken[3, 3] = np.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        fit_whitening(broken, 6)
    with pytest.raises(ValueError, match=r"give \[n, 40\]"):
        fit_whitening(x, 6).apply(x[:, :30])
    with pytest.raises(ValueError, match=r"rows \[3\] to be whitened are NaN"):
        fit_whitening(x, 6).apply(broken)
    for scale in (1e-200, 1e200):
        with pytest.raises(ValueError, match="allowed: 1e-30 to 1e30, scale them"):
            fit_whitening(x.astype(np.float64) * scale, 6)


def blobs(n=230, d=6, centres=9, seed=1):
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, d))
    x = middle[rng.integers(centres, size=n)] + 0.25 * rng.standard_normal((n, d))
    x[-6:] = 3 * rng.standard_normal((6, d))  # rows on their own: some end as singletons
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def cluster(root, sigma, teleport, iterations):
    r = pic(
        NeighbourTable.open(root), sigma=sigma, teleport=teleport, alpha=0.05, iterations=iterations
    )
    return r.assignment.tobytes(), r.num_clusters, r.num_joined


@pytest.mark.parametrize(
    "teleport, sigma, iterations, metric",
    [
        ("paper", 0.2, 200, "l2"),
        ("released", 0.2, 200, "l2"),
        ("released", 0.02, 50, "l2"),
        ("paper", 0.5, 20, "cosine"),
    ],
)
def test_pic_equals_the_reference_on_any_number_of_ranks(
    teleport, sigma, iterations, metric, tmp_path: Path
) -> None:
    neighbours = mine_neighbours(
        table(blobs(), tmp_path / "f"), tmp_path / "n", 5, NeighbourOptions(metric=metric)
    )
    ids, scores = neighbours.rows(np.arange(neighbours.num_rows))
    want, joined = slow_pic(
        ids, -scores if metric == "l2" else 2 - 2 * scores, sigma, 0.05, iterations, teleport
    )
    alone = run_ranks(cluster, 1, tmp_path / "n", sigma, teleport, iterations)[0]
    assert (np.frombuffer(alone[0], np.int32) == want).all() and alone[1] == want.max() + 1
    # at a small sigma many rows have the same v but for its last bit, which says who is alone before joining; not where they end
    assert alone[2] == joined or sigma < 0.1
    assert (
        joined > 0 or sigma > 0.1
    )  # at a small sigma the edges of rows on their own weigh nothing
    for world_size in (2, 3):
        assert all(
            got == alone
            for got in run_ranks(cluster, world_size, tmp_path / "n", sigma, teleport, iterations)
        )


def test_pic_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    t = table(blobs(), tmp_path / "f")
    with pytest.raises(ValueError, match="mined with inner_product"):
        pic(mine_neighbours(t, tmp_path / "ip", 5, NeighbourOptions(metric="inner_product")))
    n = mine_neighbours(t, tmp_path / "n", 5, NeighbourOptions(metric="l2"))
    for wrong in ({"sigma": 0.0}, {"alpha": 0.0}, {"teleport": "code"}):
        with pytest.raises(ValueError, match="allowed"):
            pic(n, **wrong)
    far = mine_neighbours(
        table((blobs() * 100).astype(np.float16), tmp_path / "far"),
        tmp_path / "m",
        5,
        NeighbourOptions(metric="l2"),
    )
    with pytest.raises(ValueError, match="raise sigma"):
        pic(far, sigma=0.01)
