"""The K nearest others of every image: exact, the same ids and scores for any number of ranks, by (score descending, id ascending).

A shard of queries is the unit of work: a rank holds one, walks over all rows in chunks, and keeps a running top K. Per chunk faiss finds
K + 16 candidates in float32; those that can still enter are scored again in float64, which is exact here (rows.py). Where float32 could
hide a better row (the certificate below) that query is done densely in float64 on that chunk.
Memory per rank: (shard + chunk) rows * D * 10 bytes + shard * (2 K + 16) * 24 bytes.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from dist_scan.data.tables import FeatureTable, NeighbourTable
from dist_scan.progress import Progress, Stopped
from dist_scan.search.rows import Reader, prepared, squares
from dist_scan.world.collectives import agree, barrier, broadcast_object
from dist_scan.world.world import current

CHUNK = 65536  # chunks of 4,096 cost 2.8 times as much
SPARE = 16
BLOCK = 512  # queries scored again at a time: BLOCK * (K + SPARE) * D float64 numbers


def mine_neighbours(features: FeatureTable, out: Path, num_neighbours: int, *, metric: Literal["cosine", "inner_product", "l2"] = "cosine",
                    view: int = 0, stop: Callable[[], bool] = lambda: False, progress: bool = False, chunk: int = CHUNK) -> NeighbourTable:
    """The table in `out`; collective, goes on from the shards that are there. Raises Stopped between rounds, ValueError when K >= N."""
    n, world = features.num_rows, current()
    if not 1 <= num_neighbours < n:
        raise ValueError(f"{num_neighbours} neighbours of {n} rows; allowed: 1 to {n - 1}")
    read, scale = prepared(features, metric == "cosine", view)
    asked = {"num_rows": n, "num_neighbours": num_neighbours, "metric": metric, "view": view}
    if world.rank == 0 and not (Path(out) / "table.json").exists():
        NeighbourTable.create(out, n, num_neighbours, features.num_shards, metric=metric, view=view)
    barrier()
    table = NeighbourTable.open(out)
    found = {k: table.facts.get(k) for k in asked}
    if found != asked:
        raise ValueError(f"{out} holds neighbours that were mined otherwise ({found}, asked for: {asked}); give another folder, or remove it")
    missing = broadcast_object(table.missing_shards())
    with Progress("neighbours", table.num_shards, "shards", done=table.num_shards - len(missing), enabled=progress) as line:
        for turn in range(0, len(missing), world.world_size):
            if agree(stop()):
                raise Stopped()
            mine = missing[turn:turn + world.world_size]
            if world.rank < len(mine):
                ids, scores = nearest_others(read, n, table.shard_range(mine[world.rank]), num_neighbours, metric == "l2", chunk)
                table.write_shard(mine[world.rank], ids, scores * scale)
            line.advance(len(mine))
    barrier()
    return NeighbourTable.open(out)


def nearest_others(read: Reader, num_rows: int, span: tuple[int, int], k: int, l2: bool, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, scores) [n, k] of the queries span[0]..span[1]-1 among all rows but themselves. l2 scores are minus the squared distance."""
    own = np.arange(*span)
    queries = read(own)
    ids = np.full((len(own), k), num_rows, np.int64)  # no row yet: behind every real one
    scores = np.full((len(own), k), -np.inf)
    for start in range(0, num_rows, chunk):
        piece = Chunk(read(np.arange(start, min(start + chunk, num_rows))), start)
        for b in range(0, len(own), BLOCK):
            part = slice(b, b + BLOCK)
            found = _best_of_chunk(queries[part], own[part], piece, k, scores[part, -1], l2)
            ids[part], scores[part] = _merge(ids[part], scores[part], *found, k)
    return ids, scores


class Chunk:
    """Rows [m, D] from `start` on, in both widths, and the length of the longest."""

    def __init__(self, rows: np.ndarray, start: int):
        self.rows, self.start, self.narrow = rows, start, rows.astype(np.float32)
        self.longest = float(np.sqrt(squares(rows).max()))


def _best_of_chunk(queries: np.ndarray, own: np.ndarray, chunk: Chunk, k: int, kth: np.ndarray, l2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of one chunk that hold all of its members of the top k: (ids [n, m], exact scores [n, m])."""
    from dist_scan.search.index import nearest  # faiss is slow to import; configs are checked without it

    rows, q64 = chunk.rows, queries.astype(np.float64)
    count = min(k + SPARE, len(rows))
    if count == len(rows):
        places = np.broadcast_to(np.arange(len(rows)), (len(queries), len(rows)))
        return _without_self(places + chunk.start, _dense(q64, rows.astype(np.float64), l2), own)
    rough, places = nearest(queries.astype(np.float32), chunk.narrow, count, "l2" if l2 else "inner_product")
    wide = rows[places].astype(np.float64)
    exact = np.matmul(wide, q64[:, :, None])[:, :, 0]
    q_squares = (q64 ** 2).sum(1)
    if l2:
        exact = 2 * exact - q_squares[:, None] - (wide ** 2).sum(2)
    last = -rough[:, -1] if l2 else rough[:, -1]
    ids, exact = _without_self(places + chunk.start, exact, own)
    bound = np.maximum(kth, np.partition(exact, -k, axis=1)[:, -k])  # what a hidden row would have to reach
    hidden = np.flatnonzero(last + _rounding(queries.shape[1], np.sqrt(q_squares), chunk.longest, l2) >= bound)
    if len(hidden):
        ids, exact = _densely(ids, exact, hidden, q64, rows, own, chunk.start, k, l2)
    return ids, exact


def _rounding(dim: int, q_norm: np.ndarray, longest: float, l2: bool) -> np.ndarray:
    """How far float32 scores of each query may lie from the exact ones: D * 2^-24 * |q||r|, or for l2 of its three terms."""
    size = (q_norm + longest) ** 2 if l2 else q_norm * longest
    return dim * 2.0**-24 * size


def _dense(q64: np.ndarray, r64: np.ndarray, l2: bool) -> np.ndarray:
    exact = q64 @ r64.T
    return 2 * exact - (q64 ** 2).sum(1)[:, None] - (r64 ** 2).sum(1)[None] if l2 else exact


def _densely(ids: np.ndarray, exact: np.ndarray, hidden: np.ndarray, q64: np.ndarray, rows: np.ndarray, own: np.ndarray, start: int, k: int,
             l2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Every row of the chunk for these queries: the k best by (score, id) replace their candidates."""
    whole = _dense(q64[hidden], rows.astype(np.float64), l2)
    for at, scores in zip(hidden, whole):
        if start <= own[at] < start + len(rows):
            scores[own[at] - start] = -np.inf
        edge = np.partition(scores, -k)[-k]
        sure, ties = np.flatnonzero(scores > edge), np.flatnonzero(scores == edge)  # ties in ascending order of id
        best = np.concatenate([sure, ties[:k - len(sure)]])
        ids[at, :k], exact[at, :k] = best + start, scores[best]
        exact[at, k:] = -np.inf
    return ids, exact


def _without_self(ids: np.ndarray, scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids.copy(), np.where(ids == own[:, None], -np.inf, scores)


def _merge(ids: np.ndarray, scores: np.ndarray, more_ids: np.ndarray, more_scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids, scores = np.concatenate([ids, more_ids], 1), np.concatenate([scores, more_scores], 1)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
