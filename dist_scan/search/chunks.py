"""All rows of a feature table on every rank, a chunk at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch

from dist_scan.search.exact_rows import ExactRows
from dist_scan.search.shard_readers import shard_pieces
from dist_scan.world.collectives import Work, broadcast_async
from dist_scan.world.world import current

NUM_BUFFERS = 3  # one chunk is searched, the next is broadcast, the one after that is read


def broadcast_chunks(
    rows: ExactRows, chunk_rows: int
) -> Generator[tuple[int, np.ndarray], None, None]:
    """All rows in order, as (first row, rows [m, D] float16). Collective.

    A chunk is valid until the next one is asked for. Close the generator to leave early: pending
    broadcasts are then waited for.
    """
    pipeline = _ChunkPipeline(rows, chunk_rows)
    with ThreadPoolExecutor(1) as thread:
        pipeline.read(0)
        pending = pipeline.broadcast(0)
        reading = thread.submit(pipeline.read, 1)
        try:
            for i, (start, _) in enumerate(pipeline.spans):
                _wait(pending)
                pending = []
                reading.result()
                pending = pipeline.broadcast(i + 1)
                reading = thread.submit(pipeline.read, i + 2)
                yield start, pipeline.buffer(i)
        finally:
            _wait(pending)


class _ChunkPipeline:
    """Buffers of a few chunks; chunk i uses buffer i modulo their number."""

    def __init__(self, rows: ExactRows, chunk_rows: int) -> None:
        n = rows.num_rows
        self.rows = rows
        self.spans = [(start, min(start + chunk_rows, n)) for start in range(0, n, chunk_rows)]
        shape = (min(chunk_rows, n), rows.table.dim)
        count = min(NUM_BUFFERS, len(self.spans))
        self.buffers = [np.empty(shape, np.float16) for _ in range(count)]

    def buffer(self, i: int) -> np.ndarray:
        """Rows of chunk i."""
        start, stop = self.spans[i]
        return self.buffers[i % NUM_BUFFERS][: stop - start]

    def read(self, i: int) -> None:
        """Read this rank's rows of chunk i from disk; no-op past the last chunk."""
        for reader, start, out in self._segments(i):
            if reader == current().rank:
                self.rows.read_into(out, start)

    def broadcast(self, i: int) -> list[Work]:
        """Start to broadcast chunk i from its readers; empty past the last chunk."""
        return [
            broadcast_async(torch.from_numpy(out.view(np.uint8)), reader)
            for reader, _, out in self._segments(i)
        ]

    def _segments(self, i: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(reader, first row, part of the buffer) of chunk i; adjacent shards are joined."""
        if i >= len(self.spans):
            return
        chunk_start, chunk_stop = self.spans[i]
        pieces = shard_pieces(self.rows.table, chunk_start, chunk_stop)
        for reader, group in groupby(pieces, lambda piece: self.rows.readers.reader[piece[0]]):
            run = list(group)
            start, stop = run[0][1], run[-1][2]
            yield reader, start, self.buffer(i)[start - chunk_start : stop - chunk_start]


def _wait(pending: list[Work]) -> None:
    for work in pending:
        work.wait()
