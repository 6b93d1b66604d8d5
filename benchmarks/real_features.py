"""Neighbour purity and k-means accuracy on real features, over seeds; one JSON line a row.

    python -m benchmarks.real_features FEATURES.npz [--seeds 10]

The file has features [N, D] and labels [N], as those in ../shared/data. Purity is the fraction of a
row's 1, 5 and 20 nearest other rows with its label. ACC (Hungarian) and NMI are of k-means with as
many clusters as labels: mean, standard deviation over seeds, lowest and highest. `start` is the
initialisation, `rows` what is done to rows and centroids.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.rows import emit
from benchmarks.search_rows import write_rows
from dist_scan.data.feature_table import FeatureTable
from dist_scan.evaluate.metrics import accuracy, checked_contingency_table, neighbour_purity, nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import search_neighbours
from dist_scan.search.options import KMeansOptions

NEEDS = "data:imagenet50-val-moco128.npz"
VARIANTS = {
    "as they are": KMeansOptions(),
    "unit": KMeansOptions(normalise=True),
    "unit, centroids too": KMeansOptions(spherical=True),
}
NUM_NEIGHBOURS = (1, 5, 20)
SEED_STEP = 1000
"""Restart r of a seed uses seed + r: seeds must be further apart."""


def clusterings(
    table: FeatureTable, labels: np.ndarray, seeds: int, options: KMeansOptions
) -> np.ndarray:
    """(ACC, NMI, objective) of k-means for each seed, [seeds, 3]."""
    k = int(labels.max()) + 1
    results = []
    for seed in range(seeds):
        result = kmeans(table, k, replace(options, seed=SEED_STEP * seed))
        counts = checked_contingency_table(result.assignment, labels, k, k)
        results.append((accuracy(counts), nmi(counts), result.objective))
    return np.array(results)


def main() -> None:
    """Measure neighbours, then k-means in several variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--restarts", type=int, nargs="+", default=[1, 5, 20])
    args = parser.parse_args()
    with np.load(args.features) as data:
        rows, labels = data["features"], data["labels"]
    with tempfile.TemporaryDirectory() as folder:
        table = write_rows(Path(folder) / "features", rows)
        neighbours = search_neighbours(table, Path(folder) / "neighbours", max(NUM_NEIGHBOURS))
        ids, _ = neighbours.rows(np.arange(len(rows)))
        purity = {f"purity_{k}": round(neighbour_purity(ids, labels, k), 4) for k in NUM_NEIGHBOURS}
        emit({"row": "neighbours", "rows": len(rows), **purity})
        for name, variant in VARIANTS.items():
            for init in ("random", "kmeans++"):
                for restarts in args.restarts:
                    options = replace(variant, init=init, restarts=restarts)
                    scores = clusterings(table, labels, args.seeds, options)
                    emit_clusterings(name, options, scores)


def emit_clusterings(name: str, options: KMeansOptions, scores: np.ndarray) -> None:
    """Print the row of one variant; scores [seeds, 3] of `clusterings`."""
    acc, mutual_information, objective = scores.T
    emit(
        {
            "row": "k-means",
            "rows": name,
            "start": options.init,
            "restarts": options.restarts,
            "seeds": len(scores),
            "acc": round(acc.mean(), 4),
            "acc_std": round(acc.std(ddof=1), 4),
            "acc_low": round(acc.min(), 4),
            "acc_high": round(acc.max(), 4),
            "nmi": round(mutual_information.mean(), 4),
            "objective": round(objective.mean(), 2),
        }
    )


if __name__ == "__main__":
    main()
