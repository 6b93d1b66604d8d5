"""Exact nearest neighbours of every row: seconds, and the ratio to faiss.knn; one JSON line a row.

    python -m benchmarks.neighbours --compare     # 200k x 128 and 100k x 512, W = 1 and 2
    python -m benchmarks.neighbours --compare --sizes 50000x128 --queries 8192 --rounds 5  # smaller

Unit rows around 2,000 centres. W processes share `--threads` threads; the time is that until all
shards are searched and on disk. --compare measures faiss.knn with its defaults on the same rows
(float32, in memory, nothing written) with as many threads, interleaved; ratios are medians over
rounds. With --queries only that many rows are searched for, on both sides, and nothing is written.

Under srun or torchrun (RANK is set) the ranks search one table together, in --folder, which all of
them see, and rank 0 prints one row. peak_mib is the memory of the largest rank above what it had
before, formula_mib what the formula in dist_scan/search/neighbours.py gives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.interleaved import (
    Measurement,
    RankGroup,
    job_world,
    measure_groups,
    measure_job,
    medians,
)
from benchmarks.rows import emit
from benchmarks.search_rows import read_rows, write_unit_rows

CLUSTER = ["--folder", "{folder}", "--sizes", "{rows}x{dim}", "--k", "{k}"]
QUICK = ["--sizes", "20000x128", "--queries", "2048", "--world-sizes", "1"]
NUM_CENTRES = 2000
NOISE = 0.7


def make_ours(path: Path, k: int, num_queries: int) -> Callable[[], float]:
    """The work of a rank, which returns the MiB of memory that it had before."""
    import resource

    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.exact_rows import prepare_rows
    from dist_scan.search.neighbours import search_neighbours, search_round
    from dist_scan.search.options import NEIGHBOUR_DEFAULTS
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import current

    table = FeatureTable.open(path)
    world = current()
    out = path.with_name(f"out-{world.world_size}")
    # Compile, and import what takes long.
    search_round(prepare_rows(table, True), [(0, 32)], k, False, 1024)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def search_some() -> float:
        rows = prepare_rows(table, True)
        stop = (world.rank + 1) * num_queries // world.world_size
        step = NEIGHBOUR_DEFAULTS.queries_per_round
        for start in range(world.rank * num_queries // world.world_size, stop, step):
            span = start, min(start + step, stop)
            search_round(rows, [span], k, False, NEIGHBOUR_DEFAULTS.chunk_rows)
        return before_mib

    def search_all() -> float:
        barrier()
        if world.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        barrier()
        search_neighbours(table, out, k)
        return before_mib

    return search_some if num_queries < table.num_rows else search_all


def make_faiss(path: Path, k: int, num_queries: int) -> Callable[[], None]:
    """The work of the peer."""
    import faiss

    rows = read_rows(path)
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def work() -> None:
        # k + 1: a row is its own nearest neighbour.
        faiss.knn(rows[:num_queries], rows, k + 1, metric=faiss.METRIC_INNER_PRODUCT)

    return work


def formula_mib(rows: int, dim: int, args: argparse.Namespace, world_size: int) -> float:
    """The memory formula of dist_scan/search/neighbours.py in MiB."""
    from dist_scan.search.exact_rows import BLOCK_ROWS
    from dist_scan.search.neighbours import QUERY_BLOCK
    from dist_scan.search.options import NEIGHBOUR_DEFAULTS

    num_queries = -(-num_searched(rows, args) // world_size)
    queries = min(NEIGHBOUR_DEFAULTS.queries_per_round, num_queries) * (4 * dim + 16 * args.k + 32)
    chunk_rows = min(NEIGHBOUR_DEFAULTS.chunk_rows, rows)
    chunks = (10 * chunk_rows + 24 * BLOCK_ROWS) * dim
    candidates = args.threads // world_size * QUERY_BLOCK * (12 * args.k + 4200)
    mapped = 2 * rows * dim / world_size
    return (queries + chunks + candidates + mapped) / 2**20


def num_searched(rows: int, args: argparse.Namespace) -> int:
    """Number of rows that are searched for."""
    return min(args.queries or rows, rows)


def measure(rows: int, dim: int, args: argparse.Namespace) -> None:
    """Measure one size and print a row for each number of ranks and for the peer."""
    num_queries = num_searched(rows, args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features"
        write_unit_rows(path, rows, dim, NUM_CENTRES, NOISE)
        groups = {
            f"W={world_size}": RankGroup(
                make_ours, world_size, args.threads, path, args.k, num_queries
            )
            for world_size in args.world_sizes
        }
        if args.compare:
            groups["faiss"] = RankGroup(
                make_faiss, 1, args.threads, path, args.k, num_queries, in_world=False
            )
        measurements = measure_groups(groups, args.rounds)
    for name, group in groups.items():
        wall_s, cpu_s = times(measurements[name])
        row = {
            "row": name,
            "rows": rows,
            "dim": dim,
            "k": args.k,
            "queries": num_queries,
            "threads": args.threads,
            "rounds": args.rounds,
            "wall_s": round(float(np.median(wall_s)), 2),
            "cpu_s": round(float(np.median(cpu_s)), 2),
        }
        if name != "faiss":
            peaks = [m.peak_mib - min(m.values) for m in measurements[name]]
            row["peak_mib"] = round(max(peaks))
            row["formula_mib"] = round(formula_mib(rows, dim, args, len(group.ranks)))
            row |= ratios(name, measurements)
        emit(row)


def times(measurements: list[Measurement]) -> tuple[np.ndarray, np.ndarray]:
    """(wall seconds, CPU seconds) by round."""
    return np.array([m.wall_s for m in measurements]), np.array([m.cpu_s for m in measurements])


def ratios(name: str, measurements: dict[str, list[Measurement]]) -> dict[str, float]:
    """Fields of a row: median ratios to the peer and to one rank."""
    fields = {}
    for other in ("faiss", "W=1"):
        if other in measurements and other != name:
            pairs = zip(times(measurements[name]), times(measurements[other]))
            wall, cpu = (float(np.median(ours / theirs)) for ours, theirs in pairs)
            fields[f"wall_ratio_to_{other}"] = round(wall, 3)
            fields[f"cpu_ratio_to_{other}"] = round(cpu, 3)
    return fields


def measure_over_job(rows: int, dim: int, args: argparse.Namespace) -> None:
    """Measure the ranks of a job that search one table, until all shards are on disk."""
    from dist_scan.world.collectives import barrier

    with job_world() as world:
        path = args.folder / "neighbours" / "features"
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_unit_rows(path, rows, dim, NUM_CENTRES, NOISE)
        barrier()
        took = medians(measure_job(make_ours(path, args.k, rows), args.rounds))
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
    """Measure all sizes."""
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
        rows, dim = map(int, size.split("x"))
        if "RANK" in os.environ:
            measure_over_job(rows, dim, args)
        else:
            measure(rows, dim, args)


if __name__ == "__main__":
    main()
