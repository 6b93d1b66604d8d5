"""The K nearest other rows of every row, exactly.

Ids and scores are bitwise equal for any number of ranks and any partition of the rows. Neighbours
are ordered by (score descending, id ascending).

Algorithm. Shards of query rows are distributed over the ranks and searched in rounds. In a round a
rank holds its queries with their running top K, and all rows of the table are broadcast in chunks,
each by a rank that can read it (chunks.py). For each chunk

1. faiss proposes K + 16 candidates per query from float32 scores;
2. candidates that may enter the top K are scored again in float64, which is exact (exact_rows.py);
3. queries for which float32 scores leave a doubt (`RunningSearch._error_bound`) are compared with
   every row of the chunk in float64.

Memory per rank in bytes:
queries * (4 D + 16 K + 32) + (10 chunk_rows + 24 * 8192) * D + threads * 1024 * (12 K + 4200),
and 2 N D / world_size of memory-mapped file, which the system can reclaim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.monitoring.progress import Progress
from dist_scan.search.chunks import broadcast_chunks
from dist_scan.search.exact_rows import (
    BLOCK_ROWS,
    MAX_NORM,
    MAX_NORM_L2,
    ExactRows,
    prepare_rows,
    squared_norms,
)
from dist_scan.search.kernel_types import DatabaseRows, QueryBlock, TopK
from dist_scan.search.options import NEIGHBOUR_DEFAULTS, NeighbourOptions, check_num_neighbours
from dist_scan.search.shard_readers import content_digest
from dist_scan.search.stopping import never_stop, raise_if_stopped
from dist_scan.world.collectives import barrier, gather_objects
from dist_scan.world.world import current

EXTRA_CANDIDATES = 16  # candidates beyond K: fewer queries then need the dense search
QUERY_BLOCK = 1024  # queries that a thread searches at a time
DENSE_QUERIES = BLOCK_ROWS // 8  # queries of the dense search at a time
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""`index.FlatIndex.search`."""


def search_neighbours(
    features: FeatureTable,
    out: Path,
    num_neighbours: int,
    options: NeighbourOptions = NEIGHBOUR_DEFAULTS,
    *,
    stop_requested: Callable[[], bool] = never_stop,
) -> NeighbourTable:
    """Write the table of nearest neighbours to `out` and return it. Collective.

    Shards that an earlier call has finished are kept. Features may lie on the ranks' local disks: a
    rank reads the shards of which it is the reader and those of its queries, and writes the
    neighbours of the latter. Raises ValueError for K >= N or an `out` with another table, and
    StopRequested between chunks.
    """
    # Rows whose scores are exact, and the table to fill.
    num_neighbours = operator.index(num_neighbours)
    check_num_neighbours(num_neighbours, features.num_rows)
    is_l2 = options.metric == "l2"
    max_norm = MAX_NORM_L2 if is_l2 else MAX_NORM
    rows = prepare_rows(features, options.metric == "cosine", options.view, max_norm)
    table = _open_table(Path(out), rows, num_neighbours, options.metric)
    # Shards that no rank has finished, in rounds.
    missing = sorted(set.intersection(*gather_objects(set(table.missing_shards()))))
    rounds = _plan_rounds(table, missing, rows.readers.readable_shards, options.queries_per_round)
    num_chunks = -(-rows.num_rows // options.chunk_rows)
    with Progress(
        "neighbours", len(rounds) * num_chunks, "chunks", enabled=current().rank == 0
    ) as progress:

        def before_chunk() -> None:
            raise_if_stopped(stop_requested)
            progress.advance()

        for shards_by_rank in rounds:
            # Search for this rank's shards of the round together.
            shards = shards_by_rank[current().rank]
            spans = [table.shard_range(shard) for shard in shards]
            top = search_round(rows, spans, num_neighbours, is_l2, options.chunk_rows, before_chunk)
            # Write them one by one, with scores of the table's own rows.
            ends = np.cumsum([stop - start for start, stop in spans])[:-1]
            ids, scores = np.split(top.ids, ends), np.split(top.scores, ends)
            for i, shard in enumerate(shards):
                table.write_shard(shard, ids[i], scores[i] * rows.scale**-2)
    barrier()
    return NeighbourTable.open(out)


def describe_neighbours(table: NeighbourTable) -> str:
    """Mean scores, and how unevenly rows are neighbours of others, in one line. Reads it once."""
    n, k = table.num_rows, table.num_neighbours
    first = last = total = 0.0
    num_neighbour_of = np.zeros(n, np.int64)
    for shard in range(table.num_shards):
        ids, scores = table.rows(np.arange(*table.shard_range(shard)))
        first += scores[:, 0].sum()
        last += scores[:, -1].sum()
        total += scores.sum()
        num_neighbour_of += np.bincount(ids.reshape(-1), minlength=n)
    return (
        f"{k} neighbours of {n} rows by {table.metadata['metric']}; "
        f"mean score {total / (n * k):.4f} (first {first / n:.4f}, last {last / n:.4f}); "
        f"one row is a neighbour of {num_neighbour_of.max()} others, "
        f"{(num_neighbour_of == 0).sum()} rows of none"
    )


def _open_table(out: Path, rows: ExactRows, num_neighbours: int, metric: str) -> NeighbourTable:
    """The table in `out`, or a new one with as many shards as the features."""
    metadata = {
        "num_rows": rows.num_rows,
        "num_neighbours": num_neighbours,
        "num_shards": rows.table.num_shards,
        "metric": metric,
        "view": rows.view,
        "features": content_digest(rows.table, rows.readers, rows.view),
    }
    return NeighbourTable.open_or_create(out, metadata)


def _plan_rounds(
    table: NeighbourTable,
    missing: list[int],
    readable_shards: tuple[frozenset[int], ...],
    max_rows: int,
) -> list[tuple[list[int], ...]]:
    """Shards to search for, by round and rank.

    A shard goes to the rank with the fewest rows so far of those that can read it. A rank's shards
    are grouped into rounds of at most `max_rows` rows, or of one shard.
    """
    world_size = len(readable_shards)
    rounds_by_rank: list[list[list[int]]] = [[] for _ in range(world_size)]
    total_rows = [0] * world_size
    round_rows = [0] * world_size
    for shard in missing:
        start, stop = table.shard_range(shard)
        # The rank with the fewest rows of those that can read the shard.
        readers = [rank for rank in range(world_size) if shard in readable_shards[rank]]
        rank = min(readers, key=total_rows.__getitem__)
        rounds = rounds_by_rank[rank]
        # A new round if the shard does not fit into the last one.
        if not rounds or round_rows[rank] + stop - start > max_rows:
            rounds.append([])
            round_rows[rank] = 0
        rounds[-1].append(shard)
        round_rows[rank] += stop - start
        total_rows[rank] += stop - start
    return list(zip_longest(*rounds_by_rank, fillvalue=[]))


def search_round(
    rows: ExactRows,
    spans: list[tuple[int, int]],
    num_neighbours: int,
    is_l2: bool,
    chunk_rows: int,
    before_chunk: Callable[[], None] = lambda: None,
) -> TopK:
    """The nearest other rows of this rank's query rows in one round. Collective.

    spans: (start, stop) of the query rows. Scores of l2 are negative squared distances of the
    scaled rows.
    """
    from dist_scan.search.index import thread_pool

    ids, values = rows.read_spans(spans)
    search = RunningSearch(ids, values, num_neighbours, rows.num_rows, is_l2)
    with thread_pool() as pool, closing(broadcast_chunks(rows, chunk_rows)) as chunks:
        for start, chunk in chunks:
            before_chunk()
            search.add_chunk(chunk, start, pool)
    return search.top


class RunningSearch:
    """The top K of a fixed set of queries over all chunks added so far.

    ids [n] (the row that is never its own neighbour), values [n, D] float32. Free places of the top
    K have a score of minus infinity and an id that is no row's.
    """

    def __init__(
        self, ids: np.ndarray, values: np.ndarray, k: int, num_rows: int, is_l2: bool
    ) -> None:
        self.is_l2 = is_l2
        no_bound = np.zeros(len(ids))  # set for each chunk
        self.queries = QueryBlock(values, ids, squared_norms(values), no_bound)
        shape = len(ids), k
        self.top = TopK(np.full(shape, num_rows, np.int64), np.full(shape, -np.inf))
        self.blocks = list(_query_blocks(len(ids), torch.get_num_threads()))

    def add_chunk(self, rows: np.ndarray, start: int, pool: ThreadPoolExecutor) -> None:
        """Search the rows start, start + 1, ..., [m, D] float16."""
        from dist_scan.search.index import FlatIndex  # importing faiss takes long

        # Prepare the chunk.
        values = rows.astype(np.float32)
        database = DatabaseRows(values, squared_norms(values), start)
        index = FlatIndex(values, "l2" if self.is_l2 else "inner_product")
        self.queries = self.queries._replace(error_bound=self._error_bound(database))
        # Candidates by float32, scored exactly; then every row, for uncertain queries.
        is_uncertain = pool.map(partial(self.search_block, database, index.search), self.blocks)
        self._search_densely(database, np.flatnonzero(np.concatenate(list(is_uncertain))))

    def _error_bound(self, database: DatabaseRows) -> np.ndarray:
        """Largest difference [n] between a query's float32 and exact scores with rows of a chunk.

        With u = 2^-24, a float32 inner product of D terms differs from the exact one by at most
        g |q| |r|, g = D u / (1 - D u), whatever the order of summation (Higham, Accuracy and
        Stability of Numerical Algorithms, section 3.1). For l2 faiss computes
        |q|^2 + |r|^2 - 2 q.r: rounding in the three sums adds up to at most g (|q| + |r|)^2, and
        two additions of them to 3 u of that. (D + 8) u covers both terms up to D = 9,000.
        """
        norms = np.sqrt(self.queries.squared_norms)
        largest = float(np.sqrt(database.squared_norms.max()))
        size = (norms + largest) ** 2 if self.is_l2 else norms * largest
        return (database.values.shape[1] + 8) * 2.0**-24 * size

    def search_block(self, database: DatabaseRows, search: Search, block: slice) -> np.ndarray:
        """Add a chunk's candidates to the top K of a block of queries.

        Returns [n] bool: queries of which other rows of the chunk may belong to the top K.
        """
        from dist_scan.search.kernels import add_candidates

        # Views of the block: top is changed in place.
        queries = QueryBlock(*(part[block] for part in self.queries))
        top = TopK(*(part[block] for part in self.top))
        is_uncertain = np.zeros(len(queries.ids), bool)
        if len(is_uncertain):
            count = min(top.ids.shape[1] + EXTRA_CANDIDATES, len(database.values))
            scores, candidates = search(queries.values, count)
            add_candidates(queries, database, scores, candidates, self.is_l2, top, is_uncertain)
        return is_uncertain

    def _search_densely(self, database: DatabaseRows, selected: np.ndarray) -> None:
        """Compare the selected queries with every row of a chunk in float64."""
        from dist_scan.search.kernels import add_dense

        self._remove_chunk(database, selected)
        for b in range(0, len(selected), DENSE_QUERIES):
            part = selected[b : b + DENSE_QUERIES]
            queries = torch.from_numpy(self.queries.values[part]).double()
            for r in range(0, len(database.values), BLOCK_ROWS):
                block = torch.from_numpy(database.values[r : r + BLOCK_ROWS]).double()
                scores = (queries @ block.T).numpy()
                if self.is_l2:
                    scores = (
                        2 * scores
                        - self.queries.squared_norms[part][:, None]
                        - database.squared_norms[None, r : r + BLOCK_ROWS]
                    )
                add_dense(scores, part, self.queries.ids, database.start + r, self.top)

    def _remove_chunk(self, database: DatabaseRows, selected: np.ndarray) -> None:
        """Take a chunk's rows out of the top K, so that none is inserted twice."""
        ids, scores = self.top.ids[selected], self.top.scores[selected]
        stop = database.start + len(database.values)
        is_of_chunk = (ids >= database.start) & (ids < stop)
        scores[is_of_chunk] = -np.inf
        ids[is_of_chunk] = np.iinfo(np.int64).max
        # Free places go to the end.
        order = np.lexsort((ids, -scores), axis=1)
        self.top.scores[selected] = np.take_along_axis(scores, order, 1)
        self.top.ids[selected] = np.take_along_axis(ids, order, 1)


def _query_blocks(n: int, threads: int) -> Iterator[slice]:
    """Blocks of at most QUERY_BLOCK queries, equally many for every thread."""
    count = max(1, -(-n // QUERY_BLOCK))
    count = -(-count // threads) * threads
    return (slice(i * n // count, (i + 1) * n // count) for i in range(count))
