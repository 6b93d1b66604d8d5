"""Scores at ImageNet's size: `python -m benchmarks.metrics [--compare] [--images N] [--clusters C]`, one JSON line a row.

--compare also times scikit-learn on the same labels (its AMI takes minutes and needs --slow) and the difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks.rows import emit
from dist_scan.evaluate import metrics as m
from dist_scan.search.agreement import adjusted_rand_index

QUICK = ["--images", "200000", "--clusters", "300", "--repeats", "2"]


def timed(work: Callable[[], object], repeats: int) -> tuple[object, float]:
    """Result and the best process time in ms."""
    best, value = float("inf"), None
    for _ in range(repeats):
        start = time.process_time()
        value = work()
        best = min(best, time.process_time() - start)
    return value, 1000 * best


def labels(images: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of ImageNet's unevenness, clusters that agree with them in four images of ten."""
    rng = np.random.default_rng(0)
    size = rng.uniform(0.55, 1.0, clusters)
    label = rng.choice(clusters, images, p=size / size.sum())
    return np.where(
        rng.random(images) < 0.4,
        label,
        rng.choice(clusters, images, p=rng.dirichlet(np.full(clusters, 4.0))),
    ), label


def peers(cluster: np.ndarray, label: np.ndarray, slow: bool) -> dict[str, Callable[[], float]]:
    from sklearn import metrics as sk

    found = {
        "nmi": lambda: sk.normalized_mutual_info_score(label, cluster),
        "ari": lambda: sk.adjusted_rand_score(label, cluster),
    }
    return found | ({"ami": lambda: sk.adjusted_mutual_info_score(label, cluster)} if slow else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--slow", action="store_true")
    args = parser.parse_args()
    cluster, label = labels(args.images, args.clusters)
    table, ms = timed(
        lambda: m.contingency(cluster, label, args.clusters, args.clusters), args.repeats
    )
    rows: dict[str, Callable[[], object]] = {
        "hungarian": lambda: m.hungarian(table),
        "nmi": lambda: m.nmi(table),
        "ari": lambda: adjusted_rand_index(table),
        "ami": lambda: m.ami(table),
        "purity": lambda: m.purity(table),
    }
    where = {"images": args.images, "clusters": args.clusters}
    emit({"row": "contingency", "cpu_ms": round(ms, 2), **where})
    other = peers(cluster, label, args.slow) if args.compare else {}
    for name, work in rows.items():
        value, ms = timed(work, args.repeats)
        row = {"row": name, "cpu_ms": round(ms, 2), **where}
        if name in other:
            peer, peer_ms = timed(other[name], 1)
            row |= {
                "sklearn_cpu_ms": round(peer_ms, 1),
                "ratio": round(peer_ms / ms, 1),
                "difference": abs(value - peer),
            }
        emit(row)


if __name__ == "__main__":
    main()
