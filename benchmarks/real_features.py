"""Neighbour purity and k-means accuracy on real features, over seeds; one JSON line a row.

    python -m benchmarks.real_features FEATURES.npz [--seeds 10]     # features [N, D] and labels [N], as in ../shared/data

Purity: the share of a row's 1, 5 and 20 nearest others with its label. ACC (Hungarian) and NMI of k-means with as many clusters as labels: mean,
standard deviation over seeds, lowest and highest; `start` and `rows` say how it begins and what is done to rows and centroids.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from dist_scan.data.feature_table import FeatureTable
from dist_scan.evaluate.metrics import accuracy, contingency, neighbour_purity, nmi
from dist_scan.search.kmeans import kmeans
from dist_scan.search.neighbours import mine_neighbours
from dist_scan.search.options import KMeansOptions

NEEDS = "data:imagenet50-val-moco128.npz"
ROWS = {"as they are": {}, "unit": {"normalise": True}, "unit, centroids too": {"spherical": True}}


def as_table(rows: np.ndarray, path: Path) -> FeatureTable:
    """Rows [N, D] as a feature table of 4 shards."""
    table = FeatureTable.create(path, len(rows), 1, rows.shape[1], 4)
    for s in range(table.num_shards):
        table.write_shard(s, rows[slice(*table.shard_range(s)), None])
    return table


def clusterings(table: FeatureTable, labels: np.ndarray, seeds: int, **how) -> np.ndarray:
    """(ACC, NMI, objective) [seeds, 3]."""
    k, found = int(labels.max()) + 1, []
    for seed in range(seeds):
        result = kmeans(table, k, KMeansOptions(seed=1000 * seed, **how))
        counts = contingency(result.assignment, labels, k, k)
        found.append((accuracy(counts), nmi(counts), result.objective))
    return np.array(found)


def main() -> None:
    """Neighbours, then k-means in several ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--restarts", type=int, nargs="+", default=[1, 5, 20])
    args = parser.parse_args()
    with np.load(args.features) as data, tempfile.TemporaryDirectory() as folder:
        rows, labels = data["features"], data["labels"]
        table = as_table(rows, Path(folder) / "features")
        ids = mine_neighbours(table, Path(folder) / "neighbours", 20).rows(np.arange(len(rows)))[0]
        purity = {f"purity_{k}": round(neighbour_purity(ids, labels, k), 4) for k in (1, 5, 20)}
        print(json.dumps({"row": "neighbours", "rows": len(rows), **purity}), flush=True)
        for name, how in ROWS.items():
            for init in ("random", "kmeans++"):
                for restarts in args.restarts:
                    found = clusterings(
                        table, labels, args.seeds, init=init, restarts=restarts, **how
                    )
                    acc, other, objective = found.T
                    print(
                        json.dumps(
                            {
                                "row": "k-means",
                                "rows": name,
                                "start": init,
                                "restarts": restarts,
                                "seeds": args.seeds,
                                "acc": round(acc.mean(), 4),
                                "acc_std": round(acc.std(ddof=1), 4),
                                "acc_low": round(acc.min(), 4),
                                "acc_high": round(acc.max(), 4),
                                "nmi": round(other.mean(), 4),
                                "objective": round(objective.mean(), 2),
                            }
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
