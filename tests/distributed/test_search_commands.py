"""`python -m dist_scan neighbours` and `kmeans` as a user runs them, and what survives a kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_scan.__main__ import main
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.neighbours import mine_neighbours
from dist_scan.search.options import NeighbourOptions
from dist_scan.world.spawn import first_host
from tests.distributed.test_search import oracle, rows, table
from tests.support.launches import ROOT, environment
from tests.support.ranks import CONTEXT, free_port, run_rank, run_ranks


@pytest.fixture(autouse=True)
def handlers():
    """Commands install signal handlers in this process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(*args, timeout_s=180):
    return subprocess.run(
        [sys.executable, "-m", "dist_scan", *map(str, args)],
        env=environment(PYTHONPATH=str(ROOT)),
        timeout=timeout_s,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_neighbours_of_a_npy_by_one_process_and_by_three(tmp_path: Path) -> None:
    x = rows()
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    ids, scores = oracle(x, 7, "cosine")
    for processes in (1, 3):
        done = command(
            "neighbours",
            tmp_path / "x.npy",
            tmp_path / f"{processes}",
            "--k",
            7,
            "--processes",
            processes,
            "--shards",
            5,
            "--merge",
        )
        assert done.returncode == 0, done.stderr
        assert (np.load(tmp_path / f"{processes}" / "ids.npy") == ids).all() and (
            np.load(tmp_path / f"{processes}" / "scores.npy") == scores
        ).all()
        assert f"7 neighbours of 401 rows by cosine; mean score {scores.mean():.4f}" in done.stdout


def test_kmeans_of_a_table_by_one_process_and_by_two(tmp_path: Path) -> None:
    table(rows(groups=()), tmp_path / "f")
    for processes in (1, 2):
        done = command(
            "kmeans",
            tmp_path / "f",
            tmp_path / f"{processes}",
            "--k",
            9,
            "--processes",
            processes,
            "--restarts",
            2,
        )
        assert (
            done.returncode == 0
            and "9 clusters of 401 rows; objective" in done.stdout
            and "0 empty" in done.stdout
        ), done.stderr
    one, two = (
        [(tmp_path / p / f).read_bytes() for f in ("assignments.npz", "centroids.npy")]
        for p in ("1", "2")
    )
    assert one == two


def test_kmeans_that_was_asked_to_leave_goes_on(tmp_path: Path) -> None:
    table(rows(n=8000, groups=()), tmp_path / "f")
    line = [tmp_path / "f", "--k", 400, "--restarts", 3]
    whole = command("kmeans", *line[:1], tmp_path / "whole", *line[1:])
    assert whole.returncode == 0, whole.stderr
    words = [
        sys.executable,
        "-m",
        "dist_scan",
        "kmeans",
        *map(str, [line[0], tmp_path / "out", *line[1:]]),
    ]
    process = subprocess.Popen(
        words,
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert "iterations" in process.stderr.readline()  # said when the first is done
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert (
        process.returncode == 128 + signal.SIGTERM
        and "the same command goes on" in said
        and (tmp_path / "out" / "work" / "kmeans.npz").is_file()
    ), said
    done = command("kmeans", *line[:1], tmp_path / "out", *line[1:])
    assert done.returncode == 0 and "from the beginning" not in done.stdout, (
        done.stdout + done.stderr
    )
    for file in ("assignments.npz", "centroids.npy"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "out" / "work").exists()


def test_a_mistake_on_many_ranks_is_one_line(tmp_path: Path) -> None:
    x = rows()
    x[33] = 0
    np.save(tmp_path / "x.npy", x)
    done = command("kmeans", tmp_path / "x.npy", tmp_path / "out", "--k", 4, "--processes", 2)
    lines = [line for line in done.stderr.splitlines() if "rror" in line]
    assert (
        done.returncode == 2
        and len(lines) == 1
        and lines[0].startswith("error: features of rows [33] are all zero")
    ), done.stderr


@pytest.mark.parametrize(
    "spoil, extra, told",
    [
        (lambda x: x.__setitem__((17, 3), np.nan), (), r"rows [17] (1 in shard 0) are NaN or Inf"),
        (lambda x: x.__setitem__((399, 3), -np.inf), (), r"rows [399]"),
        (
            lambda x: x.__setitem__((17, 3), 1e5),
            (),
            r"rows [17] are larger than float16's largest number, 65504",
        ),
        (lambda x: x.__setitem__(33, 0), (), r"rows [33] are all zero"),
        (lambda x: x.__setitem__(33, 1e-8), (), r"rows [33] are below float16's smallest normal"),
        (lambda x: None, ("--shards", "0"), "--shards 1 or more"),
        (lambda x: None, ("--k", "401"), "allowed: --k 1 to 400, --view 0 to 0"),
        (lambda x: None, ("--k", "0"), "allowed: --k 1 to 400"),
        (lambda x: None, ("--view", "1"), "--view 0 to 0"),
        (lambda x: None, ("--processes", "0"), "--processes: 0; allowed: 1 or more"),
    ],
)
def test_bad_input_is_said_before_any_work(
    spoil, extra, told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = rows().astype(np.float32)
    spoil(x)
    np.save(tmp_path / "x.npy", x)
    assert main(["neighbours", str(tmp_path / "x.npy"), str(tmp_path / "out"), *extra]) == 2
    assert told in capsys.readouterr().err and not list((tmp_path / "out").glob("ids-*"))


@pytest.mark.parametrize(
    "content, told",
    [
        (
            lambda p: np.save(
                p, np.array([np.zeros(3), np.zeros(4)], dtype=object), allow_pickle=True
            ),
            "is not a readable .npy",
        ),
        (lambda p: np.save(p, np.zeros((4, 3), np.int32)), "allowed: floating point"),
        (lambda p: np.save(p, np.zeros((4, 3, 2, 1), np.float32)), "allowed: floating point"),
        (lambda p: p.write_bytes(b"no npy at all"), "is not a readable .npy"),
        (lambda p: p.write_bytes(b""), "is not a readable .npy"),
        (
            lambda p: (
                np.savez(p.with_suffix(".npz"), one=np.zeros((4, 3))),
                p.with_suffix(".npz").rename(p),
            ),
            "it is an archive of ['one']",
        ),
        (lambda p: None, "does not exist"),
    ],
)
def test_files_that_hold_no_rows(
    content, told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content(tmp_path / "x.npy")
    assert main(["kmeans", str(tmp_path / "x.npy"), str(tmp_path / "out"), "--k", "2"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra, told",
    [
        (("--k", "402"), "allowed: --k 1 to 401"),
        (("--k", "3", "--tolerance", "nan"), "a tolerance of 0 up to 1"),
        (("--k", "3", "--tolerance", "-1"), "a tolerance of 0 up to 1"),
        (("--k", "3", "--seed", "-1"), "a seed of 0 to 2^63 - 1"),
        (("--k", "3", "--seed", "9" * 30), "a seed of 0 to 2^63 - 1"),
        (("--k", "3", "--view", "2"), "--view 0 to 0"),
    ],
)
def test_what_kmeans_cannot_do_is_said_before_a_file_is_touched(
    extra, told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", rows())
    assert main(["kmeans", str(tmp_path / "x.npy"), str(tmp_path / "out"), *extra]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_clusters_that_are_there_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", rows())
    assert main(["kmeans", str(tmp_path / "x.npy"), str(tmp_path / "out"), "--k", "3"]) == 0
    before = (tmp_path / "out" / "assignments.npz").read_bytes()
    assert main(["kmeans", str(tmp_path / "x.npy"), str(tmp_path / "out"), "--k", "4"]) == 2
    assert (
        "holds clusters already" in capsys.readouterr().err
        and (tmp_path / "out" / "assignments.npz").read_bytes() == before
    )


@pytest.mark.parametrize("what", ["neighbours", "kmeans"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_cannot_be_is_named(what, processes, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    (tmp_path / "file").write_text("in the way")
    done = command(what, tmp_path / "x.npy", tmp_path / "file", "--k", 3, "--processes", processes)
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and f"error: {tmp_path / 'file'}" in done.stderr
    ), done.stderr


def test_a_cut_npy_and_a_cut_table_and_tables_of_mixed_dimensions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", rows())
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:-50])
    assert (
        main(["neighbours", str(tmp_path / "x.npy"), str(tmp_path / "out")]) == 2
        and "is not a readable .npy" in capsys.readouterr().err
    )
    table(rows(), tmp_path / "f")
    np.save(tmp_path / "f" / "features-00003.npy", np.zeros((80, 1, 25), np.float16))
    assert (
        main(["neighbours", str(tmp_path / "f"), str(tmp_path / "out2")]) == 2
        and "has float16 (80, 1, 25) instead of" in capsys.readouterr().err
    )
    (tmp_path / "f" / "features-00003.npy").unlink()
    assert (
        main(["neighbours", str(tmp_path / "f"), str(tmp_path / "out3")]) == 2
        and "shard 3" in capsys.readouterr().err
    )


def test_another_npy_is_not_taken_for_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = rows()
    np.save(tmp_path / "x.npy", x)
    args = ["neighbours", str(tmp_path / "x.npy"), str(tmp_path / "out"), "--k", "3"]
    assert main(args) == 0 and main(args) == 0
    assert (
        main([*args, "--shards", "3"]) == 2
        and "another number of shards than 3" in capsys.readouterr().err
    )
    np.save(tmp_path / "x.npy", x[::-1])
    assert main(args) == 2 and "made from another file" in capsys.readouterr().err


def test_a_table_that_lies_where_the_npy_would_go_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", rows())
    table(rows(seed=1), tmp_path / "out" / "features")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out" / "features").iterdir()}
    assert (
        main(["neighbours", str(tmp_path / "x.npy"), str(tmp_path / "out")]) == 2
        and "was not made from" in capsys.readouterr().err
    )
    assert {f.name: f.read_bytes() for f in (tmp_path / "out" / "features").iterdir()} == before


def test_a_conversion_that_was_killed_goes_on(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    args = [
        "neighbours",
        str(tmp_path / "x.npy"),
        str(tmp_path / "out"),
        "--k",
        "3",
        "--shards",
        "5",
    ]
    assert main(args) == 0
    features = tmp_path / "out" / "features"
    kept = (features / "features-00001.npy").stat().st_mtime_ns
    (features / "features-00003.npy").unlink()
    assert (
        main(args) == 0
        and FeatureTable.open(features).missing_shards() == []
        and (features / "features-00001.npy").stat().st_mtime_ns == kept
    )
    (features / "table.json").unlink()  # between its source.json and its table.json
    assert main(args) == 0
    (features / "source.json").write_text("{")
    assert main(args) == 2


def test_a_table_and_a_folder_that_cannot_be_are_one_line_from_two_processes(
    tmp_path: Path,
) -> None:
    table(rows(), tmp_path / "f")
    (tmp_path / "file").write_text("in the way")
    done = command(
        "neighbours", tmp_path / "f", tmp_path / "file" / "out", "--k", 3, "--processes", 2
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and f"error: {tmp_path / 'file'}" in done.stderr
    ), done.stderr


def test_a_view_of_several_by_hand(tmp_path: Path) -> None:
    x = rows()
    np.save(tmp_path / "x.npy", np.stack([x[::-1], x], 1).astype(np.float32))
    assert (
        main(
            [
                "neighbours",
                str(tmp_path / "x.npy"),
                str(tmp_path / "out"),
                "--k",
                "7",
                "--view",
                "1",
                "--merge",
            ]
        )
        == 0
    )
    ids, scores = oracle(x, 7, "cosine")
    assert (np.load(tmp_path / "out" / "ids.npy") == ids).all() and (
        np.load(tmp_path / "out" / "scores.npy") == scores
    ).all()


def test_a_view_that_is_too_small_for_float16_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.stack([rows(), rows()], 1).astype(np.float32)
    x[33, 1] = 1e-8
    np.save(tmp_path / "x.npy", x)
    assert (
        main(["neighbours", str(tmp_path / "x.npy"), str(tmp_path / "out")]) == 2
        and "rows [33] are below" in capsys.readouterr().err
    )


def test_fewer_rows_than_ranks(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(3, groups=()))
    done = command(
        "neighbours", tmp_path / "x.npy", tmp_path / "out", "--k", 2, "--processes", 4, "--merge"
    )
    assert done.returncode == 0, done.stderr
    assert (
        np.load(tmp_path / "out" / "ids.npy") == oracle(rows(3, groups=()), 2, "cosine")[0]
    ).all()


def test_ranks_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    np.save(
        tmp_path / "x.npy", np.random.default_rng(0).standard_normal((20000, 64)).astype(np.float16)
    )
    args = ("neighbours", tmp_path / "x.npy", tmp_path / "out", "--processes", 2, "--k", 100)
    p = subprocess.Popen(
        [sys.executable, "-m", "dist_scan", *map(str, args)],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
    )
    children = Path(f"/proc/{p.pid}/task/{p.pid}/children")
    while len(ranks := children.read_text().split()) < 2:
        time.sleep(0.05)
    p.kill()
    p.wait()
    deadline = time.monotonic() + 60
    while any(alive(r) for r in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1].split()[0]
    except FileNotFoundError:
        return False


def slowly(root, out) -> None:
    """Mining in many rounds, so that there is time to kill it between shards."""
    mine_neighbours(
        FeatureTable.open(root),
        out,
        5,
        NeighbourOptions(metric="l2", chunk_rows=97, queries_per_round=50),
        stop_requested=lambda: bool(time.sleep(0.02)),
    )


def mined(root, out):
    t = mine_neighbours(
        FeatureTable.open(root),
        out,
        5,
        NeighbourOptions(metric="l2", chunk_rows=97, queries_per_round=50),
    )
    return [a.tobytes() for a in t.rows(np.arange(t.num_rows))]


@pytest.mark.parametrize("victim", [0, 1])
def test_finished_shards_survive_a_kill_and_another_number_of_ranks_goes_on(
    victim, tmp_path: Path
) -> None:
    table(rows(1200), tmp_path / "f", shards=24)
    out, port, results = tmp_path / "n", free_port(), CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(target=run_rank, args=(slowly, r, 2, port, (tmp_path / "f", out), results))
        for r in range(2)
    ]
    for p in ranks:
        p.start()
    while len(list(out.glob("scores-*.npy"))) < 6:
        assert all(p.exitcode is None for p in ranks)
        time.sleep(0.005)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    for p in ranks:
        p.join(60)
    assert ranks[victim].exitcode == -signal.SIGKILL and ranks[1 - victim].exitcode not in (
        0,
        None,
    )  # the other does not wait for ever
    kept = {f.name: f.stat().st_mtime_ns for f in out.glob("scores-*.npy")}
    left = NeighbourTable.open(out).missing_shards()
    assert len(kept) >= 6 and 0 < len(left) < 24
    got = run_ranks(mined, 3, tmp_path / "f", out)[0]
    assert got == run_ranks(mined, 1, tmp_path / "f", tmp_path / "whole")[0]
    redone = [name for name, stamp in kept.items() if (out / name).stat().st_mtime_ns != stamp]
    assert (
        len(redone) <= 2
    )  # a shard whose ids were there and whose scores were not: at most one a rank


def half_held(root, out, k):
    """Each rank has only its own shards' files."""
    from dist_scan.world.world import current

    rank = current().rank
    return mined_ids(
        mine_neighbours(
            FeatureTable.open(Path(root) / f"disk{rank}"),
            Path(out) / f"disk{rank}",
            k,
            NeighbourOptions(metric="inner_product", chunk_rows=90),
        )
    )


def mined_ids(t):
    have = sorted(set(range(t.num_shards)) - set(t.missing_shards()))
    return {s: [a.tobytes() for a in t.rows(np.arange(*t.shard_range(s)))] for s in have}


def test_rows_need_not_lie_where_every_rank_can_read_them(tmp_path: Path) -> None:
    x = rows()
    for rank, mine in enumerate(((0, 3), (1, 4), (2,))):
        t = table(x, tmp_path / f"disk{rank}")
        for s in set(range(5)) - set(mine):
            t._file(s, "features").unlink()
    ids, scores = oracle(x, 6, "inner_product")
    found = {}
    for rank, shards in enumerate(run_ranks(half_held, 3, tmp_path, tmp_path / "out", 6)):
        assert set(shards) == set(((0, 3), (1, 4), (2,))[rank])
        found |= shards
    for s, (i, v) in found.items():
        a, b = s * 401 // 5, (s + 1) * 401 // 5
        assert (np.frombuffer(i, np.int64).reshape(-1, 6) == ids[a:b]).all() and (
            np.frombuffer(v).reshape(-1, 6) == scores[a:b]
        ).all()


def mean_and_std(root):
    return [a.tobytes() for a in FeatureTable.open(root).mean_and_std()]


def test_mean_and_std_are_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    x = rows()
    table(x, tmp_path / "f")
    alone = run_ranks(mean_and_std, 1, tmp_path / "f")[0]
    assert all(got == alone for got in run_ranks(mean_and_std, 3, tmp_path / "f"))
    mean, deviation = (np.frombuffer(a) for a in alone)
    assert np.allclose(mean, x.astype(np.float64).mean(0)) and np.allclose(
        deviation, x.astype(np.float64).std(0)
    )


def test_the_first_host_of_a_slurm_node_list() -> None:
    assert [first_host(n) for n in ("node[03-07,9],other", "a,b", "gpu-[1-4]", "x[11]", "one")] == [
        "node03",
        "a",
        "gpu-1",
        "x11",
        "one",
    ]
