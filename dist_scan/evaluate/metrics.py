"""How well clusters and labels agree, everything from one contingency table [num_clusters, num_classes].

A score that cannot be told (no labels at all) is None, never 0 and never an error.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from dist_scan.evaluate.expected_mutual_information import expected_mutual_information
from dist_scan.world.collectives import all_sum
from dist_scan.world.world import current

Average = Literal["arithmetic", "geometric", "min", "max"]
CHUNK = 1 << 20
EPS = float(np.finfo(np.float64).eps)


# --- the table -------------------------------------------------------------------------------------------------------


def contingency(
    cluster: np.ndarray, label: np.ndarray, num_clusters: int, num_classes: int
) -> np.ndarray:
    """Counts [num_clusters, num_classes] int64 of this process's rows: cluster [n], label [n], int.

    Rows with label -1 (unknown) are left out: n - table.sum() of them. Raises ValueError on ids out of range.
    """
    cluster, label = np.asarray(cluster), np.asarray(label)
    if cluster.shape != label.shape or cluster.ndim != 1:
        raise ValueError(
            f"cluster has shape {cluster.shape}, label {label.shape}; one of each per image is needed: pass two [n] arrays"
        )
    _check("cluster", cluster, 0, num_clusters, "num_clusters")
    _check("label", label, -1, num_classes, "num_classes")
    known = label >= 0
    flat = cluster[known].astype(np.int64) * num_classes + label[known]
    return np.bincount(flat, minlength=num_clusters * num_classes).reshape(
        num_clusters, num_classes
    )


def all_contingency(
    cluster: np.ndarray, label: np.ndarray, num_clusters: int, num_classes: int
) -> np.ndarray:
    """`contingency` of all ranks' rows together, the same on every rank. A collective: every rank must call it."""
    table = torch.from_numpy(contingency(cluster, label, num_clusters, num_classes))
    return all_sum(table.to(current().device)).cpu().numpy()


def _check(name: str, ids: np.ndarray, low: int, limit: int, limit_name: str) -> None:
    if len(ids) and (ids.min() < low or ids.max() >= limit):
        bad = int(ids.min()) if ids.min() < low else int(ids.max())
        raise ValueError(
            f"{name} holds {bad}; allowed: {low} to {limit - 1}. Raise {limit_name} ({limit}) or mend the ids"
        )


# --- matchings -------------------------------------------------------------------------------------------------------


def hungarian(table: np.ndarray) -> np.ndarray:
    """The one-to-one matching with the most images on it: mapping [num_clusters] int64, the class of each cluster.

    Clusters and classes may differ in number: with more clusters than classes those left over are matched to nothing
    (-1) and count as wrong (the released SCAN code lets them fall into class 0, FIDELITY.md 1.10); with more classes
    some class has no cluster. Needs 8 bytes a cell beside the table.
    """
    cost = table.astype(np.float64)
    np.negative(cost, out=cost)
    rows, columns = linear_sum_assignment(cost)
    mapping = np.full(table.shape[0], -1, np.int64)
    mapping[rows] = columns
    return mapping


def accuracy(table: np.ndarray, mapping: np.ndarray | None = None) -> float | None:
    """Share of labelled images whose cluster is matched to their label (SCAN's ACC). None without labels."""
    total = int(table.sum())
    if not total:
        return None
    mapping = hungarian(table) if mapping is None else mapping
    matched = np.flatnonzero(mapping >= 0)
    return int(table[matched, mapping[matched]].sum()) / total


def top_k_accuracy(
    top_clusters: np.ndarray, label: np.ndarray, mapping: np.ndarray
) -> float | None:
    """Share of labelled images with a cluster matched to their label among their k most probable, top_clusters [n, k].

    `mapping` is the matching of the top-1 table, as in SCAN's Table 5. Cluster -1 counts as no cluster.
    """
    hits = known = 0
    for start in range(0, len(label), CHUNK):
        top, truth = (
            np.asarray(top_clusters[start : start + CHUNK]),
            np.asarray(label[start : start + CHUNK]),
        )
        top, truth = top[truth >= 0], truth[truth >= 0]
        mapped = np.where(top >= 0, mapping[top], -1)
        hits += int((mapped == truth[:, None]).any(axis=1).sum())
        known += len(truth)
    return hits / known if known else None


def many_to_one(table: np.ndarray) -> float | None:
    """ACC when each cluster takes its majority label (SCAN's Table 3): comparable only among runs with as many clusters."""
    total = int(table.sum())
    return int(table.max(axis=1).sum()) / total if total else None


def purity(table: np.ndarray) -> float | None:
    """Share of images that carry their cluster's majority label: many-to-one ACC under its other name."""
    return many_to_one(table)


def confusion(table: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    """Counts [num_classes, num_classes + 1]: label by the class its cluster is matched to; last: matched to nothing."""
    counts = np.zeros((table.shape[1], table.shape[1] + 1), np.int64)
    np.add.at(counts.T, mapping, table)  # -1 is the last column
    return counts


# --- information and pairs -------------------------------------------------------------------------------------------


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _mutual_information(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """I(cluster; label) in nats, over the cells that hold something: no second table in memory."""
    flat = table.reshape(-1)
    cells = np.flatnonzero(flat)
    count, total = flat[cells].astype(np.float64), float(rows.sum())
    i, j = cells // table.shape[1], cells % table.shape[1]
    lift = np.log(count) + np.log(total) - np.log(rows[i]) - np.log(columns[j])
    return max(float((count / total * lift).sum()), 0.0)


def _between(x: float, y: float, average: str) -> float:
    means = {
        "arithmetic": lambda: (x + y) / 2,
        "geometric": lambda: float(np.sqrt(x * y)),
        "min": lambda: min(x, y),
        "max": lambda: max(x, y),
    }
    if average not in means:
        raise ValueError(f"average is '{average}'; allowed: {', '.join(means)}")
    return means[average]()


def _same_partition(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> bool:
    """Clusters and classes are the same groups: told apart first, as rounding could turn AMI's 0/0 into -1."""
    return np.count_nonzero(table) == np.count_nonzero(rows) == np.count_nonzero(columns)


def nmi(table: np.ndarray, average: Average = "arithmetic") -> float | None:
    """Normalised mutual information. SCAN and MMDC: arithmetic; DeepCluster's paper: geometric (FIDELITY.md 0.9).

    1.0 for one cluster and one class, as in scikit-learn; None without labels.
    """
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    if not rows.sum():
        return None
    if _same_partition(table, rows, columns):
        return 1.0
    between = _between(_entropy(rows), _entropy(columns), average)
    information = _mutual_information(table, rows, columns)
    return information / between if min(information, between) > EPS else 0.0


def ami(table: np.ndarray, average: Average = "arithmetic") -> float | None:
    """Mutual information adjusted for chance (Vinh, Epps and Bailey 2010). None without labels."""
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    if not rows.sum():
        return None
    if _same_partition(table, rows, columns):
        return 1.0
    if (
        min(np.count_nonzero(rows), np.count_nonzero(columns)) == 1
    ):  # nothing to know, whatever the average
        return 0.0
    chance = expected_mutual_information(rows, columns)
    above = _mutual_information(table, rows, columns) - chance
    room = _between(_entropy(rows), _entropy(columns), average) - chance
    return _away_from_zero(above) / _away_from_zero(room)


def _away_from_zero(x: float) -> float:
    """0/0 is 1 and nothing divides by 0: scikit-learn's convention, e.g. when every image is a cluster and a class."""
    return min(x, -EPS) if x < 0 else max(x, EPS)


def ari(table: np.ndarray) -> float | None:
    """Adjusted Rand index (Hubert and Arabie 1985), exact in integers. 1.0 when there is nothing to tell apart."""
    total = int(table.sum())
    if not total:
        return None
    both = _squares(table.reshape(-1)) - total
    one = _squares(table.sum(axis=1)) - total
    other = _squares(table.sum(axis=0)) - total
    pairs = total * (total - 1)
    if one == other == both:
        return 1.0
    return 2 * (both * pairs - one * other) / ((one + other) * pairs - 2 * one * other)


def _squares(counts: np.ndarray) -> int:
    held = counts[counts > 0].astype(np.int64)
    return int(held @ held)


# --- all together ----------------------------------------------------------------------------------------------------


def scores(
    table: np.ndarray, average: Average = "arithmetic", mapping: np.ndarray | None = None
) -> dict[str, Any]:
    """Every score of a table; all None without labels. `many_to_one` only when used clusters outnumber classes."""
    more = int((table.sum(axis=1) > 0).sum()) > int((table.sum(axis=0) > 0).sum())
    return {
        "acc": accuracy(table, mapping),
        "nmi": nmi(table, average),
        "nmi_variant": average,
        "ari": ari(table),
        "ami": ami(table, average),
        "purity": purity(table),
        "many_to_one": many_to_one(table) if more else None,
        "num_labelled": int(table.sum()),
    }


def evaluate_assignment(
    cluster: np.ndarray,
    label: np.ndarray,
    num_clusters: int,
    top: np.ndarray | None = None,
    average: Average = "arithmetic",
) -> dict[str, Any]:
    """`scores` of cluster [n] against label [n] (-1 unknown), with `top5` when top [n, k] is given. Not a collective."""
    label = np.asarray(label)
    num_classes = int(label.max(initial=-1)) + 1
    table = contingency(cluster, label, num_clusters, max(num_classes, 1))
    mapping = hungarian(table)
    found = scores(table, average, mapping)
    if top is not None and np.ndim(top) == 2:
        found["top5"] = top_k_accuracy(top[:, :5], label, mapping)
    return found


def cluster_health(counts: np.ndarray) -> dict[str, float]:
    """What tells a collapse without labels, from images per cluster [num_clusters].

    `used_share`: clusters with an image; `largest_share`: images in the largest cluster; `entropy`: of the sizes in
    nats; `balance`: that entropy as a share of log(num_clusters), 1 when all clusters are equally large.
    """
    counts = np.asarray(counts)
    total, room = int(counts.sum()), float(np.log(max(len(counts), 1)))
    if not total:
        return {"used_share": 0.0, "largest_share": 0.0, "entropy": 0.0, "balance": 0.0}
    entropy = abs(_entropy(counts))
    return {
        "used_share": float((counts > 0).mean()),
        "largest_share": float(counts.max() / total),
        "entropy": entropy,
        "balance": entropy / room if room else 1.0,
    }


def neighbour_purity(neighbours: np.ndarray, label: np.ndarray, k: int) -> float | None:
    """Share of the k nearest neighbours, ids [n, K >= k], that carry their anchor's label; unknown labels left out."""
    if not 1 <= k <= neighbours.shape[1]:
        raise ValueError(
            f"k is {k}; allowed: 1 to {neighbours.shape[1]}, the neighbours in the table"
        )
    same = known = 0
    for start in range(0, len(label), max(CHUNK // k, 1)):
        rows = slice(start, start + max(CHUNK // k, 1))
        own, other = label[rows, None], label[neighbours[rows, :k]]
        told = (own >= 0) & (other >= 0)
        same += int(((own == other) & told).sum())
        known += int(told.sum())
    return same / known if known else None
