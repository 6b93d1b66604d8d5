"""Exact k-means: seconds per iteration, and the ratio to faiss.Kmeans; one JSON line a row.

    python -m benchmarks.kmeans --compare                               # 200k x 256
    python -m benchmarks.kmeans --compare --rows 40000 --clusters 1000  # smaller

Unit rows around 3,000 centres. Both sides start from the same centroids, use every row in every
iteration (faiss by default only 256 rows per centroid) and have as many threads. A round is
`--iterations` of assigning and averaging, ours with one more assignment at the end; an iteration is
a round divided by its number of assignments, so that it includes reading rows and other work that
is done once. objective is the sum of squared distances to the nearest final centroid, computed by
one function for both.

Under srun or torchrun (RANK is set) the ranks share one table, in --folder, which all of them see,
and rank 0 prints one row.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from dist_scan.search.options import KMeansOptions

CLUSTER = ["--folder", "{folder}", "--rows", "{rows}", "--dim", "{dim}", "--clusters", "{clusters}"]
QUICK = [
    "--rows",
    "20000",
    "--dim",
    "128",
    "--clusters",
    "300",
    "--iterations",
    "5",
    "--world-sizes",
    "1",
    "--rounds",
    "2",
]
NUM_CENTRES = 3000
NOISE = 1.0
BLOCK_ROWS = 8192


class Result(NamedTuple):
    """What a rank's work returns."""

    num_assignments: int
    num_splits: int
    centroids: np.ndarray | None
    """[k, D], of rank 0."""


def options(iterations: int) -> KMeansOptions:
    """Options of ours."""
    from dist_scan.search.options import KMeansOptions

    return KMeansOptions(iterations=iterations, init="random")


def random_rows(path: Path, k: int) -> np.ndarray:
    """The rows [k, D] from which ours starts, for the peer."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.exact_rows import LocalRows, prepare_rows
    from dist_scan.search.index import thread_pool
    from dist_scan.search.kmeans_init import initial_centroids
    from dist_scan.search.stopping import never_stop

    rows = prepare_rows(FeatureTable.open(path), normalise=False)
    with thread_pool() as pool:
        start = initial_centroids(LocalRows(rows), k, options(1), 0, pool, never_stop)
    return (start / rows.scale).astype(np.float32)


def objective(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, in float64; the nearest is float32's."""
    from dist_scan.search.index import FlatIndex

    index = FlatIndex(np.ascontiguousarray(centroids), "l2")
    total = 0.0
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        nearest = centroids[index.search(block, 1)[1][:, 0]]
        total += float(((block.astype(np.float64) - nearest) ** 2).sum())
    return total


def make_ours(path: Path, k: int, iterations: int) -> Callable[[], Result]:
    """The work of a rank."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.kmeans import kmeans
    from dist_scan.world.world import current

    table = FeatureTable.open(path)
    kmeans(table, 2, options(1))  # compile, and import what takes long

    def work() -> Result:
        result = kmeans(table, k, options(iterations + 1))
        centroids = result.centroids if current().rank == 0 else None
        return Result(result.iterations, result.num_splits, centroids)

    return work


def make_faiss(path: Path, k: int, iterations: int) -> Callable[[], Result]:
    """The work of the peer."""
    import faiss

    rows = read_rows(path)
    start = random_rows(path, k)
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def work() -> Result:
        peer = faiss.Kmeans(
            rows.shape[1],
            k,
            niter=iterations,
            max_points_per_centroid=len(rows),
            min_points_per_centroid=1,
        )
        peer.train(rows, init_centroids=start)
        # Like ours it stops when the objective stays the same.
        return Result(len(peer.obj), 0, peer.centroids)

    return work


def measure(k: int, args: argparse.Namespace) -> None:
    """Measure one k and print a row for each number of ranks and for the peer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features"
        write_unit_rows(path, args.rows, args.dim, NUM_CENTRES, NOISE)
        groups = {
            f"W={world_size}": RankGroup(
                make_ours, world_size, args.threads, path, k, args.iterations
            )
            for world_size in args.world_sizes
        }
        if args.compare:
            groups["faiss"] = RankGroup(
                make_faiss, 1, args.threads, path, k, args.iterations, in_world=False
            )
        measurements = measure_groups(groups, args.rounds)
        rows = read_rows(path)
    results = {name: of_group[-1].values[0] for name, of_group in measurements.items()}
    objectives = {name: objective(rows, result.centroids) for name, result in results.items()}
    seconds = {
        name: seconds_per_iteration(of_group, results[name])
        for name, of_group in measurements.items()
    }
    first = results[f"W={args.world_sizes[0]}"]
    for name, result in results.items():
        row = {
            "row": name,
            "rows": args.rows,
            "dim": args.dim,
            "clusters": k,
            "threads": args.threads,
            "rounds": args.rounds,
            "assignments": result.num_assignments,
            "wall_s_per_iteration": round(float(np.median(seconds[name][:, 0])), 3),
            "cpu_s_per_iteration": round(float(np.median(seconds[name][:, 1])), 3),
            "peak_mib": round(max(m.peak_mib for m in measurements[name])),
            "objective": objectives[name],
        }
        if name != "faiss":
            row["clusters_split"] = result.num_splits
            if args.compare:
                row |= ratios_to_faiss(name, seconds, objectives)
            if len(args.world_sizes) > 1:
                row["centroids_equal_first"] = bool((result.centroids == first.centroids).all())
        emit(row)


def seconds_per_iteration(measurements: list[Measurement], result: Result) -> np.ndarray:
    """(wall seconds, CPU seconds) of an iteration, [rounds, 2]."""
    seconds = np.array([[m.wall_s, m.cpu_s] for m in measurements])
    return seconds / result.num_assignments


def ratios_to_faiss(
    name: str, seconds: dict[str, np.ndarray], objectives: dict[str, float]
) -> dict[str, Any]:
    """Fields of a row."""
    wall, cpu = np.median(seconds[name] / seconds["faiss"], 0)
    return {
        "wall_ratio_to_faiss": round(float(wall), 3),
        "cpu_ratio_to_faiss": round(float(cpu), 3),
        "objective_against_faiss": objectives[name] / objectives["faiss"] - 1,
    }


def measure_over_job(k: int, args: argparse.Namespace) -> None:
    """Measure the ranks of a job that cluster one table."""
    from dist_scan.world.collectives import barrier

    with job_world() as world:
        path = args.folder / f"kmeans-{k}" / "features"
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_unit_rows(path, args.rows, args.dim, NUM_CENTRES, NOISE)
        barrier()
        measurements = measure_job(make_ours(path, k, args.iterations), args.rounds)
        took = medians(measurements)
        num_assignments = measurements[-1].values[0].num_assignments
        if world.rank == 0:
            emit(
                {
                    "row": "all ranks",
                    "rows": args.rows,
                    "dim": args.dim,
                    "clusters": k,
                    "world_size": world.world_size,
                    "rounds": args.rounds,
                    **took,
                    "assignments": num_assignments,
                    "rows_per_s": round(args.rows * num_assignments / took["wall_s"], 1),
                }
            )


def main(argv: list[str] | None = None) -> None:
    """Measure every k."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="for the ranks of a job: an empty folder that all nodes see"
    )
    args = parser.parse_args(argv)
    for k in args.clusters:
        if "RANK" in os.environ:
            measure_over_job(k, args)
        else:
            measure(k, args)


if __name__ == "__main__":
    main()
