"""Exact k-means: seconds per iteration, and how they compare with faiss.Kmeans; one JSON line a row.

    python -m benchmarks.kmeans --compare                                  # 200k x 256 at k = 1,000 and 10,000
    python -m benchmarks.kmeans --compare --rows 40000 --clusters 1000     # smaller

Unit rows around 3,000 centres. Both sides begin with the same centroids, take every row in every iteration (faiss by itself takes 256 rows a
centroid) and have as many threads. A turn is `--iterations` rounds of assigning and averaging, ours with one more assignment at the end; an
iteration is a turn by its number of assignments, so reading rows, and what else is done once, is in it. objective is the sum of squared
distances to the nearest final centroid, by one routine for both. Under srun or torchrun (RANK is set) the ranks share one table, in --folder,
which all of them see, and rank 0 prints one row.
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


def write_rows(path: Path, rows: int, dim: int) -> None:
    """A feature table of unit rows."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.exact_rows import unit_rows

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3000, dim)).astype(np.float32)
    table = FeatureTable.create(path, rows, 1, dim, 16)
    for s in range(table.num_shards):
        n = len(range(*table.shard_range(s)))
        table.write_shard(
            s,
            unit_rows(
                centres[rng.integers(3000, size=n)] + rng.standard_normal((n, dim), np.float32)
            )[:, None],
        )


def begin(path: Path, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows [N, D] float32 and k of them to begin with."""
    from dist_scan.data.feature_table import FeatureTable

    table = FeatureTable.open(path)
    rows = table.rows(np.arange(table.num_rows)).astype(np.float32)
    return rows, rows[np.random.default_rng(1).choice(len(rows), k, replace=False)]


def objective(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, in float64 over float32's choice of it."""
    from dist_scan.search.index import FlatIndex

    flat, total = FlatIndex(np.ascontiguousarray(centroids), "l2"), 0.0
    for b in range(0, len(rows), 8192):
        chosen = centroids[flat.search(rows[b : b + 8192], 1)[1][:, 0]]
        total += float(((rows[b : b + 8192].astype(np.float64) - chosen) ** 2).sum())
    return total


def ours(path: Path, k: int, iterations: int) -> Callable[[], tuple]:
    """A rank's turn: (assignments made, clusters split, centroids)."""
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.search.kmeans import kmeans
    from dist_scan.search.options import KMeansOptions
    from dist_scan.world.world import current

    table, start = FeatureTable.open(path), begin(path, k)[1]
    kmeans(
        table, 2, KMeansOptions(iterations=1), start=start[:2]
    )  # compile, and import what is slow to

    def work() -> tuple:
        found = kmeans(table, k, KMeansOptions(iterations=iterations + 1), start=start)
        return found.iterations, found.num_splits, found.centroids if current().rank == 0 else None

    return work


def faiss_kmeans(path: Path, k: int, iterations: int) -> Callable[[], tuple]:
    """The peer's turn."""
    import os

    import faiss

    rows, start = begin(path, k)
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def work() -> tuple:
        peer = faiss.Kmeans(
            rows.shape[1],
            k,
            niter=iterations,
            max_points_per_centroid=len(rows),
            min_points_per_centroid=1,
        )
        peer.train(rows, init_centroids=start)
        return (
            len(peer.obj),
            0,
            peer.centroids,
        )  # it stops, as ours does, when the objective stays the same

    return work


def measure(k: int, args: argparse.Namespace) -> None:
    """One k: groups take turns; a row each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features"
        write_rows(path, args.rows, args.dim)
        groups = {
            f"W={w}": RankGroup(ours, w, args.threads, path, k, args.iterations)
            for w in args.world_sizes
        }
        if args.compare:
            groups["faiss"] = RankGroup(
                faiss_kmeans, 1, args.threads, path, k, args.iterations, in_world=False
            )
        turns: dict[str, list[Measurement]] = {name: [] for name in groups}
        for _ in range(args.rounds):
            for name, group in groups.items():
                turns[name].append(group.measure())
        for group in groups.values():
            group.close()
        rows = begin(path, k)[0]
        objectives = {name: objective(rows, t[-1].values[0][2]) for name, t in turns.items()}
    per = {
        name: np.array([[t.wall_s, t.cpu_s] for t in all_turns]) / all_turns[0].values[0][0]
        for name, all_turns in turns.items()
    }
    for name, all_turns in turns.items():
        wall, cpu = np.median(per[name], 0)
        row = {
            "row": name,
            "rows": args.rows,
            "dim": args.dim,
            "clusters": k,
            "threads": args.threads,
            "rounds": args.rounds,
            "assignments": all_turns[-1].values[0][0],
            "wall_s_per_iteration": round(float(wall), 3),
            "cpu_s_per_iteration": round(float(cpu), 3),
            "peak_mib": round(max(t.peak_mib for t in all_turns)),
            "objective": objectives[name],
        }
        if name != "faiss":
            row["clusters_split"] = all_turns[-1].values[0][1]
        if args.compare and name != "faiss":
            wall, cpu = np.median(per[name] / per["faiss"], 0)
            row |= {
                "wall_ratio_to_faiss": round(float(wall), 3),
                "cpu_ratio_to_faiss": round(float(cpu), 3),
                "objective_against_faiss": objectives[name] / objectives["faiss"] - 1,
            }
        if len(args.world_sizes) > 1 and name != "faiss":
            first = turns[f"W={args.world_sizes[0]}"][-1].values[0][2]
            row["centroids_equal_first"] = bool((all_turns[-1].values[0][2] == first).all())
        print(json.dumps(row), flush=True)


def over_ranks(k: int, args: argparse.Namespace) -> None:
    """All ranks of the job cluster one table."""
    from dist_scan.world.collectives import barrier

    with job_world() as world:
        path = args.folder / f"kmeans-{k}" / "features"
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, args.rows, args.dim)
        barrier()
        turns = measure_job(ours(path, k, args.iterations), args.rounds)
        took, assignments = medians(turns), turns[-1].values[0][0]
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
                    "assignments": assignments,
                    "rows_per_s": round(args.rows * assignments / took["wall_s"], 1),
                }
            )


def main(argv: list[str] | None = None) -> None:
    """Every k in turn."""
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
        (over_ranks if "RANK" in os.environ else measure)(k, args)


if __name__ == "__main__":
    main()
