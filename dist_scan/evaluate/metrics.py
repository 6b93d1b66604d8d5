"""Clustering scores against labels, all computed from one contingency table.

A table has shape [num_clusters, num_classes]: row c, column l counts the images of cluster c with
label l. A score is None, never 0 and never an error, if no image has a label.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from dist_scan.evaluate.expected_mutual_information import expected_mutual_information
from dist_scan.search.agreement import (
    adjusted_rand_index,
    contingency_table,
    entropy,
    mutual_information,
)

Average = Literal["arithmetic", "geometric"]
"""Mean of the two entropies that mutual information is divided by."""
CHUNK = 1 << 20
"""Rows that are scored at a time."""
EPS = float(np.finfo(np.float64).eps)


# --- contingency table ---


def checked_contingency_table(
    cluster: np.ndarray, label: np.ndarray, num_clusters: int, num_classes: int
) -> np.ndarray:
    """Contingency table [num_clusters, num_classes] int64 of cluster [n] and label [n], integers.

    Rows with label -1 (unknown) are left out; there are ``n - table.sum()`` of them. Raises
    ValueError if an id is out of range.
    """
    if cluster.shape != label.shape or cluster.ndim != 1:
        raise ValueError(
            f"cluster has shape {cluster.shape}, label has shape {label.shape}; "
            "both must have shape [n], one entry per image"
        )
    _check_ids("cluster", cluster, 0, num_clusters, "num_clusters")
    _check_ids("label", label, -1, num_classes, "num_classes")
    known = label >= 0
    return contingency_table(cluster[known], label[known], num_clusters, num_classes)


def _check_ids(name: str, ids: np.ndarray, lowest: int, limit: int, limit_name: str) -> None:
    if len(ids) and (ids.min() < lowest or ids.max() >= limit):
        wrong = int(ids.min()) if ids.min() < lowest else int(ids.max())
        raise ValueError(
            f"{name} contains {wrong}; allowed: {lowest} to {limit - 1}. "
            f"Raise {limit_name}, or correct the ids"
        )


# --- accuracy ---


def hungarian(table: np.ndarray) -> np.ndarray:
    """Class [num_clusters] int64 of each cluster in the one-to-one matching with the most hits.

    If clusters outnumber classes, the clusters left over are matched to no class (-1) and their
    images count as wrong; SCAN's released code puts them into class 0 instead. If classes outnumber
    clusters, some class has no cluster. Needs 8 bytes per cell beside the table.
    """
    cost = table.astype(np.float64)
    np.negative(cost, out=cost)
    rows, columns = linear_sum_assignment(cost)
    mapping = np.full(table.shape[0], -1, np.int64)
    mapping[rows] = columns
    return mapping


def accuracy(table: np.ndarray, mapping: np.ndarray | None = None) -> float | None:
    """Share of the labelled images whose cluster is matched to their label (SCAN's ACC).

    ``mapping`` [num_clusters] is the class of each cluster, by default that of ``hungarian``.
    """
    total = int(table.sum())
    if not total:
        return None
    mapping = hungarian(table) if mapping is None else mapping
    matched = np.flatnonzero(mapping >= 0)
    return int(table[matched, mapping[matched]].sum()) / total


def top_k_accuracy(
    top_clusters: np.ndarray, label: np.ndarray, mapping: np.ndarray
) -> float | None:
    """Share of the labelled images with a cluster of the right class among their k most probable.

    ``top_clusters`` [n, k] holds cluster ids, -1 for none. ``mapping`` is the matching of the top-1
    table, as in SCAN, Table 5.
    """
    known = label >= 0
    clusters, labels = top_clusters[known], label[known]
    classes = np.where(clusters >= 0, mapping[clusters], -1)
    hits = int((classes == labels[:, None]).any(axis=1).sum())
    return hits / len(labels) if len(labels) else None


def purity(table: np.ndarray) -> float | None:
    """Share of the images that carry the majority label of their cluster.

    Also called many-to-one accuracy (SCAN, Table 3). Comparable only between clusterings with the
    same number of clusters.
    """
    total = int(table.sum())
    return int(table.max(axis=1).sum()) / total if total else None


def confusion(table: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    """Counts [num_classes, num_classes + 1] of label by matched class; last column: unmatched."""
    counts = np.zeros((table.shape[1], table.shape[1] + 1), np.int64)
    # Index -1 (no class) is the last column.
    np.add.at(counts.T, mapping, table)
    return counts


# --- mutual information ---


def _table_mutual_information(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Mutual information in nats of a table with row sums ``rows`` and column sums ``columns``."""
    flat = table.reshape(-1)
    cells = np.flatnonzero(flat)
    row_sizes, column_sizes = rows[cells // table.shape[1]], columns[cells % table.shape[1]]
    return mutual_information(flat[cells], row_sizes, column_sizes, int(rows.sum()))


def _mean_entropy(rows: np.ndarray, columns: np.ndarray, average: Average) -> float:
    first, second = entropy(rows), entropy(columns)
    return (first + second) / 2 if average == "arithmetic" else float(np.sqrt(first * second))


def _is_same_partition(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> bool:
    """True if clusters and classes are the same groups; their AMI is 0/0, which rounds to -1."""
    return np.count_nonzero(table) == np.count_nonzero(rows) == np.count_nonzero(columns)


def nmi(table: np.ndarray, average: Average = "arithmetic") -> float | None:
    """Normalised mutual information.

    SCAN and MMDC use the arithmetic mean, DeepCluster's paper the geometric one. As in
    scikit-learn, one cluster and one class give 1.0.
    """
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    if not rows.sum():
        return None
    if _is_same_partition(table, rows, columns):
        return 1.0
    mean = _mean_entropy(rows, columns, average)
    information = _table_mutual_information(table, rows, columns)
    return information / mean if min(information, mean) > EPS else 0.0


def ami(table: np.ndarray) -> float | None:
    """Mutual information adjusted for chance, arithmetic mean (Vinh, Epps and Bailey 2010)."""
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    if not rows.sum():
        return None
    if _is_same_partition(table, rows, columns):
        return 1.0
    # One cluster or one class carries no information.
    if min(np.count_nonzero(rows), np.count_nonzero(columns)) == 1:
        return 0.0
    expected = expected_mutual_information(rows, columns)
    above_chance = _table_mutual_information(table, rows, columns) - expected
    largest = _mean_entropy(rows, columns, "arithmetic") - expected
    return _away_from_zero(above_chance) / _away_from_zero(largest)


def _away_from_zero(x: float) -> float:
    """x, but at least EPS in magnitude: 0/0 is 1 and nothing divides by 0, as in scikit-learn."""
    return min(x, -EPS) if x < 0 else max(x, EPS)


# --- summaries ---


def scores(table: np.ndarray, mapping: np.ndarray | None = None) -> dict[str, Any]:
    """All scores of a table. ``many_to_one`` is None unless used clusters outnumber classes."""
    clusters_used = np.count_nonzero(table.sum(axis=1))
    classes_used = np.count_nonzero(table.sum(axis=0))
    pure = purity(table)
    return {
        "acc": accuracy(table, mapping),
        "nmi": nmi(table),
        "nmi_variant": "arithmetic",
        "ari": adjusted_rand_index(table),
        "ami": ami(table),
        "purity": pure,
        "many_to_one": pure if clusters_used > classes_used else None,
        "num_labelled": int(table.sum()),
    }


def evaluate_assignment(
    cluster: np.ndarray,
    label: np.ndarray,
    num_clusters: int,
    top: np.ndarray | None = None,
) -> dict[str, Any]:
    """``scores`` of cluster [n] against label [n] (-1: unknown), on one process.

    With ``top`` [n, k], the most probable clusters of each image, ``top5`` is added.
    """
    num_classes = int(label.max(initial=-1)) + 1
    table = checked_contingency_table(cluster, label, num_clusters, max(num_classes, 1))
    mapping = hungarian(table)
    found = scores(table, mapping)
    if top is not None:
        found["top5"] = top_k_accuracy(top[:, :5], label, mapping)
    return found


def cluster_health(counts: np.ndarray) -> dict[str, float]:
    """Signs of a collapse that need no labels, from the images per cluster [num_clusters].

    used_share: share of the clusters that hold an image. largest_share: share of the images in the
    largest cluster. entropy: of the cluster sizes, in nats. balance: that entropy divided by
    log(num_clusters), so 1 if all clusters have the same size.
    """
    total = int(counts.sum())
    if not total:
        return {"used_share": 0.0, "largest_share": 0.0, "entropy": 0.0, "balance": 0.0}
    # abs: the entropy of a single cluster is -0.0.
    size_entropy = abs(entropy(counts))
    largest_entropy = float(np.log(max(len(counts), 1)))
    return {
        "used_share": float((counts > 0).mean()),
        "largest_share": float(counts.max() / total),
        "entropy": size_entropy,
        "balance": size_entropy / largest_entropy if largest_entropy else 1.0,
    }


def neighbour_purity(neighbours: np.ndarray, label: np.ndarray, k: int) -> float | None:
    """Share of the k nearest neighbours that carry the label of their anchor.

    ``neighbours`` [n, K >= k] holds row numbers, nearest first. Pairs with an unknown label are
    left out.
    """
    if not 1 <= k <= neighbours.shape[1]:
        raise ValueError(
            f"k is {k}; allowed: 1 to {neighbours.shape[1]}, the neighbours in the table"
        )
    same = known = 0
    for start in range(0, len(label), max(CHUNK // k, 1)):
        rows = slice(start, start + max(CHUNK // k, 1))
        anchor_label, neighbour_label = label[rows, None], label[neighbours[rows, :k]]
        both_known = (anchor_label >= 0) & (neighbour_label >= 0)
        same += int(((anchor_label == neighbour_label) & both_known).sum())
        known += int(both_known.sum())
    return same / known if known else None
