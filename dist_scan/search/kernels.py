"""Compiled loops of exact search and k-means. Import late: numba takes a second.

float32 rows hold numbers of float16, so that their float64 products and sums are exact
(exact_rows.py). Order of summation and fused multiply-adds therefore change no bit, and `dot` may
use fast-math. No kernel holds the interpreter's lock; threads run them at the same time.
"""

from __future__ import annotations

import numpy as np

from dist_scan.compiled import compiled
from dist_scan.search.kernel_types import (
    MAX_NEAR,
    Centroids,
    DatabaseRows,
    NearCentroids,
    QueryBlock,
    TopK,
)

LARGEST_FLOAT_BITS = np.int32(0x7F7FFFFF)  # bits of the largest float32
COST_GROUP = 64  # costs whose least is found at a time


@compiled(fastmath={"reassoc", "contract", "nsz"})
def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Exact inner product of two float32 rows."""
    total = 0.0
    for i in range(len(a)):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@compiled()
def insert(ids: np.ndarray, scores: np.ndarray, row_id: int, score: float) -> None:
    """Insert a row into one query's top K if it is better than the last."""
    at = len(ids) - 1
    if score < scores[at] or (score == scores[at] and row_id > ids[at]):
        return
    # Move worse entries down by one.
    while at > 0 and (scores[at - 1] < score or (scores[at - 1] == score and ids[at - 1] > row_id)):
        ids[at], scores[at] = ids[at - 1], scores[at - 1]
        at -= 1
    ids[at], scores[at] = row_id, score


@compiled()
def add_candidates(
    queries: QueryBlock,
    database: DatabaseRows,
    candidate_scores: np.ndarray,
    candidates: np.ndarray,
    is_l2: bool,
    top: TopK,
    is_uncertain: np.ndarray,
) -> None:
    """Score faiss's candidates exactly and insert them into the top K.

    candidate_scores and candidates [n, m]: the m best database rows of each query by float32, best
    first; scores of l2 are squared distances. Sets is_uncertain [n] for queries of which a row that
    is no candidate may belong to the top K.

    Rows beyond the candidates have float32 scores no better than the last candidate's. Once a
    candidate's float32 score plus the error bound is below the K-th exact score, neither it nor any
    row after it can enter, and the query is certain.
    """
    for i in range(len(candidates)):
        is_uncertain[i] = candidates.shape[1] < len(database.values)
        for c in range(candidates.shape[1]):
            estimate = -candidate_scores[i, c] if is_l2 else candidate_scores[i, c]
            if estimate + queries.error_bound[i] < top.scores[i, -1]:
                is_uncertain[i] = False
                break
            # A row is not its own neighbour.
            row = candidates[i, c]
            if database.start + row != queries.ids[i]:
                score = dot(queries.values[i], database.values[row])
                if is_l2:
                    score = 2 * score - queries.squared_norms[i] - database.squared_norms[row]
                insert(top.ids[i], top.scores[i], database.start + row, score)


@compiled()
def add_dense(
    scores: np.ndarray, selected: np.ndarray, query_ids: np.ndarray, first: int, top: TopK
) -> None:
    """Insert exact scores [n, m] of the rows first, first + 1, ... into the top K of queries.

    selected [n]: places of these queries in query_ids and top.
    """
    for i in range(len(selected)):
        q = selected[i]
        for row in range(scores.shape[1]):
            if scores[i, row] >= top.scores[q, -1] and first + row != query_ids[q]:
                insert(top.ids[q], top.scores[q], first + row, scores[i, row])


@compiled()
def float_bits(x: np.float32) -> np.int32:
    """Bits of a non-negative float32 as an int32; they compare like the numbers.

    LLVM vectorises the minimum of integers, but not that of floats.
    """
    return np.float32(x).view(np.int32)


@compiled()
def add_margin(lowest: np.int32, margin: np.float32) -> np.int32:
    """Bits of (a cost given by its bits) + margin."""
    return float_bits(np.int32(lowest).view(np.float32) + margin)


@compiled()
def collect_near(
    products: np.ndarray, centroids: Centroids, first: int, near: NearCentroids
) -> None:
    """Add the centroids first, first + 1, ... whose cost is within the margin of the row's least.

    The cost of centroid j for row i is half_norms[j] - products[i, j - first]; products [n, m].
    """
    group_least = np.empty((products.shape[1] + COST_GROUP - 1) // COST_GROUP, np.int32)
    half_norms = centroids.half_norms[first : first + products.shape[1]]
    for i in range(len(products)):
        row = products[i]
        # The least cost, by groups.
        low = near.least[i]
        for g in range(len(group_least)):
            part = row[g * COST_GROUP : (g + 1) * COST_GROUP]
            add = half_norms[g * COST_GROUP : (g + 1) * COST_GROUP]
            lowest = LARGEST_FLOAT_BITS
            for j in range(len(part)):
                lowest = min(lowest, float_bits(add[j] - part[j]))
            group_least[g] = lowest
            low = min(low, lowest)
        near.least[i] = low
        # Centroids near it, only in groups that have one.
        most = add_margin(low, centroids.margin)
        for g in range(len(group_least)):
            if group_least[g] <= most:
                for j in range(g * COST_GROUP, min((g + 1) * COST_GROUP, len(row))):
                    if float_bits(half_norms[j] - row[j]) <= most:
                        append_near(near, i, first + j, float_bits(half_norms[j] - row[j]), most)


@compiled()
def append_near(near: NearCentroids, i: int, centroid: int, cost: np.int32, most: np.int32) -> None:
    """Append a candidate of row i. When full, drop candidates whose cost is above `most` first."""
    ids, costs, counts = near.ids[i], near.costs[i], near.counts
    # Drop candidates that are no longer within the margin of the least cost.
    if counts[i] == MAX_NEAR:
        left = 0
        for c in range(MAX_NEAR):
            if costs[c] <= most:
                ids[left], costs[left] = ids[c], costs[c]
                left += 1
        counts[i] = left
    # Append, or note that there are too many.
    if counts[i] < MAX_NEAR:
        ids[counts[i]], costs[counts[i]] = centroid, cost
        counts[i] += 1
    else:
        counts[i] = MAX_NEAR + 1


@compiled()
def choose_nearest(
    rows: np.ndarray, centroids: Centroids, near: NearCentroids, out: np.ndarray
) -> None:
    """Write the nearest centroid of each row to out [n]; of equally near ones the first.

    Rows with a single candidate need no float64.
    """
    for i in range(len(rows)):
        most = add_margin(near.least[i], centroids.margin)
        has_too_many = near.counts[i] > MAX_NEAR
        # Candidates that are still within the margin; a single one is the nearest.
        count, nearest, least = 0, -1, np.inf
        if not has_too_many:
            for c in range(near.counts[i]):
                if near.costs[i, c] <= most:
                    count, nearest = count + 1, near.ids[i, c]
        # Otherwise compare them, or all centroids, in float64.
        if has_too_many or count > 1:
            for c in range(len(centroids.values) if has_too_many else near.counts[i]):
                centroid = c if has_too_many else near.ids[i, c]
                product = dot(rows[i], centroids.values[centroid])
                distance = centroids.squared_norms[centroid] - 2 * product
                if distance < least or (distance == least and centroid < nearest):
                    least, nearest = distance, centroid
        out[i] = nearest


@compiled()
def move_rows(
    rows: np.ndarray,
    moved: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    sums: np.ndarray,
    columns: tuple[int, int],
) -> None:
    """Take the rows `moved` from the sums of their old clusters and add them to those of the new.

    sums [k, D] float64; old and new are clusters of `moved`, -1 stands for none. Only the given
    range of columns is changed, so that each thread can have its own. Exact (kmeans.py).
    """
    first, last = columns
    for i in range(len(moved)):
        row = rows[moved[i]]
        to, away = sums[new[i]], sums[old[i]]
        for d in range(first, last):
            to[d] += row[d]
        if old[i] >= 0:
            for d in range(first, last):
                away[d] -= row[d]


@compiled()
def distances_after(
    rows: np.ndarray,
    squared_norms: np.ndarray,
    candidates: np.ndarray,
    candidate_squared_norms: np.ndarray,
    nearest: np.ndarray,
    out: np.ndarray,
) -> None:
    """Distances to the nearest initial centroid if one more candidate became one.

    nearest [n] int64: squared distances to those chosen so far, in units of 2^-32. out [t, n]:
    the same with each of the candidates [t, D].
    """
    for i in range(len(rows)):
        for c in range(len(candidates)):
            distance = np.int64(
                (squared_norms[i] + candidate_squared_norms[c] - 2 * dot(rows[i], candidates[c]))
                * 2.0**32
            )
            out[c, i] = max(min(nearest[i], distance), 0)
