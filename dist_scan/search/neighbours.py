"""The K nearest others of every image: exact, the same ids and scores for any number of ranks, by (score descending, id ascending).

A shard of queries is the unit of work. In a round each rank holds up to QUERIES rows of its shards as queries with their running top K, while the
rows of all ranks pass by in chunks (rows.py). Per chunk faiss finds K + 16 candidates in float32; those that can still enter are scored again
in float64, which is exact here (kernels.py). Where float32 could hide a better row that query is done densely in float64 on that chunk.
Memory per rank: queries * (4 D + 16 K + 32) + (10 chunk + 24 PIECE) * D + threads * BLOCK * (12 K + 4200) bytes, and 2 N D / W of
mapped file that the system takes back when it needs to (docs/search.md).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.monitoring.progress import Progress, StopRequested
from dist_scan.search.exact_rows import (
    MAX_NORM,
    MAX_NORM_L2,
    PIECE,
    ExactRows,
    chunks,
    content,
    prepare_rows,
    squares,
)
from dist_scan.search.options import NEIGHBOUR_DEFAULTS, NeighbourOptions, check_num_neighbours
from dist_scan.world.collectives import any_rank, barrier, gather_objects, on_every_rank
from dist_scan.world.world import current

if TYPE_CHECKING:
    from dist_scan.search.kernels import Queries, Top

SPARE = 16
BLOCK = 1024  # queries that a thread searches for at a time


def mine_neighbours(
    features: FeatureTable,
    out: Path,
    num_neighbours: int,
    options: NeighbourOptions = NEIGHBOUR_DEFAULTS,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> NeighbourTable:
    """The table in `out`; collective, goes on from the shards that are there. Raises Stopped between chunks, ValueError when K >= N.

    A rank reads the shards that it serves to the others and those of its queries: features may lie on the ranks' own disks. Each rank
    then writes the neighbours of what it holds.
    """
    n, world, num_neighbours = features.num_rows, current(), operator.index(num_neighbours)
    check_num_neighbours(num_neighbours, n)
    metric, chunk = options.metric, options.chunk_rows
    rows = prepare_rows(
        features, metric == "cosine", options.view, MAX_NORM_L2 if metric == "l2" else MAX_NORM
    )
    table = _table(Path(out), rows, num_neighbours, metric)
    missing = sorted(set.intersection(*gather_objects(set(table.missing_shards()))))
    rounds = _rounds(table, missing, rows.held, options.queries_per_round)
    with Progress("neighbours", len(rounds) * -(-n // chunk), "chunks", enabled=progress) as line:
        for shards in (by_rank[world.rank] for by_rank in rounds):
            spans = [table.shard_range(s) for s in shards]
            found = find_neighbours(
                rows, spans, num_neighbours, metric == "l2", chunk, _polled(stop, line)
            )
            ends = np.cumsum([b - a for a, b in spans])[:-1]
            for s, ids, scores in zip(
                shards, np.split(found.ids, ends), np.split(found.scores, ends)
            ):
                table.write_shard(s, ids, scores * rows.scale**-2)
    barrier()
    return NeighbourTable.open(out)


def _table(out: Path, rows: ExactRows, k: int, metric: str) -> NeighbourTable:
    """What lies in `out`, if it was asked for like this; else a new one, on every disk that has none."""
    asked = {
        "num_rows": rows.num_rows,
        "num_neighbours": k,
        "metric": metric,
        "view": rows.view,
        "features": content(rows.table, rows.held, rows.view),
    }

    def made(turn: bool) -> None:
        if turn and not (out / "table.json").exists():
            NeighbourTable.create(
                out,
                rows.num_rows,
                k,
                rows.table.num_shards,
                metric=metric,
                view=rows.view,
                features=asked["features"],
            )

    def opened() -> NeighbourTable:
        table = NeighbourTable.open(out)
        found = {name: table.metadata.get(name) for name in asked}
        if found != asked:
            raise ValueError(
                f"{out} holds neighbours of other features, or mined otherwise ({found}, asked for: {asked}); give another folder, or remove it"
            )
        return table

    on_every_rank(lambda: made(current().rank == 0))
    on_every_rank(lambda: made(True))
    return on_every_rank(opened)


def _rounds(
    table: NeighbourTable, missing: list[int], held: tuple[frozenset[int], ...], most: int
) -> list[list[list[int]]]:
    """[round][rank] -> shards: each goes to the rank with the fewest of those that can read it; a rank's go into rounds of at most `most` rows."""
    queues: list[list[list[int]]] = [[] for _ in held]
    load, filled = [0] * len(held), [most + 1] * len(held)
    for s in missing:
        start, stop = table.shard_range(s)
        rank = min((r for r in range(len(held)) if s in held[r]), key=lambda r: load[r])
        if filled[rank] + stop - start > most:
            queues[rank].append([])
            filled[rank] = 0
        queues[rank][-1].append(s)
        filled[rank] += stop - start
        load[rank] += stop - start
    return [
        [q[i] if i < len(q) else [] for q in queues] for i in range(max(len(q) for q in queues))
    ]


def _polled(stop: Callable[[], bool], line: Progress) -> Callable[[], None]:
    def poll() -> None:
        if any_rank(stop()):
            raise StopRequested()
        line.advance()

    return poll


def find_neighbours(
    rows: ExactRows,
    spans: list[tuple[int, int]],
    k: int,
    l2: bool,
    chunk: int,
    poll: Callable[[], None] = lambda: None,
) -> Top:
    """The top K [n, k] of the rows of `spans` among all rows but themselves. Collective. l2 scores are minus the squared distance."""
    from dist_scan.search.index import thread_pool
    from dist_scan.search.kernels import Queries, Top

    own = np.concatenate([np.zeros(0, np.int64), *(np.arange(*s) for s in spans)])
    narrow = np.concatenate(
        [
            np.zeros((0, rows.table.dim), np.float32),
            *(rows.span(*s).astype(np.float32) for s in spans),
        ]
    )
    top = Top(np.full((len(own), k), rows.num_rows, np.int64), np.full((len(own), k), -np.inf))
    norms = squares(narrow)
    threads = torch.get_num_threads()
    with thread_pool() as pool, closing(chunks(rows, chunk)) as passing:
        for start, piece in passing:
            poll()
            here = DatabaseChunk(piece, start, l2)
            q = Queries(
                narrow, own, norms, _rounding(narrow.shape[1], np.sqrt(norms), here.longest, l2)
            )
            unsure = np.concatenate(
                [
                    np.zeros(0, bool),
                    *pool.map(lambda part: here.search(q, top, part), _blocks(len(own), threads)),
                ]
            )
            here.search_densely(q, top, np.flatnonzero(unsure))
            del here  # or two chunks are held while the next is made
    return top


def _blocks(n: int, threads: int) -> Iterator[slice]:
    """Of at most BLOCK queries, and so many that every thread has as much to do."""
    count = max(1, -(-n // BLOCK))
    count = -(-count // threads) * threads
    return (slice(i * n // count, (i + 1) * n // count) for i in range(count))


def _rounding(dim: int, q_norm: np.ndarray, longest: float, l2: bool) -> np.ndarray:
    """How far float32 scores of each query may lie from the exact ones: (D + 8) 2^-24 |q||r|, or for l2 (|q| + |r|)^2."""
    size = (q_norm + longest) ** 2 if l2 else q_norm * longest
    return (dim + 8) * 2.0**-24 * size


class DatabaseChunk:
    """Rows [m, D] float16 from `start` on, ready to be searched."""

    def __init__(self, rows: np.ndarray, start: int, l2: bool) -> None:
        from dist_scan.search.index import (
            FlatIndex,  # faiss is slow to import; configs are checked without it
        )

        self.rows, self.start, self.l2 = rows.astype(np.float32), start, l2
        self.squares = squares(self.rows)
        self.longest = float(np.sqrt(self.squares.max()))
        self.flat = FlatIndex(self.rows, "l2" if l2 else "inner_product")

    def search(self, queries: Queries, top: Top, part: slice) -> np.ndarray:
        """Merge this chunk's candidates into the top K of a part of the queries; which of them [n] bool are not sure to be right."""
        from dist_scan.search.kernels import Queries, Top, add_candidates

        q, mine = Queries(*(a[part] for a in queries)), Top(*(a[part] for a in top))
        unsure = np.zeros(len(q.own), bool)
        if len(unsure):
            rough, places = self.flat.nearest(
                q.rows, min(mine.ids.shape[1] + SPARE, len(self.rows))
            )
            add_candidates(
                q, self.rows, self.squares, self.start, rough, places, self.l2, mine, unsure
            )
        return unsure

    def search_densely(self, queries: Queries, top: Top, names: np.ndarray) -> None:
        """Score every row of the chunk in float64 for these queries."""
        from dist_scan.search.kernels import add_dense

        inside = np.isin(top.ids[names], np.arange(self.start, self.start + len(self.rows)))
        best, ids = top.scores[names], top.ids[names]
        best[inside], ids[inside] = -np.inf, np.iinfo(np.int64).max  # found again below
        order = np.lexsort((ids, -best), axis=1)
        top.scores[names], top.ids[names] = (
            np.take_along_axis(best, order, 1),
            np.take_along_axis(ids, order, 1),
        )
        for b in range(0, len(names), PIECE // 8):
            part = names[b : b + PIECE // 8]
            q = torch.from_numpy(queries.rows[part]).double()
            for r in range(0, len(self.rows), PIECE):
                scores = (q @ torch.from_numpy(self.rows[r : r + PIECE]).double().T).numpy()
                if self.l2:
                    scores = (
                        2 * scores
                        - queries.squares[part][:, None]
                        - self.squares[None, r : r + PIECE]
                    )
                add_dense(scores, part, queries.own, self.start + r, top.ids, top.scores)
