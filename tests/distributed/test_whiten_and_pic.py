"""Whitening and power iteration clustering against slow references, for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import NeighbourOptions
from dist_scan.search.pic import pic
from dist_scan.search.whiten import Whitening, fit_whitening, write_whitened_table
from tests.reference.pic import pic as slow_pic
from tests.reference.whitening import whitened as slow_whitened
from tests.support.feature_tables import write_table
from tests.support.ranks import run_ranks


def correlated_rows(n: int = 700, dim: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim))
    return (rows + 3 * rng.standard_normal(dim)).astype(np.float16)


def as_bytes(whitening: Whitening) -> list[bytes]:
    return [
        array.tobytes() for array in (whitening.mean, whitening.components, whitening.eigenvalues)
    ]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_whitening_equals_the_reference(factor: float, tmp_path: Path) -> None:
    rows = (correlated_rows().astype(np.float64) * factor).astype(np.float16)
    got = fit_whitening(write_table(rows, tmp_path), 12).apply(rows)
    np.testing.assert_allclose(got, slow_whitened(rows.astype(np.float64), 12), atol=2e-5)
    np.testing.assert_allclose(np.cov(got.T, bias=True), np.eye(12), atol=1e-4)


def test_whitening_equals_faiss_up_to_sign_and_scale(tmp_path: Path) -> None:
    import faiss

    rows = correlated_rows()
    peer = faiss.PCAMatrix(rows.shape[1], 12, -0.5)
    peer.train(rows.astype(np.float32))
    got = fit_whitening(write_table(rows, tmp_path), 12).apply(rows)
    expected = peer.apply(rows.astype(np.float32))
    norms = np.linalg.norm(got, axis=0) * np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(np.abs((got * expected).sum(0) / norms), 1, atol=1e-4)


def fit_in_rank(path: Path, dim: int) -> list[bytes]:
    return as_bytes(fit_whitening(FeatureTable.open(path), dim))


def test_whitening_is_bitwise_equal_for_any_number_of_ranks_and_shards(tmp_path: Path) -> None:
    rows = correlated_rows()
    expected = as_bytes(fit_whitening(write_table(rows, tmp_path / "1", shards=1), 12))
    for world_size, shards in ((2, 5), (3, 50), (4, 7)):
        path = tmp_path / f"{world_size}-{shards}"
        write_table(rows, path, shards)
        for got in run_ranks(fit_in_rank, world_size, path, 12):
            assert got == expected


def test_whitening_of_a_row_depends_on_neither_other_rows_nor_threads(tmp_path: Path) -> None:
    rows = correlated_rows()
    whitening = fit_whitening(write_table(rows, tmp_path), 12)
    together = whitening.apply(rows)
    torch.set_num_threads(2)
    try:
        assert (whitening.apply(rows) == together).all()
    finally:
        torch.set_num_threads(1)
    alone = np.concatenate([whitening.apply(rows[i : i + 1]) for i in range(50)])
    assert (alone == together[:50]).all()


def whiten_table_in_rank(path: Path, out: Path) -> bytes:
    table = FeatureTable.open(path)
    result = write_whitened_table(table, fit_whitening(table, 8), out)
    return result.rows(np.arange(result.num_rows)).tobytes()


def test_a_whitened_table_is_bitwise_equal_for_any_number_of_ranks(tmp_path: Path) -> None:
    rows = correlated_rows()
    write_table(rows, tmp_path / "features")
    (one,) = run_ranks(whiten_table_in_rank, 1, tmp_path / "features", tmp_path / "1")
    three = run_ranks(whiten_table_in_rank, 3, tmp_path / "features", tmp_path / "3")
    assert all(got == one for got in three)
    got = np.frombuffer(one, np.float16).reshape(len(rows), 8).astype(np.float64)
    expected = slow_whitened(rows.astype(np.float64), 8)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_a_table_of_another_whitening_is_refused(tmp_path: Path) -> None:
    rows = correlated_rows()
    first = write_table(rows, tmp_path / "first")
    second = write_table(rows[::-1] * 2, tmp_path / "second")
    index = np.arange(len(rows))
    written = write_whitened_table(first, fit_whitening(first, 8), tmp_path / "out").rows(index)
    again = write_whitened_table(first, fit_whitening(first, 8), tmp_path / "out").rows(index)
    assert (again == written).all()
    for source, fitted_to in ((second, second), (second, first)):
        with pytest.raises(ValueError, match="made from other features or with other settings"):
            write_whitened_table(source, fit_whitening(fitted_to, 8), tmp_path / "out")


def test_rows_that_cannot_be_whitened_are_refused(tmp_path: Path) -> None:
    rows = correlated_rows()
    table = write_table(rows, tmp_path / "features")
    with pytest.raises(ValueError, match="12 rows cannot be whitened to 12 .* at most 11"):
        fit_whitening(write_table(rows[:12], tmp_path / "few"), 12)
    with pytest.raises(ValueError, match="allowed: 1 to 40"):
        fit_whitening(table, 41)
    flat = rows.copy()
    flat[:, 5:] = 1
    with pytest.raises(ValueError, match="vary in 5 directions only"):
        fit_whitening(write_table(flat, tmp_path / "flat"), 6)
    with pytest.raises(ValueError, match="vary in 0 directions only"):
        fit_whitening(write_table(np.zeros_like(rows), tmp_path / "zero"), 6)

    broken = rows.copy()
    broken[3, 3] = np.inf
    whitening = fit_whitening(table, 6)
    with pytest.raises(ValueError, match=r"give \[n, 40\]"):
        whitening.apply(rows[:, :30])
    with pytest.raises(ValueError, match=r"give \[n, 40\]"):
        whitening.apply(rows[0])
    with pytest.raises(ValueError, match=r"rows \[3\] to be whitened are NaN"):
        whitening.apply(broken)
    # A table refuses such rows, but its files may come from elsewhere.
    np.save(tmp_path / "features" / "features-00000.npy", broken[:140, None])
    with pytest.raises(ValueError, match=r"rows \[3\] .* are NaN or Inf"):
        fit_whitening(FeatureTable.open(tmp_path / "features"), 6)


def blobs(n: int = 230, dim: int = 6, num_centres: int = 9, seed: int = 1) -> np.ndarray:
    """Unit rows around centres; the last six are far from all others."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_centres, dim))
    rows = centres[rng.integers(num_centres, size=n)] + 0.25 * rng.standard_normal((n, dim))
    rows[-6:] = 3 * rng.standard_normal((6, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def pic_in_rank(path: Path, sigma: float, teleport: str, iterations: int) -> tuple[bytes, int, int]:
    result = pic(
        NeighbourTable.open(path),
        sigma=sigma,
        teleport=teleport,
        alpha=0.05,
        iterations=iterations,
    )
    return result.assignment.tobytes(), result.num_clusters, result.num_joined


@pytest.mark.parametrize(
    "teleport, sigma, iterations, metric",
    [
        ("paper", 0.2, 200, "l2"),
        ("released", 0.2, 200, "l2"),
        ("released", 0.02, 50, "l2"),
        ("paper", 0.5, 20, "cosine"),
    ],
)
def test_pic_equals_the_reference_for_any_number_of_ranks(
    teleport: str, sigma: float, iterations: int, metric: str, tmp_path: Path
) -> None:
    table = write_table(blobs(), tmp_path / "features")
    neighbours = search_neighbours(
        table, tmp_path / "neighbours", 5, NeighbourOptions(metric=metric)
    )
    ids, scores = neighbours.rows(np.arange(neighbours.num_rows))
    squared_distances = -scores if metric == "l2" else 2 - 2 * scores
    expected, num_joined = slow_pic(ids, squared_distances, sigma, 0.05, iterations, teleport)
    settings = tmp_path / "neighbours", sigma, teleport, iterations
    (one,) = run_ranks(pic_in_rank, 1, *settings)
    assert (np.frombuffer(one[0], np.int32) == expected).all()
    assert one[1] == expected.max() + 1
    if sigma > 0.1:
        assert one[2] == num_joined
    else:
        # Edges of distant rows have weight 0, and many rows have a v that differs in its last bit
        # only: it decides which rows are alone before joining, but not where they end.
        assert num_joined > 0
    for world_size in (2, 3):
        assert all(got == one for got in run_ranks(pic_in_rank, world_size, *settings))


def test_pic_refuses_other_metrics_and_settings_out_of_range(tmp_path: Path) -> None:
    table = write_table(blobs(), tmp_path / "features")
    inner_product = NeighbourOptions(metric="inner_product")
    l2 = NeighbourOptions(metric="l2")
    with pytest.raises(ValueError, match="metric inner_product; allowed: l2, cosine"):
        pic(search_neighbours(table, tmp_path / "inner_product", 5, inner_product))
    neighbours = search_neighbours(table, tmp_path / "l2", 5, l2)
    for settings in ({"sigma": 0.0}, {"alpha": 0.0}, {"teleport": "code"}):
        with pytest.raises(ValueError, match="allowed"):
            pic(neighbours, **settings)
    far_apart = write_table((blobs() * 100).astype(np.float16), tmp_path / "far_apart")
    with pytest.raises(ValueError, match="raise sigma"):
        pic(search_neighbours(far_apart, tmp_path / "far_neighbours", 5, l2), sigma=0.01)
