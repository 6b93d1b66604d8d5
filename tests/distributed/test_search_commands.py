"""`python -m dist_scan neighbours` and `kmeans` as a user runs them; interruptions and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_scan.__main__ import main
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import NeighbourOptions
from dist_scan.search.stopping import never_stop
from dist_scan.world.spawn import first_host
from dist_scan.world.world import current
from tests.reference.neighbours import neighbours as slow_neighbours
from tests.support.feature_tables import random_rows, write_table
from tests.support.launches import ROOT, environment
from tests.support.ranks import CONTEXT, free_port, run_rank, run_ranks

CLUSTER_FILES = ("assignments.npz", "centroids.npy")


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """Commands install signal handlers in this process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*args: object) -> subprocess.Popen[str]:
    """Start `python -m dist_scan ARGS`."""
    return subprocess.Popen(
        [sys.executable, "-m", "dist_scan", *map(str, args)],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m dist_scan ARGS` in a process of its own."""
    process = start(*args)
    out, errors = process.communicate(timeout=180)
    return process.returncode, out, errors


def run_here(*args: object) -> int:
    """Exit code of `python -m dist_scan ARGS`, run in this process."""
    return main([str(arg) for arg in args])


def save_rows(path: Path, rows: np.ndarray) -> Path:
    np.save(path, rows)
    return path


def test_neighbours_of_a_npy_with_one_and_three_processes(tmp_path: Path) -> None:
    rows = random_rows()
    npy = save_rows(tmp_path / "rows.npy", rows.astype(np.float32))
    ids, scores = slow_neighbours(rows, 7, "cosine")
    summary = f"7 neighbours of 401 rows by cosine; mean score {scores.mean():.4f}"
    options = "--k", 7, "--shards", 5, "--merge", "--processes"
    for processes in (1, 3):
        out = tmp_path / f"{processes}"
        code, printed, errors = run("neighbours", npy, out, *options, processes)
        assert code == 0, errors
        assert (np.load(out / "ids.npy") == ids).all()
        assert (np.load(out / "scores.npy") == scores).all()
        assert summary in printed


def test_kmeans_of_a_table_with_one_and_two_processes(tmp_path: Path) -> None:
    write_table(random_rows(groups=()), tmp_path / "features")
    files = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        code, printed, errors = run(
            "kmeans",
            tmp_path / "features",
            out,
            "--k",
            9,
            "--restarts",
            2,
            "--processes",
            processes,
        )
        assert code == 0, errors
        assert "9 clusters of 401 rows; objective" in printed
        assert "0 empty" in printed
        files.append([(out / name).read_bytes() for name in CLUSTER_FILES])
    assert files[0] == files[1]


def test_interrupted_kmeans_continues(tmp_path: Path) -> None:
    features, whole, out = (tmp_path / name for name in ("features", "whole", "out"))
    write_table(random_rows(n=8000, groups=()), features)
    options = "--k", 400, "--restarts", 3
    code, _, errors = run("kmeans", features, whole, *options)
    assert code == 0, errors

    process = start("kmeans", features, out, *options)
    assert process.stderr is not None
    assert "iterations" in process.stderr.readline()  # printed after the first iteration
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "the same command continues" in printed
    assert (out / "work" / "kmeans.npz").is_file()

    code, printed, errors = run("kmeans", features, out, *options)
    assert code == 0, errors
    assert "from the beginning" not in printed
    for name in CLUSTER_FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "work").exists()


def test_an_error_on_several_ranks_is_one_line(tmp_path: Path) -> None:
    rows = random_rows()
    rows[33] = 0
    npy = save_rows(tmp_path / "rows.npy", rows)
    code, _, errors = run("kmeans", npy, tmp_path / "out", "--k", 4, "--processes", 2)
    assert code == 2, errors
    (line,) = [line for line in errors.splitlines() if "rror" in line]
    assert line.startswith("error: features of rows [33] are all zero")


@pytest.mark.parametrize(
    "place, value, message",
    [
        ((17, 3), np.nan, "rows [17] (1 in shard 0) are NaN or Inf"),
        ((399, 3), -np.inf, "rows [399]"),
        ((17, 3), 1e5, "rows [17] (1 in shard 0) are larger than float16's largest number, 65504"),
        (33, 0, "rows [33] are all zero"),
        (33, 1e-8, "features of rows [33] (1 in shard 1) are below float16's smallest"),
    ],
)
def test_unusable_rows_are_named_before_any_work(
    place: int | tuple[int, int],
    value: float,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = random_rows().astype(np.float32)
    rows[place] = value
    out = tmp_path / "out"
    assert run_here("neighbours", save_rows(tmp_path / "rows.npy", rows), out) == 2
    assert message in capsys.readouterr().err
    assert not list(out.glob("ids-*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shards", 0), "--shards: 0; allowed: 1 or more"),
        (("--k", 401), "--k: 401; allowed: 1 to 400"),
        (("--k", 0), "--k: 0; allowed: 1 to 400"),
        (("--view", 1), "--view: 1; allowed: 0 to 0"),
        (("--processes", 0), "--processes: 0; allowed: 1 or more"),
    ],
)
def test_neighbours_refuses_arguments_out_of_range(
    options: tuple[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    assert run_here("neighbours", npy, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--k", 402), "--k: 402; allowed: 1 to 401"),
        (("--k", 3, "--tolerance", "nan"), "tolerance: nan; allowed: at least 0 and less than 1"),
        (("--k", 3, "--tolerance", -1), "tolerance: -1.0; allowed: at least 0 and less than 1"),
        (("--k", 3, "--seed", -1), "seed: -1; allowed: 0 to 2^63 - 1"),
        (("--k", 3, "--seed", "9" * 30), "allowed: 0 to 2^63 - 1"),
        (("--k", 3, "--view", 2), "--view: 2; allowed: 0 to 0"),
        (("--k", 3, "--spherical", "--raw"), "leave out --raw"),
    ],
)
def test_kmeans_refuses_arguments_out_of_range(
    options: tuple[object, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    assert run_here("kmeans", npy, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def save_objects(path: Path) -> None:
    ragged = np.array([np.zeros(3), np.zeros(4)], dtype=object)
    np.save(path, ragged, allow_pickle=True)


def save_archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), one=np.zeros((4, 3)))
    path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize(
    "write, message",
    [
        (save_objects, "is not a readable .npy"),
        (lambda path: np.save(path, np.zeros((4, 3), np.int32)), "allowed: floating point"),
        (lambda path: np.save(path, np.zeros((4, 3, 2, 1), "f")), "allowed: floating point"),
        (lambda path: path.write_bytes(b"not a npy"), "is not a readable .npy"),
        (lambda path: path.write_bytes(b""), "is not a readable .npy"),
        (save_archive, "archive of ['one']"),
        (lambda path: None, "does not exist"),
    ],
)
def test_files_without_rows_are_refused(
    write: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "rows.npy")
    assert run_here("kmeans", tmp_path / "rows.npy", tmp_path / "out", "--k", 2) == 2
    assert message in capsys.readouterr().err


def test_existing_clusters_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npy, out = save_rows(tmp_path / "rows.npy", random_rows()), tmp_path / "out"
    assert run_here("kmeans", npy, out, "--k", 3) == 0
    before = (out / "assignments.npz").read_bytes()
    assert run_here("kmeans", npy, out, "--k", 4) == 2
    assert "already has clusters" in capsys.readouterr().err
    assert (out / "assignments.npz").read_bytes() == before


@pytest.mark.parametrize("command", ["neighbours", "kmeans"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_output_folder_that_is_a_file_is_named(
    command: str, processes: int, tmp_path: Path
) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    (tmp_path / "file").write_text("not a folder")
    code, _, errors = run(command, npy, tmp_path / "file", "--k", 3, "--processes", processes)
    assert code == 2
    assert "Traceback" not in errors
    assert f"error: {tmp_path / 'file'}" in errors


def test_a_table_and_an_output_folder_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    write_table(random_rows(), tmp_path / "features")
    (tmp_path / "file").write_text("not a folder")
    code, _, errors = run(
        "neighbours", tmp_path / "features", tmp_path / "file" / "out", "--k", 3, "--processes", 2
    )
    assert code == 2
    assert "Traceback" not in errors
    assert f"error: {tmp_path / 'file'}" in errors


def test_damaged_features_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    npy.write_bytes(npy.read_bytes()[:-50])
    assert run_here("neighbours", npy, tmp_path / "out") == 2
    assert "is not a readable .npy" in capsys.readouterr().err

    features = tmp_path / "features"
    write_table(random_rows(), features)
    shard = features / "features-00003.npy"
    np.save(shard, np.zeros((80, 1, 25), np.float16))
    assert run_here("neighbours", features, tmp_path / "out2") == 2
    assert "has float16 (80, 1, 25) instead of" in capsys.readouterr().err
    shard.unlink()
    assert run_here("neighbours", features, tmp_path / "out3") == 2
    assert "shard 3" in capsys.readouterr().err


def test_another_npy_than_the_first_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    arguments = "neighbours", npy, tmp_path / "out", "--k", 3
    assert run_here(*arguments) == 0
    assert run_here(*arguments) == 0
    assert run_here(*arguments, "--shards", 3) == 2
    assert "another number of shards than 3" in capsys.readouterr().err
    save_rows(npy, random_rows()[::-1])
    assert run_here(*arguments) == 2
    assert "made from another file" in capsys.readouterr().err


def test_a_table_at_the_place_of_the_converted_npy_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    features = tmp_path / "out" / "features"
    write_table(random_rows(seed=1), features)
    before = {file.name: file.read_bytes() for file in features.iterdir()}
    assert run_here("neighbours", npy, tmp_path / "out") == 2
    assert "was not made from" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in features.iterdir()} == before


def test_an_interrupted_conversion_of_a_npy_continues(tmp_path: Path) -> None:
    npy = save_rows(tmp_path / "rows.npy", random_rows())
    features = tmp_path / "out" / "features"
    arguments = "neighbours", npy, tmp_path / "out", "--k", 3, "--shards", 5
    assert run_here(*arguments) == 0
    written_at = (features / "features-00001.npy").stat().st_mtime_ns
    (features / "features-00003.npy").unlink()
    assert run_here(*arguments) == 0
    assert FeatureTable.open(features).missing_shards() == []
    assert (features / "features-00001.npy").stat().st_mtime_ns == written_at
    (features / "table.json").unlink()  # source.json is written before it
    assert run_here(*arguments) == 0
    (features / "source.json").write_text("{")
    assert run_here(*arguments) == 2


def test_neighbours_of_one_of_several_views(tmp_path: Path) -> None:
    rows = random_rows()
    views = np.stack([rows[::-1], rows], 1).astype(np.float32)
    npy, out = save_rows(tmp_path / "rows.npy", views), tmp_path / "out"
    assert run_here("neighbours", npy, out, "--k", 7, "--view", 1, "--merge") == 0
    ids, scores = slow_neighbours(rows, 7, "cosine")
    assert (np.load(out / "ids.npy") == ids).all()
    assert (np.load(out / "scores.npy") == scores).all()


def test_a_view_too_small_for_float16_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = np.stack([random_rows(), random_rows()], 1).astype(np.float32)
    views[33, 1] = 1e-8
    npy = save_rows(tmp_path / "rows.npy", views)
    assert run_here("neighbours", npy, tmp_path / "out") == 2
    assert "rows [33] (1 in shard 1) are below float16" in capsys.readouterr().err


def test_fewer_rows_than_ranks(tmp_path: Path) -> None:
    rows = random_rows(3, groups=())
    npy, out = save_rows(tmp_path / "rows.npy", rows), tmp_path / "out"
    code, _, errors = run("neighbours", npy, out, "--k", 2, "--processes", 4, "--merge")
    assert code == 0, errors
    assert (np.load(out / "ids.npy") == slow_neighbours(rows, 2, "cosine")[0]).all()


def test_ranks_end_when_their_command_is_killed(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((20000, 64)).astype(np.float16)
    npy = save_rows(tmp_path / "rows.npy", rows)
    process = start("neighbours", npy, tmp_path / "out", "--processes", 2, "--k", 100)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(ranks := children.read_text().split()) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "Z" not in status.split("State:")[1].split()[0]


def slow_poll() -> bool:
    """Takes time between chunks, so that a rank can be killed between two shards."""
    time.sleep(0.02)
    return False


def mine_in_rounds(
    features: Path, out: Path, stop_requested: Callable[[], bool] = never_stop
) -> list[bytes]:
    """Ids and scores, searched in many rounds."""
    options = NeighbourOptions(metric="l2", chunk_rows=97, queries_per_round=50)
    table = search_neighbours(
        FeatureTable.open(features), out, 5, options, stop_requested=stop_requested
    )
    return [array.tobytes() for array in table.rows(np.arange(table.num_rows))]


@pytest.mark.parametrize("killed", [0, 1])
def test_complete_shards_survive_a_kill_and_are_kept_by_other_ranks(
    killed: int, tmp_path: Path
) -> None:
    features, out = tmp_path / "features", tmp_path / "neighbours"
    write_table(random_rows(1200), features, shards=24)
    port, results = free_port(), CONTEXT.Queue()
    work_arguments = features, out, slow_poll
    ranks = [
        CONTEXT.Process(
            target=run_rank, args=(mine_in_rounds, rank, 2, port, work_arguments, results)
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    while len(list(out.glob("scores-*.npy"))) < 6:
        assert all(process.exitcode is None for process in ranks)
        time.sleep(0.005)
    killed_pid = ranks[killed].pid
    assert killed_pid is not None
    os.kill(killed_pid, signal.SIGKILL)
    for process in ranks:
        process.join(60)
    assert ranks[killed].exitcode == -signal.SIGKILL
    assert ranks[1 - killed].exitcode not in (0, None), "it does not wait for the killed rank"

    written_at = {file.name: file.stat().st_mtime_ns for file in out.glob("scores-*.npy")}
    missing = NeighbourTable.open(out).missing_shards()
    assert len(written_at) >= 6
    assert 0 < len(missing) < 24
    got = run_ranks(mine_in_rounds, 3, features, out)[0]
    assert got == run_ranks(mine_in_rounds, 1, features, tmp_path / "whole")[0]
    rewritten = [
        name for name, time_ns in written_at.items() if (out / name).stat().st_mtime_ns != time_ns
    ]
    # A rank may have been killed between the two files of a shard.
    assert len(rewritten) <= 2


SHARDS_BY_RANK = ((0, 3), (1, 4), (2,))


def mine_on_local_disk(root: Path, k: int) -> dict[int, list[bytes]]:
    """(ids, scores) of the shards that this rank's own disk has afterwards."""
    rank = current().rank
    options = NeighbourOptions(metric="inner_product", chunk_rows=90)
    features = FeatureTable.open(root / f"features{rank}")
    table = search_neighbours(features, root / f"neighbours{rank}", k, options)
    shards = sorted(set(range(table.num_shards)) - set(table.missing_shards()))
    return {
        shard: [array.tobytes() for array in table.rows(np.arange(*table.shard_range(shard)))]
        for shard in shards
    }


def test_rows_may_lie_on_the_local_disks_of_the_ranks(tmp_path: Path) -> None:
    rows = random_rows()
    for rank, shards in enumerate(SHARDS_BY_RANK):
        folder = tmp_path / f"features{rank}"
        write_table(rows, folder)
        for shard in set(range(5)) - set(shards):
            (folder / f"features-{shard:05d}.npy").unlink()
    ids, scores = slow_neighbours(rows, 6, "inner_product")
    for rank, results in enumerate(run_ranks(mine_on_local_disk, 3, tmp_path, 6)):
        assert set(results) == set(SHARDS_BY_RANK[rank])
        for shard, (got_ids, got_scores) in results.items():
            start, stop = shard * 401 // 5, (shard + 1) * 401 // 5
            assert (np.frombuffer(got_ids, np.int64).reshape(-1, 6) == ids[start:stop]).all()
            assert (np.frombuffer(got_scores).reshape(-1, 6) == scores[start:stop]).all()


def mean_and_std(features: Path) -> list[bytes]:
    return [array.tobytes() for array in FeatureTable.open(features).mean_and_std()]


def test_mean_and_std_are_bitwise_equal_for_any_number_of_ranks(tmp_path: Path) -> None:
    rows = random_rows()
    write_table(rows, tmp_path)
    (expected,) = run_ranks(mean_and_std, 1, tmp_path)
    assert all(got == expected for got in run_ranks(mean_and_std, 3, tmp_path))
    mean, std = (np.frombuffer(array) for array in expected)
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(0), atol=1e-12)
    np.testing.assert_allclose(std, rows.astype(np.float64).std(0))


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node[03-07,9],other", "node03"),
        ("a,b", "a"),
        ("gpu-[1-4]", "gpu-1"),
        ("x[11]", "x11"),
        ("one", "one"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
