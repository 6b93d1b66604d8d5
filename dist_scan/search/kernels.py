"""The exact half of a search, compiled: candidates are scored again in float64. Import it late: numba takes a second.

float32 rows hold float16's numbers, so the products are exact and may be added up in any order (rows.py): fast-math changes no bit.
None of these holds the interpreter's lock, so threads run them at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_scan.compiled import compiled


class Top(NamedTuple):
    """The best so far of each query: ids and scores [n, K], by (score descending, id ascending); not there yet: -inf, at the id N."""

    ids: np.ndarray
    scores: np.ndarray


class Queries(NamedTuple):
    """rows [n, D] float32, their own ids [n], squared norms [n] float64, and how far float32 scores may lie from exact ones [n]."""

    rows: np.ndarray
    own: np.ndarray
    squares: np.ndarray
    rounding: np.ndarray


@compiled(fastmath={"reassoc", "contract", "nsz"})
def dot(a, b):
    """The exact inner product of two float32 rows."""
    total = 0.0
    for i in range(len(a)):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@compiled()
def insert(ids, scores, name, score) -> None:
    """Into one query's top K, if it is better than the last."""
    at = len(ids) - 1
    if score < scores[at] or (score == scores[at] and name > ids[at]):
        return
    while at > 0 and (scores[at - 1] < score or (scores[at - 1] == score and ids[at - 1] > name)):
        ids[at], scores[at] = ids[at - 1], scores[at - 1]
        at -= 1
    ids[at], scores[at] = name, score


@compiled()
def add_candidates(q, rows, squares, start, rough, places, l2, top, unsure) -> None:
    """Into the top K of Queries q: rough and places [n, m], each query's best m of rows [r, D] by float32, best first. unsure [n]: a row that
    is no candidate may belong into the top K, because float32 could not tell it from those that are."""
    for i in range(len(places)):
        unsure[i] = places.shape[1] < len(rows)
        for c in range(places.shape[1]):
            estimate = -rough[i, c] if l2 else rough[i, c]
            if estimate + q.rounding[i] < top.scores[i, -1]:
                unsure[i] = False  # neither this one nor any behind it can enter
                break
            place = places[i, c]
            if start + place != q.own[i]:
                score = dot(q.rows[i], rows[place])
                insert(
                    top.ids[i],
                    top.scores[i],
                    start + place,
                    2 * score - q.squares[i] - squares[place] if l2 else score,
                )


@compiled()
def add_dense(scores, names, own, first, ids, best) -> None:
    """scores [n, m] of the rows first, first + 1... for the queries `names` [n] of ids and best [N, K]."""
    for i in range(len(names)):
        q = names[i]
        for place in range(scores.shape[1]):
            if scores[i, place] >= best[q, -1] and first + place != own[q]:
                insert(ids[q], best[q], first + place, scores[i, place])


GROUP = 64
KEPT = 16  # centroids that a row may be near to at once before all are looked at


@compiled()
def bits(x):
    """A float32 that is not negative as the int32 that sorts like it: LLVM finds the least of integers with vectors, not of floats."""
    return np.float32(x).view(np.int32)


@compiled()
def limit(lowest, margin):
    """The bits of what lies `margin` above a number given by its bits."""
    return bits(np.int32(lowest).view(np.float32) + margin)


@compiled()
def keep_near(products, half, first, margin, best, names, values, counts) -> None:
    """Which centroids first, first + 1... may be a row's nearest: half[j] - products[i, j] (positive) within `margin` of its least so far.

    products [n, m]; best [n] the least so far as bits; names and values [n, KEPT] of counts [n] centroids (KEPT + 1: too many to keep).
    """
    least = np.empty((products.shape[1] + GROUP - 1) // GROUP, np.int32)
    for i in range(len(products)):
        row = products[i]
        low = best[i]
        for g in range(len(least)):
            part, add = row[g * GROUP : (g + 1) * GROUP], half[g * GROUP : (g + 1) * GROUP]
            lowest = np.int32(0x7F7FFFFF)
            for j in range(len(part)):
                lowest = min(lowest, bits(add[j] - part[j]))
            least[g] = lowest
            low = min(low, lowest)
        best[i] = low
        most = limit(low, margin)
        for g in range(len(least)):
            if least[g] <= most:
                for j in range(g * GROUP, min((g + 1) * GROUP, len(row))):
                    if bits(half[j] - row[j]) <= most:
                        note(
                            names[i], values[i], counts, i, first + j, bits(half[j] - row[j]), most
                        )


@compiled()
def note(names, values, counts, i, name, value, most) -> None:
    """One more centroid for row i; those that fell behind make room."""
    if counts[i] == KEPT:
        left = 0
        for c in range(KEPT):
            if values[c] <= most:
                names[left], values[left] = names[c], values[c]
                left += 1
        counts[i] = left
    if counts[i] < KEPT:
        names[counts[i]], values[counts[i]] = name, value
        counts[i] += 1
    else:
        counts[i] = KEPT + 1


@compiled()
def settle(rows, centroids, squares, margin, best, names, values, counts, out) -> None:
    """out [n]: the nearest centroid of each row, exactly; of equals the first. squares [k] float64 of the centroids."""
    for i in range(len(rows)):
        most, many = limit(best[i], margin), counts[i] > KEPT
        count, winner, least = 0, -1, np.inf
        if not many:
            for c in range(counts[i]):
                if values[i, c] <= most:
                    count, winner = count + 1, names[i, c]
        if many or count > 1:
            for c in range(len(centroids) if many else counts[i]):
                name = c if many else names[i, c]
                distance = squares[name] - 2 * dot(rows[i], centroids[name])
                if distance < least or (distance == least and name < winner):
                    least, winner = distance, name
        out[i] = winner


@compiled()
def move(rows, moved, old, new, sums, first, last) -> None:
    """Columns first..last-1 of sums [k, D] float64: the rows `moved` leave their old clusters (-1: none) for the new ones. Exact."""
    for i in range(len(moved)):
        row = rows[moved[i]]
        to, away = sums[new[i]], sums[old[i]]
        for d in range(first, last):
            to[d] += row[d]
        if old[i] >= 0:
            for d in range(first, last):
                away[d] -= row[d]


@compiled()
def nearer(rows, squares, centres, centre_squares, nearest, after) -> None:
    """after [t, n] int64: what `nearest` [n], squared distances in units of 2^-32, would be if each of `centres` [t, D] were chosen too."""
    for i in range(len(rows)):
        for c in range(len(centres)):
            distance = np.int64(
                (squares[i] + centre_squares[c] - 2 * dot(rows[i], centres[c])) * 2.0**32
            )
            after[c, i] = max(min(nearest[i], distance), 0)
