"""Exact neighbours and k-means against slow references, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.monitoring.progress import StopRequested
from dist_scan.search import kmeans_checkpoint
from dist_scan.search.exact_rows import MAX_NORM_L2, LocalRows, prepare_rows, unit_rows
from dist_scan.search.kmeans import KMeansResult, kmeans
from dist_scan.search.kmeans_init import initial_centroids
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import KMeansInit, KMeansOptions, Metric, NeighbourOptions
from dist_scan.search.stopping import never_stop
from tests.reference.lloyd import lloyd
from tests.reference.neighbours import neighbours as slow_neighbours
from tests.support.feature_tables import random_rows, write_table
from tests.support.ranks import run_ranks

ALWAYS = 0.0
NEVER = 1e9


def stop_after(count: int) -> Callable[[], bool]:
    """A `stop_requested` that is true from its (count + 1)-th call on."""
    calls = iter(range(count))
    return lambda: next(calls, None) is None


def search_in_folder(
    features: Path, out: Path, k: int, metric: Metric, chunk_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, scores) of all rows."""
    options = NeighbourOptions(metric=metric, chunk_rows=chunk_rows)
    table = search_neighbours(FeatureTable.open(features), out, k, options)
    return table.rows(np.arange(table.num_rows))


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_neighbours_equal_the_reference_bit_for_bit(metric: Metric, tmp_path: Path) -> None:
    """Also with more exact duplicates of a row than it has neighbours."""
    rows = random_rows()
    write_table(rows, tmp_path / "features")
    ids, scores = slow_neighbours(rows, 20, metric)
    for world_size, chunk_rows in ((1, 65536), (1, 97), (2, 64), (3, 151), (4, 400)):
        out = tmp_path / f"{world_size}-{chunk_rows}"
        results = run_ranks(
            search_in_folder, world_size, tmp_path / "features", out, 20, metric, chunk_rows
        )
        for got_ids, got_scores in results:
            assert (got_ids == ids).all()
            assert (got_scores == scores).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_neighbours_of_long_and_short_rows(scale: float, tmp_path: Path) -> None:
    rows = (random_rows(groups=()).astype(np.float32) * scale).astype(np.float16)
    write_table(rows, tmp_path / "features")
    metrics: tuple[Metric, ...] = ("inner_product", "l2")
    for metric in metrics:
        ids, scores = slow_neighbours(rows, 5, metric)
        got_ids, got_scores = search_in_folder(
            tmp_path / "features", tmp_path / metric, 5, metric, 100
        )
        np.testing.assert_allclose(got_scores, scores, rtol=1e-4, atol=1e-6 * scale**2)
        assert (got_ids == ids).mean() > 0.99


def as_bytes(result: KMeansResult) -> tuple[bytes, bytes, float, int, int]:
    return (
        result.centroids.tobytes(),
        result.assignment.tobytes(),
        result.objective,
        result.iterations,
        result.num_splits,
    )


def cluster(features: Path, k: int, init: KMeansInit, spherical: bool) -> tuple:
    options = KMeansOptions(iterations=30, init=init, spherical=spherical, seed=3, restarts=2)
    return as_bytes(kmeans(FeatureTable.open(features), k, options))


@pytest.mark.parametrize(
    "init, spherical, groups",
    [("random", False, (200, 150)), ("kmeans++", False, ()), ("kmeans++", True, (100, 45))],
)
def test_kmeans_is_bitwise_equal_for_any_number_of_ranks(
    init: KMeansInit, spherical: bool, groups: tuple[int, ...], tmp_path: Path
) -> None:
    write_table(random_rows(groups=groups), tmp_path)
    (expected,) = run_ranks(cluster, 1, tmp_path, 40, init, spherical)
    for world_size in (2, 3, 4):
        for got in run_ranks(cluster, world_size, tmp_path, 40, init, spherical):
            assert got == expected


class KilledError(Exception):
    """Stands for a kill: it is not caught, so that nothing is written because of it."""


def cluster_for_a_while(
    features: Path,
    k: int,
    init: KMeansInit,
    spherical: bool,
    checkpoint_path: Path,
    iterations: int,
    error: type[Exception],
) -> tuple | None:
    """The result, or None if `error` ended it after so many iterations.

    With KilledError the checkpoint is written after every iteration.
    """
    is_over = stop_after(iterations)

    def stop_requested() -> bool:
        if not is_over():
            return False
        if error is KilledError:
            raise KilledError
        return True

    kmeans_checkpoint.WRITE_EVERY_S = ALWAYS if error is KilledError else NEVER
    options = KMeansOptions(iterations=30, init=init, spherical=spherical, seed=3, restarts=2)
    try:
        result = kmeans(
            FeatureTable.open(features),
            k,
            options,
            stop_requested=stop_requested,
            checkpoint_path=checkpoint_path,
        )
    except error:
        return None
    return as_bytes(result)


@pytest.mark.parametrize(
    "init, spherical, groups, error",
    [
        ("random", False, (200, 150), StopRequested),
        ("kmeans++", False, (), KilledError),
        ("kmeans++", True, (100, 45), StopRequested),
    ],
)
def test_interrupted_kmeans_continues_on_any_number_of_ranks(
    init: KMeansInit,
    spherical: bool,
    groups: tuple[int, ...],
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # This process is a rank, too: the interval is restored after the test.
    monkeypatch.setattr(kmeans_checkpoint, "WRITE_EVERY_S", NEVER)
    features = tmp_path / "features"
    write_table(random_rows(groups=groups), features)
    expected = cluster(features, 40, init, spherical)
    arguments = features, 40, init, spherical, tmp_path / "work" / "kmeans.npz", 3, error
    result, starts = None, 0
    while result is None and starts < 30:
        world_size = {1: 3, 2: 2}.get(starts, 1)
        if world_size == 1:
            result = cluster_for_a_while(*arguments)
        else:
            result = run_ranks(cluster_for_a_while, world_size, *arguments)[0]
        starts += 1
    assert result == expected, "with three iterations a start it would not end if it began anew"
    assert starts > 2


@pytest.mark.parametrize(
    "damage, message",
    [
        ("cut", "cannot be read"),
        ("garbage", "cannot be read"),
        ("empty", "cannot be read"),
        ("seed", "with other seed"),
        ("rows", "with other features"),
        ("no folder", "cannot be written"),
    ],
)
def test_kmeans_ignores_a_checkpoint_that_it_cannot_continue(
    damage: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = KMeansOptions(iterations=30, seed=3)
    table = write_table(random_rows(groups=()), tmp_path / "features")
    checkpoint = tmp_path / "work" / "kmeans.npz"
    if damage == "no folder":
        (tmp_path / "work").write_text("a file where the folder should be")
    with pytest.raises(StopRequested):
        kmeans(
            table,
            9,
            KMeansOptions(iterations=30, seed=4 if damage == "seed" else 3),
            checkpoint_path=checkpoint,
            stop_requested=stop_after(3),
        )
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-30])
    elif damage == "garbage":
        checkpoint.write_bytes(b"garbage " * 99)
    elif damage == "empty":
        checkpoint.write_bytes(b"")
    elif damage == "rows":
        table = write_table(random_rows(groups=(), seed=1), tmp_path / "other")
    expected = kmeans(table, 9, options)
    got = kmeans(table, 9, options, checkpoint_path=checkpoint)
    assert message in capsys.readouterr().out
    assert as_bytes(got) == as_bytes(expected)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_kmeans_equals_a_slow_lloyd(init: KMeansInit, tmp_path: Path) -> None:
    from dist_scan.search.index import thread_pool

    rows = random_rows(groups=())
    table = write_table(rows, tmp_path)
    options = KMeansOptions(iterations=25, init=init, seed=5)
    prepared = prepare_rows(table, normalise=False)
    with thread_pool() as pool:
        start = initial_centroids(LocalRows(prepared), 12, options, 0, pool, never_stop)
    _, assignment, objective = lloyd(rows.astype(np.float64), start / prepared.scale, 25)
    got = kmeans(table, 12, options)
    assert (got.assignment == assignment).all()
    np.testing.assert_allclose(got.objective, objective, rtol=1e-9)
    assert np.bincount(got.assignment, minlength=12).tolist() == got.sizes.tolist()


@pytest.mark.parametrize("variant", ["_assign_on_cpu", "_assign_on_device"])
@pytest.mark.parametrize("k", [1, 7, 64, 1500])
def test_nearest_centroids_are_exact_with_ties_and_near_ties(
    variant: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.search.index import NearestCentroid, thread_pool

    rng = np.random.default_rng(k)
    rows = unit_rows(rng.standard_normal((500, 24))).astype(np.float32)
    centroids = rows[rng.integers(0, 500, k)]
    centroids[k // 2 :] = centroids[: k - k // 2]  # exact ties
    centroids[::3] += np.float32(2.0**-22)  # closer to a tie than float32 can tell
    nearest = NearestCentroid(rows, float(np.linalg.norm(rows.astype(np.float64), axis=1).max()))
    monkeypatch.setattr(nearest, "_assign_on_cpu", getattr(nearest, variant))
    with thread_pool() as pool:
        got = nearest.assign(centroids, pool)
    wide = centroids.astype(np.longdouble)
    costs = (wide**2).sum(1)[None] - 2 * rows.astype(np.longdouble) @ wide.T
    assert (got == costs.argmin(1)).all()


def test_kmeans_ends_with_more_clusters_than_distinct_rows(tmp_path: Path) -> None:
    rows = np.repeat(random_rows(20, groups=()), 10, 0)
    got = kmeans(write_table(rows, tmp_path), 40, KMeansOptions(iterations=10, seed=0))
    assert got.num_splits > 0
    assert got.sizes.sum() == 200
    assert np.isfinite(got.centroids).all()


def test_complete_shards_are_kept_and_another_table_is_refused(tmp_path: Path) -> None:
    table = write_table(random_rows(), tmp_path / "features")
    out = tmp_path / "neighbours"
    search_neighbours(table, out, 5)
    removed, kept = out / "ids-00002.npy", out / "ids-00001.npy"
    written_at = kept.stat().st_mtime_ns
    before = np.load(removed)
    removed.unlink()
    search_neighbours(table, out, 5)
    assert (np.load(removed) == before).all()
    assert kept.stat().st_mtime_ns == written_at
    for k, options in ((6, NeighbourOptions()), (5, NeighbourOptions(metric="l2"))):
        with pytest.raises(ValueError, match="with other settings"):
            search_neighbours(table, out, k, options)
    reversed_rows = write_table(random_rows()[::-1].copy(), tmp_path / "reversed")
    with pytest.raises(ValueError, match="made from other features"):
        search_neighbours(reversed_rows, out, 5)


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """write_shard refuses them, but a table's files may come from elsewhere."""
    write_table(random_rows(), tmp_path / "features")
    file = tmp_path / "features" / "features-00001.npy"
    shard = np.load(file)
    shard[7, 0, 2] = np.nan
    np.save(file, shard)
    table = FeatureTable.open(tmp_path / "features")
    message = rf"rows \[{table.shard_range(1)[0] + 7}\] .* are NaN or Inf"
    with pytest.raises(ValueError, match=message):
        search_neighbours(table, tmp_path / "neighbours", 5)
    with pytest.raises(ValueError, match=message):
        kmeans(table, 3)


@pytest.mark.filterwarnings("error")
def test_a_shard_of_zero_rows_does_not_affect_the_others(tmp_path: Path) -> None:
    rows = random_rows(groups=())
    rows[80:240] = 0  # more than shard 1 of 5
    ids, scores = slow_neighbours(rows, 5, "l2")
    write_table(rows, tmp_path / "features")
    got_ids, got_scores = search_in_folder(
        tmp_path / "features", tmp_path / "neighbours", 5, "l2", 100
    )
    assert (got_ids == ids).all()
    assert (got_scores == scores).all()
    zeros = write_table(np.zeros_like(rows), tmp_path / "zeros")
    assert kmeans(zeros, 3).objective == 0


def test_a_row_that_costs_the_others_digits_gives_a_warning(tmp_path: Path) -> None:
    rows = random_rows(groups=()).astype(np.float32) * 1e-3
    rows[5] *= 1e6
    table = write_table(rows.astype(np.float16), tmp_path / "features")
    with pytest.warns(UserWarning, match="coarser grid"):
        search_neighbours(table, tmp_path / "neighbours", 5, NeighbourOptions(metric="l2"))


def test_l2_is_exact_where_squared_distances_are_largest(tmp_path: Path) -> None:
    """Opposite rows that differ in the last bit: with norms of 4 this would need 54 bits."""
    u, c = 2.0**-24, 3.5
    rows = np.array([[-c, 3 * u], *([c, j * u] for j in range(16))], np.float16)
    table = write_table(rows, tmp_path / "features")
    prepared = prepare_rows(table, False, max_norm=MAX_NORM_L2)
    _, values = prepared.read_spans([(0, 17)])
    first, *others = [[Fraction(float(value)) for value in row] for row in values]
    exact = [
        -sum((a - b) ** 2 for a, b in zip(first, other)) / Fraction(prepared.scale) ** 2
        for other in others
    ]
    order = sorted(range(16), key=lambda i: (-exact[i], i))
    ids, scores = search_in_folder(tmp_path / "features", tmp_path / "neighbours", 16, "l2", 5)
    assert (ids[0] == np.array(order) + 1).all()
    assert [Fraction(float(score)) for score in scores[0]] == [exact[i] for i in order]


@pytest.mark.parametrize(
    "options_class, settings, message",
    [
        (NeighbourOptions, {"metric": "euclid"}, "metric: euclid; allowed: cosine"),
        (NeighbourOptions, {"chunk_rows": 0}, "chunk_rows: 0; allowed: 1 or more"),
        (KMeansOptions, {"init": "first"}, "init: first; allowed: kmeans"),
        (KMeansOptions, {"seed": 2**70}, r"seed: \d+; allowed: 0 to 2"),
        (KMeansOptions, {"restarts": 0}, "restarts: 0; allowed: 1 or more"),
        (KMeansOptions, {"iterations": 0}, "iterations: 0; allowed: 1 or more"),
        (KMeansOptions, {"tolerance": float("nan")}, "tolerance: nan; allowed: at least 0"),
    ],
)
def test_options_out_of_range_are_named(
    options_class: Callable, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options_class(**settings)


def test_what_does_not_fit_the_table_is_named_before_any_work(tmp_path: Path) -> None:
    rows = random_rows()
    rows[33] = 0
    table = write_table(rows, tmp_path / "features")
    out = tmp_path / "neighbours"
    l2 = NeighbourOptions(metric="l2")
    with pytest.raises(ValueError, match=r"rows \[33\] are all zero"):
        search_neighbours(table, out, 5)
    for k in (0, 401):
        with pytest.raises(ValueError, match=f"neighbours: {k}; allowed: 1 to 400"):
            search_neighbours(table, out, k, l2)
    with pytest.raises(ValueError, match="view 1 of .*allowed: 0 to 0"):
        search_neighbours(table, out, 5, NeighbourOptions(view=1))
    with pytest.raises(ValueError, match="clusters: 402; allowed: 1 to 401"):
        kmeans(table, 402)


def test_integers_of_numpy_are_accepted(tmp_path: Path) -> None:
    table = write_table(random_rows(), tmp_path / "features")
    options = NeighbourOptions(view=np.int64(0))
    search_neighbours(table, tmp_path / "neighbours", np.int64(5), options)
    assert search_neighbours(table, tmp_path / "neighbours", 5).missing_shards() == []


def test_a_table_refuses_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    rows = random_rows()
    table = FeatureTable.create(tmp_path, (len(rows), 1, rows.shape[1]), 2)
    shard = rows[:200, None].astype(np.float32)
    shard[17, 0, 3] = np.nan
    with pytest.raises(ValueError, match=r"rows \[17\]"):
        table.write_shard(0, shard)
    shard[17, 0, 3] = 1e6
    with pytest.raises(ValueError, match=r"rows \[17\] \(1 in shard 0\) are larger than float16"):
        table.write_shard(0, shard)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "features", "num_rows": 401, "num_shards": 0, "num_views": 1, "dim": 24}',
        '{"kind": "features", "num_rows": 401, "num_shards": 5, "num_views": 1}',
        "\\x00",
        '{"kind": "features", "num_rows": "401"}',
    ],
)
def test_damaged_metadata_is_named(text: str, tmp_path: Path) -> None:
    write_table(random_rows(), tmp_path / "f")
    (tmp_path / "f" / "table.json").write_text(text)
    with pytest.raises(ValueError, match="f/table.json|has a table of None"):
        FeatureTable.open(tmp_path / "f")


@pytest.mark.parametrize("damage", ["cut", "type", "gone"])
def test_a_damaged_table_is_refused_when_it_is_opened(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "features"
    write_table(random_rows(), path)
    file = path / "features-00001.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "type":
        np.save(file, np.zeros((80, 1, 24), np.float32))
    else:
        (path / "table.json").unlink()
    with pytest.raises(ValueError, match="features"):
        FeatureTable.open(path)
    with pytest.raises(ValueError, match="features"):
        NeighbourTable.open(path)
