"""Exact nearest neighbours of every row: seconds, and how they compare with faiss.knn; one JSON line a row.

    python -m benchmarks.neighbours --compare                                              # 200k x 128 and 100k x 512, W = 1 and 2
    python -m benchmarks.neighbours --compare --sizes 50000x128 --queries 8192 --rounds 5  # smaller

Unit rows around 2,000 centres. W processes share `--threads` threads; the time is that of all shards being mined and on disk. --compare
times faiss.knn with its defaults on the same rows (float32, in memory, nothing written) and as many threads, turn by turn; ratios
are medians over rounds. With --queries only so many rows are searched for, on both sides, and nothing is written.
Under srun or torchrun (RANK is set) the ranks mine one table together, in --folder, which all of them see, and rank 0 prints one row.
peak_mib is the largest rank's memory above what it had before, beside what docs/search.md's formula gives.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.interleaved import Measurement, RankGroup, job_world, measure_job, medians
from benchmarks.rows import emit

CLUSTER = ["--folder", "{folder}", "--sizes", "{rows}x{dim}", "--k", "{k}"]
QUICK = ["--sizes", "20000x128", "--queries", "2048", "--world-sizes", "1"]
SHARDS = 16


def write_rows(path: Path, rows: int, dim: int) -> None:
    """A feature table of unit rows."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.exact_rows import unit_rows

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, dim)).astype(np.float32)
    table = FeatureTable.create(path, rows, 1, dim, SHARDS)
    for s in range(table.num_shards):
        n = len(range(*table.shard_range(s)))
        table.write_shard(
            s,
            unit_rows(
                centres[rng.integers(2000, size=n)]
                + 0.7 * rng.standard_normal((n, dim), np.float32)
            )[:, None],
        )


def ours(path: Path, k: int, queries: int) -> Callable[[], float]:
    """A rank's turn; returns the MiB of memory it had before."""
    import resource
    import shutil

    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.exact_rows import prepare_rows
    from dist_scan.search.neighbours import find_neighbours, mine_neighbours
    from dist_scan.search.options import NEIGHBOUR_DEFAULTS
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import current

    table, w = FeatureTable.open(path), current()
    find_neighbours(
        prepare_rows(table, True), [(0, 32)], k, False, 1024
    )  # compile, and import what is slow to
    before, out = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        Path(path).with_name(f"out-{w.world_size}"),
    )

    def work() -> float:
        if queries < table.num_rows:
            rows, share = (
                prepare_rows(table, True),
                (w.rank * queries // w.world_size, (w.rank + 1) * queries // w.world_size),
            )
            step, chunk = NEIGHBOUR_DEFAULTS.queries_per_round, NEIGHBOUR_DEFAULTS.chunk_rows
            for start in range(*share, step):
                find_neighbours(rows, [(start, min(start + step, share[1]))], k, False, chunk)
            return before
        barrier()
        if w.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        barrier()
        mine_neighbours(table, out, k)
        return before

    return work


def faiss_knn(path: Path, k: int, queries: int) -> Callable[[], None]:
    """The peer's turn."""
    import os

    import faiss

    from dist_scan.data.feature_table import FeatureTable

    rows = FeatureTable.open(path)
    rows = rows.rows(np.arange(rows.num_rows)).astype(np.float32)
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def work() -> None:
        faiss.knn(
            rows[:queries], rows, k + 1, metric=faiss.METRIC_INNER_PRODUCT
        )  # itself and K others

    return work


def formula_mib(rows: int, dim: int, k: int, queries: int, world_size: int, threads: int) -> float:
    """The memory formula of docs/search.md, in MiB."""
    from dist_scan.search.neighbours import BLOCK_ROWS, QUERY_BLOCK
    from dist_scan.search.options import NEIGHBOUR_DEFAULTS

    held = min(NEIGHBOUR_DEFAULTS.queries_per_round, -(-min(queries, rows) // world_size))
    chunk = min(NEIGHBOUR_DEFAULTS.chunk_rows, rows)
    searching = (
        held * (4 * dim + 16 * k + 32)
        + (10 * chunk + 24 * BLOCK_ROWS) * dim
        + threads // world_size * QUERY_BLOCK * (12 * k + 4200)
    )
    return (searching + 2 * rows * dim / world_size) / 2**20


def measure(rows: int, dim: int, args: argparse.Namespace) -> None:
    """One size: groups take turns; a row each for W = 1 and 2 and the peer."""
    queries = min(args.queries or rows, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features"
        write_rows(path, rows, dim)
        groups = {
            f"W={w}": RankGroup(ours, w, args.threads, path, args.k, queries)
            for w in args.world_sizes
        }
        if args.compare:
            groups["faiss"] = RankGroup(
                faiss_knn, 1, args.threads, path, args.k, queries, in_world=False
            )
        turns: dict[str, list[Measurement]] = {name: [] for name in groups}
        for _ in range(args.rounds):
            for name, group in groups.items():
                turns[name].append(group.measure())
        for group in groups.values():
            group.close()
    for name, group in groups.items():
        wall, cpu = (
            np.array([getattr(t, field) for t in turns[name]]) for field in ("wall_s", "cpu_s")
        )
        row = {
            "row": name,
            "rows": rows,
            "dim": dim,
            "k": args.k,
            "queries": queries,
            "threads": args.threads,
            "rounds": args.rounds,
            "wall_s": round(float(np.median(wall)), 2),
            "cpu_s": round(float(np.median(cpu)), 2),
        }
        if name != "faiss":
            row["peak_mib"] = round(max(t.peak_mib - min(t.values) for t in turns[name]))
            row["formula_mib"] = round(
                formula_mib(rows, dim, args.k, queries, len(group.ranks), args.threads)
            )
            for other in ("faiss", "W=1"):
                if other in turns and other != name:
                    row[f"wall_ratio_to_{other}"] = round(
                        float(np.median(wall / [t.wall_s for t in turns[other]])), 3
                    )
                    row[f"cpu_ratio_to_{other}"] = round(
                        float(np.median(cpu / [t.cpu_s for t in turns[other]])), 3
                    )
        print(json.dumps(row), flush=True)


def over_ranks(rows: int, dim: int, args: argparse.Namespace) -> None:
    """All ranks of the job mine one table; what counts is when the last of them is done and its shards are on disk."""
    from dist_scan.world.collectives import barrier

    with job_world() as world:
        path = args.folder / "neighbours" / "features"
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, rows, dim)
        barrier()
        took = medians(measure_job(ours(path, args.k, rows), args.rounds))
        if world.rank == 0:
            emit(
                {
                    "row": "all ranks",
                    "rows": rows,
                    "dim": dim,
                    "k": args.k,
                    "world_size": world.world_size,
                    "rounds": args.rounds,
                    **took,
                    "rows_per_s": round(rows / took["wall_s"], 1),
                }
            )


def main(argv: list[str] | None = None) -> None:
    """Every size in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["200000x128", "100000x512"], help="ROWSxDIM")
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument(
        "--queries", type=int, default=0, help="how many rows to search for (default: all)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="for the ranks of a job: an empty folder that all nodes see"
    )
    args = parser.parse_args(argv)
    for size in args.sizes:
        (over_ranks if "RANK" in os.environ else measure)(*map(int, size.split("x")), args)


if __name__ == "__main__":
    main()
