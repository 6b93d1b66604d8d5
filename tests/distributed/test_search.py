"""Exact neighbours and k-means: equal to slow oracles, and to themselves on any number of ranks, with exact duplicates in the data."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.monitoring.progress import StopRequested
from dist_scan.search.exact_rows import MAX_NORM_L2, prepare_rows, unit_rows
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import mine_neighbours
from dist_scan.search.options import KMeansOptions, NeighbourOptions
from tests.support.ranks import run_ranks


def rows(n=401, d=24, groups=(30, 45), seed=0):
    """Random rows with groups of exact duplicates larger than K, scattered over all shards."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float16) / 4
    for i, count in enumerate(groups):
        x[rng.choice(n, count, replace=False)] = x[7 + 100 * i]
    return x.astype(np.float16)


def table(x, path, shards=5):
    t = FeatureTable.create(path, len(x), 1, x.shape[1], shards)
    for s in range(t.num_shards):
        t.write_shard(s, x[slice(*t.shard_range(s))][:, None])
    return t


def mine(root, out, k, metric, chunk):
    t = mine_neighbours(
        FeatureTable.open(root), Path(out), k, NeighbourOptions(metric=metric, chunk_rows=chunk)
    )
    return t.rows(np.arange(t.num_rows))


def oracle(x, k, metric):
    w = (unit_rows(x) if metric == "cosine" else x).astype(np.longdouble)
    s = w @ w.T
    if metric == "l2":
        s = 2 * s - (w**2).sum(1)[:, None] - (w**2).sum(1)[None]
    s = s.astype(np.float64)
    np.fill_diagonal(s, -np.inf)
    ids = np.stack([np.lexsort((np.arange(len(x)), -r))[:k] for r in s])
    return ids, np.take_along_axis(s, ids, 1)


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_neighbours_equal_the_oracle_bit_for_bit(metric, tmp_path: Path) -> None:
    x = rows()
    table(x, tmp_path / "f")
    ids, scores = oracle(x, 20, metric)
    for world_size, chunk in ((1, 65536), (1, 97), (2, 64), (3, 151), (4, 400)):
        for got in run_ranks(
            mine, world_size, tmp_path / "f", tmp_path / f"{world_size}-{chunk}", 20, metric, chunk
        ):
            assert (got[0] == ids).all() and (got[1] == scores).all(), (world_size, chunk)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_long_and_short_rows(scale, tmp_path: Path) -> None:
    x = (rows(groups=()).astype(np.float32) * scale).astype(np.float16)
    table(x, tmp_path / "f")
    for metric in ("inner_product", "l2"):
        ids, scores = oracle(x, 5, metric)
        got = mine(tmp_path / "f", tmp_path / metric, 5, metric, 100)
        assert (
            np.allclose(got[1], scores, rtol=1e-4, atol=1e-6 * scale**2)
            and (got[0] == ids).mean() > 0.99
        )


def cluster(root, k, init, spherical):
    r = kmeans(
        FeatureTable.open(root),
        k,
        KMeansOptions(iterations=30, init=init, spherical=spherical, seed=3, restarts=2),
    )
    return r.centroids.tobytes(), r.assignment.tobytes(), r.objective, r.iterations, r.num_splits


@pytest.mark.parametrize(
    "init, spherical, groups",
    [("random", False, (200, 150)), ("kmeans++", False, ()), ("kmeans++", True, (100, 45))],
)
def test_kmeans_is_the_same_on_any_number_of_ranks(init, spherical, groups, tmp_path: Path) -> None:
    table(rows(groups=groups), tmp_path / "f")
    alone = run_ranks(cluster, 1, tmp_path / "f", 40, init, spherical)[0]
    for world_size in (2, 3, 4):
        for got in run_ranks(cluster, world_size, tmp_path / "f", 40, init, spherical):
            assert got == alone


class Lost(Exception):
    """As a kill: nothing is written for it."""


def cluster_for_a_while(root, k, init, spherical, keep, most, error=StopRequested):
    """At most so many iterations, then `error`; the result when it came before. How far it is is written at every iteration when it is Lost."""
    from dist_scan.search import kmeans_checkpoint as kept

    polls = iter(range(most))

    def stop():
        over = next(polls, None) is None
        if over and error is Lost:
            raise Lost
        return over

    kept.WRITE_EVERY_S = 0 if error is Lost else 1e9
    try:
        r = kmeans(
            FeatureTable.open(root),
            k,
            KMeansOptions(iterations=30, init=init, spherical=spherical, seed=3, restarts=2),
            stop_requested=stop,
            checkpoint_path=Path(keep),
        )
    except error:
        return None
    return r.centroids.tobytes(), r.assignment.tobytes(), r.objective, r.iterations, r.num_splits


@pytest.mark.parametrize(
    "init, spherical, groups, error",
    [
        ("random", False, (200, 150), StopRequested),
        ("kmeans++", False, (), Lost),
        ("kmeans++", True, (100, 45), StopRequested),
    ],
)
def test_kmeans_goes_on_where_it_was_on_any_number_of_ranks(
    init, spherical, groups, error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dist_scan.search.kmeans_checkpoint.WRITE_EVERY_S", 1e9
    )  # and put back: this process is a rank, too
    table(rows(groups=groups), tmp_path / "f")
    given = tmp_path / "f", 40, init, spherical
    whole, found, starts = cluster(*given), None, 0
    while found is None and starts < 30:
        world_size = {1: 3, 2: 2}.get(starts, 1)
        given_now = *given, tmp_path / "work" / "kmeans.npz", 3, error
        found = (
            cluster_for_a_while(*given_now)
            if world_size == 1
            else run_ranks(cluster_for_a_while, world_size, *given_now)[0]
        )
        starts += 1
    assert found == whole and starts > 2, (
        f"{starts} starts of three iterations: from the beginning each time it would never end"
    )


@pytest.mark.parametrize(
    "what, told",
    [
        ("cut", "cannot be read"),
        ("garbage", "cannot be read"),
        ("empty", "cannot be read"),
        ("seed", "with other seed"),
        ("rows", "with other features"),
        ("no folder", "cannot be written"),
    ],
)
def test_what_is_kept_of_another_kmeans_is_left_aside_and_that_is_said(
    what, told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t, keep = table(rows(groups=()), tmp_path / "f"), tmp_path / "work" / "kmeans.npz"
    whole = kmeans(t, 9, KMeansOptions(iterations=30, seed=3))
    if what == "no folder":
        (tmp_path / "work").write_text("in the way")
    polls = iter(range(3))
    with pytest.raises(StopRequested):
        kmeans(
            t,
            9,
            KMeansOptions(iterations=30, seed=4 if what == "seed" else 3),
            checkpoint_path=keep,
            stop_requested=lambda: next(polls, None) is None,
        )
    if what in ("cut", "garbage", "empty"):
        keep.write_bytes(
            {"cut": keep.read_bytes()[:-30], "garbage": b"garbage " * 99, "empty": b""}[what]
        )
    if what == "rows":
        t = table(rows(groups=(), seed=1), tmp_path / "g")
        whole = kmeans(t, 9, KMeansOptions(iterations=30, seed=3))
    found = kmeans(t, 9, KMeansOptions(iterations=30, seed=3), checkpoint_path=keep)
    assert told in capsys.readouterr().out
    assert (
        found.centroids.tobytes() == whole.centroids.tobytes()
        and found.iterations == whole.iterations
        and (found.assignment == whole.assignment).all()
    )


def test_kmeans_equals_a_slow_lloyd(tmp_path: Path) -> None:
    from tests.reference.lloyd import lloyd

    x = rows(groups=())
    t = table(x, tmp_path / "f")
    start = x[np.random.default_rng(5).choice(len(x), 12, replace=False)].astype(np.float64)
    centroids, assignment, objective = lloyd(x.astype(np.float64), start, 25)
    got = kmeans(t, 12, KMeansOptions(iterations=25), start=start)
    assert (got.assignment == assignment).all() and np.allclose(got.objective, objective, rtol=1e-9)
    assert np.bincount(got.assignment, minlength=12).tolist() == got.sizes.tolist()


@pytest.mark.parametrize("way", ["_assign_on_cpu", "_assign_on_device"])
@pytest.mark.parametrize("k", [1, 7, 64, 1500])
def test_assignment_is_exact_with_ties_and_near_ties(way, k, tmp_path: Path) -> None:
    from dist_scan.search.index import NearestCentroid, thread_pool

    rng = np.random.default_rng(k)
    x = unit_rows(rng.standard_normal((500, 24))).astype(np.float32)
    c = x[rng.integers(0, 500, k)]
    c[k // 2 :] = c[: k - k // 2]  # exact ties
    c[::3] += np.float32(2.0**-22)  # nearer to a tie than float32 can tell
    nearest = NearestCentroid(x, float(np.linalg.norm(x.astype(np.float64), axis=1).max()))
    nearest._assign_on_cpu = getattr(nearest, way)
    with thread_pool() as pool:
        got = nearest.assign(c, pool)
    wide = c.astype(np.longdouble)
    want = ((wide**2).sum(1)[None] - 2 * x.astype(np.longdouble) @ wide.T).argmin(1)
    assert (got == want).all()


def test_more_clusters_than_distinct_rows_still_ends(tmp_path: Path) -> None:
    x = np.repeat(rows(20, groups=()), 10, 0)
    got = kmeans(table(x, tmp_path / "f"), 40, KMeansOptions(iterations=10, seed=0))
    assert got.num_splits > 0 and got.sizes.sum() == 200 and np.isfinite(got.centroids).all()


def test_finished_shards_are_kept_and_a_table_mined_otherwise_is_refused(tmp_path: Path) -> None:
    t = table(rows(), tmp_path / "f")
    mine_neighbours(t, tmp_path / "n", 5)
    file = tmp_path / "n" / "ids-00002.npy"
    stamp = (tmp_path / "n" / "ids-00001.npy").stat().st_mtime_ns
    before = np.load(file)
    file.unlink()
    mine_neighbours(t, tmp_path / "n", 5)
    assert (np.load(file) == before).all() and (
        tmp_path / "n" / "ids-00001.npy"
    ).stat().st_mtime_ns == stamp
    for k, options in ((6, NeighbourOptions()), (5, NeighbourOptions(metric="l2"))):
        with pytest.raises(ValueError, match="with other settings"):
            mine_neighbours(t, tmp_path / "n", k, options)
    other = table(rows()[::-1].copy(), tmp_path / "other")  # of the same size, even the same rows
    with pytest.raises(ValueError, match="made from other features"):
        mine_neighbours(other, tmp_path / "n", 5)


def test_rows_of_a_table_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    """Whoever wrote the shard: not by write_shard, which refuses them."""
    x = rows()
    table(x, tmp_path / "f")
    file = tmp_path / "f" / "features-00001.npy"
    shard = np.load(file)
    shard[7, 0, 2] = np.nan
    np.save(file, shard)
    t = FeatureTable.open(tmp_path / "f")
    row = t.shard_range(1)[0] + 7
    for work in (lambda: mine_neighbours(t, tmp_path / "n", 5), lambda: kmeans(t, 3)):
        with pytest.raises(ValueError, match=rf"rows \[{row}\] .* are NaN or Inf"):
            work()


@pytest.mark.filterwarnings("error")
def test_a_shard_of_zero_rows_changes_nothing_for_the_others(tmp_path: Path) -> None:
    x = rows(groups=())
    x[80:240] = 0  # shard 1 of 5 and more
    ids, scores = oracle(x, 5, "l2")
    table(x, tmp_path / "f")
    got = mine(tmp_path / "f", tmp_path / "n", 5, "l2", 100)
    assert (got[0] == ids).all() and (got[1] == scores).all()
    assert kmeans(table(np.zeros_like(x), tmp_path / "zero"), 3).objective == 0


def test_a_row_that_coarsens_all_others_is_said(tmp_path: Path) -> None:
    x = rows(groups=()).astype(np.float32) * 1e-3
    x[5] *= 1e6
    with pytest.warns(UserWarning, match="coarser grid"):
        mine_neighbours(
            table(x.astype(np.float16), tmp_path / "f"),
            tmp_path / "n",
            5,
            NeighbourOptions(metric="l2"),
        )


def test_l2_is_exact_where_squared_distances_are_largest(tmp_path: Path) -> None:
    """Rows on opposite sides, told apart by the last bit only: at norms of 4 a squared distance needed 54 bits of a float64's 53."""
    u, c = 2.0**-24, 3.5
    t = table(np.array([[-c, 3 * u], *([c, j * u] for j in range(16))], np.float16), tmp_path / "f")
    rows = prepare_rows(t, False, max_norm=MAX_NORM_L2)
    x = [[Fraction(float(v)) for v in r] for r in rows.read_spans([(0, 17)])[1]]
    exact = [-sum((a - b) ** 2 for a, b in zip(x[0], r)) / Fraction(rows.scale) ** 2 for r in x[1:]]
    want = sorted(range(16), key=lambda i: (-exact[i], i))
    ids, scores = mine(tmp_path / "f", tmp_path / "n", 16, "l2", 5)
    assert (ids[0] == np.array(want) + 1).all() and [Fraction(float(s)) for s in scores[0]] == [
        exact[i] for i in want
    ]


def test_settings_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    t = table(rows(), tmp_path / "f")
    for how, told in (
        ({"metric": "euclid"}, "metric: euclid; allowed: cosine"),
        ({"view": 1}, "view 1 of .*allowed: 0 to 0"),
        ({"chunk_rows": 0}, "chunk_rows: 0; allowed: 1 or more"),
    ):
        with pytest.raises(ValueError, match=told):
            mine_neighbours(t, tmp_path / "n", 5, NeighbourOptions(**how))
    nan = np.full((3, 24), np.nan)
    for how, told in (
        ({"init": "first"}, "init: first; allowed: kmeans"),
        ({"seed": 2**70}, "seed: .*; allowed: 0 to 2"),
        ({"restarts": 0}, "restarts: 0"),
        ({"iterations": 0}, "iterations: 0"),
    ):
        with pytest.raises(ValueError, match=told):
            KMeansOptions(**how)
    for start, told in ((nan, "72 values NaN"), ([[1.0]], r"allowed: \[3, 24\]")):
        with pytest.raises(ValueError, match=told):
            kmeans(t, 3, start=start)
    mine_neighbours(t, tmp_path / "n", np.int64(5), NeighbourOptions(view=np.int64(0)))
    assert mine_neighbours(t, tmp_path / "n", 5).missing_shards() == []


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
def test_a_damaged_list_of_facts_is_named(text, tmp_path: Path) -> None:
    table(rows(), tmp_path / "f")
    (tmp_path / "f" / "table.json").write_text(text)
    with pytest.raises(ValueError, match="f/table.json|has a table of None"):
        FeatureTable.open(tmp_path / "f")


def test_bad_input_is_named_before_work(tmp_path: Path) -> None:
    x = rows()
    t = FeatureTable.create(tmp_path / "bad", len(x), 1, x.shape[1], 2)
    broken = x[:200].astype(np.float32)[:, None].copy()
    broken[17, 0, 3] = np.nan
    with pytest.raises(ValueError, match=r"rows \[17\]"):
        t.write_shard(0, broken)
    broken[17, 0, 3] = 1e6
    with pytest.raises(ValueError, match=r"rows \[17\] are larger than float16"):
        t.write_shard(0, broken)
    x[33] = 0
    zero = table(x, tmp_path / "zero")
    with pytest.raises(ValueError, match=r"rows \[33\] are all zero"):
        mine_neighbours(zero, tmp_path / "n", 5)
    for k in (0, 401):
        with pytest.raises(ValueError, match="neighbours: .*; allowed: 1 to 400"):
            mine_neighbours(zero, tmp_path / "n", k, NeighbourOptions(metric="l2"))
    with pytest.raises(ValueError, match="clusters: 402; allowed: 1 to 401"):
        kmeans(zero, 402)
    with pytest.raises(ValueError, match="tolerance: nan"):
        kmeans(zero, 3, KMeansOptions(tolerance=float("nan")))


@pytest.mark.parametrize("damage", ["cut", "type", "gone"])
def test_a_damaged_table_is_refused_when_it_is_opened(damage, tmp_path: Path) -> None:
    t = table(rows(), tmp_path / "f")
    file = tmp_path / "f" / "features-00001.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "type":
        np.save(file, np.zeros((80, 1, 24), np.float32))
    else:
        (tmp_path / "f" / "table.json").unlink()
    with pytest.raises(ValueError, match="features"):
        FeatureTable.open(tmp_path / "f")
    assert t.num_rows == 401
    with pytest.raises(ValueError):
        NeighbourTable.open(tmp_path / "f")
