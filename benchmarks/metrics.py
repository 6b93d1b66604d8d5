"""Scores of a clustering at ImageNet's size: CPU milliseconds, one JSON line a row.

    python -m benchmarks.metrics [--compare] [--images N] [--clusters C]

--compare also measures scikit-learn on the same labels, and the difference of the scores; its AMI
takes minutes and needs --slow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rows import emit
from dist_scan.evaluate import metrics
from dist_scan.search.agreement import adjusted_rand_index

QUICK = ["--images", "200000", "--clusters", "300", "--repeats", "2"]
AGREEMENT = 0.4
"""Fraction of images whose cluster is their class; the others are drawn at random."""


def best_ms(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """(result, CPU milliseconds of the fastest repeat)."""
    fastest = float("inf")
    result = None
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        fastest = min(fastest, time.process_time() - start)
    return result, 1000 * fastest


def made_up_labels(images: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """(clusters, classes) [images]; classes are as uneven as those of ImageNet."""
    rng = np.random.default_rng(0)
    size = rng.uniform(0.55, 1.0, clusters)
    classes = rng.choice(clusters, images, p=size / size.sum())
    is_class = rng.random(images) < AGREEMENT
    others = rng.choice(clusters, images, p=rng.dirichlet(np.full(clusters, 4.0)))
    return np.where(is_class, classes, others), classes


def peers(cluster: np.ndarray, label: np.ndarray, slow: bool) -> dict[str, Callable[[], float]]:
    """scikit-learn's scores of the same names."""
    from sklearn import metrics as sklearn_metrics

    works: dict[str, Callable[[], float]] = {
        "nmi": lambda: sklearn_metrics.normalized_mutual_info_score(label, cluster),
        "ari": lambda: sklearn_metrics.adjusted_rand_score(label, cluster),
    }
    if slow:
        works["ami"] = lambda: sklearn_metrics.adjusted_mutual_info_score(label, cluster)
    return works


def main() -> None:
    """Measure every score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--slow", action="store_true", help="with --compare: also AMI")
    args = parser.parse_args()
    cluster, label = made_up_labels(args.images, args.clusters)
    size = {"images": args.images, "clusters": args.clusters}
    table, table_ms = best_ms(
        lambda: metrics.checked_contingency_table(cluster, label, args.clusters, args.clusters),
        args.repeats,
    )
    emit({"row": "contingency", "cpu_ms": round(table_ms, 2), **size})
    works: dict[str, Callable[[], Any]] = {
        "hungarian": lambda: metrics.hungarian(table),
        "nmi": lambda: metrics.nmi(table),
        "ari": lambda: adjusted_rand_index(table),
        "ami": lambda: metrics.ami(table),
        "purity": lambda: metrics.purity(table),
    }
    sklearn_works = peers(cluster, label, args.slow) if args.compare else {}
    for name, work in works.items():
        score, ours_ms = best_ms(work, args.repeats)
        row = {"row": name, "cpu_ms": round(ours_ms, 2), **size}
        if name in sklearn_works:
            sklearn_score, sklearn_ms = best_ms(sklearn_works[name], 1)
            row["sklearn_cpu_ms"] = round(sklearn_ms, 1)
            row["ratio"] = round(sklearn_ms / ours_ms, 1)
            row["difference"] = abs(score - sklearn_score)
        emit(row)


if __name__ == "__main__":
    main()
