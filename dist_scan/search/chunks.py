"""All rows of a feature table on every rank, a chunk at a time."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch

from dist_scan.search.exact_rows import ExactRows
from dist_scan.search.shard_readers import shard_pieces
from dist_scan.world.collectives import PendingBroadcast, broadcast_async
from dist_scan.world.world import current

NUM_BUFFERS = 3  # one chunk is searched, the next is broadcast, the one after that is read


def broadcast_chunks(
    rows: ExactRows, chunk_rows: int
) -> Generator[tuple[int, np.ndarray], None, None]:
    """All rows in order, as (first row, rows [m, D] float16). Collective.

    A chunk is valid until the next one is requested. Close the generator to leave early: pending
    broadcasts are then waited for.
    """
    n = rows.num_rows
    spans = [(start, min(start + chunk_rows, n)) for start in range(0, n, chunk_rows)]
    shape = (min(chunk_rows, n), rows.table.dim)
    buffers = [np.empty(shape, np.float16) for _ in range(NUM_BUFFERS)]
    pending: list[PendingBroadcast | None] = []

    def read(i: int) -> list[tuple[int, np.ndarray]]:
        """Read this rank's rows of chunk i; (reader, rows) of all its segments."""
        if i >= len(spans):
            return []
        return _read_segments(rows, spans[i], buffers[i % NUM_BUFFERS])

    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read, 0)
        try:
            for i in range(len(spans) + 1):
                # Chunk i - 1 has arrived; start to send chunk i and to read the one after it.
                _wait(pending)
                pending = [
                    broadcast_async(torch.from_numpy(segment.view(np.uint8)), reader)
                    for reader, segment in reading.result()
                ]
                reading = thread.submit(read, i + 1)
                if i > 0:
                    start, stop = spans[i - 1]
                    yield start, buffers[(i - 1) % NUM_BUFFERS][: stop - start]
        finally:
            _wait(pending)


def _read_segments(
    rows: ExactRows, span: tuple[int, int], buffer: np.ndarray
) -> list[tuple[int, np.ndarray]]:
    """(reader, part of the buffer) of a chunk; those of which this rank is the reader are filled.

    Adjacent shards of one reader are one segment.
    """
    segments = []
    pieces = shard_pieces(rows.table, *span)
    for reader, group in groupby(pieces, lambda piece: rows.readers.reader[piece[0]]):
        run = list(group)
        start, stop = run[0][1], run[-1][2]
        segment = buffer[start - span[0] : stop - span[0]]
        if reader == current().rank:
            rows.read_into(segment, start)
        segments.append((reader, segment))
    return segments


def _wait(pending: list[PendingBroadcast | None]) -> None:
    for work in pending:
        if work is not None:
            work.wait()
