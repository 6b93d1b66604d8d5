"""How far new images lie from everything a run was trained on: the cosine distance to the nearest row of its feature table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.search.exact_rows import unit_rows

CHUNK, BLOCK, CANDIDATES = 65_536, 4_096, 4


def nearest_row(
    features: np.ndarray,
    table: FeatureTable,
    device: torch.device,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each of `features` [n, D] (float16, as the table's): (cosine distance [n] float32, row [n] int64) of the nearest row of view 0.

    Four candidates a chunk in float32, scored again exactly (search/rows.py), ties to the first row: the distance does not depend on
    device or chunks, the row only where more than four lie within float32's rounding. A feature that is all zero is at distance 1 from
    everything. `advance(rows)` is told of every chunk. Raises ValueError when the widths differ.
    """
    if features.shape[1] != table.dim:
        raise ValueError(
            f"features of {features.shape[1]} numbers against a table of {table.dim}; give the table made with the same backbone"
        )
    queries = _unit(features)
    best, row = np.full(len(queries), -np.inf), np.full(len(queries), table.num_rows)
    for start in range(0, table.num_rows, CHUNK):
        rows = _unit(table.rows(np.arange(start, min(start + CHUNK, table.num_rows))))
        there = torch.from_numpy(rows).to(device).float()
        for b in range(0, len(queries), BLOCK):
            part = slice(b, b + BLOCK)
            score, place = _best(queries[part], rows, there)
            better = score > best[part]  # strictly: of equals the first row stays
            best[part], row[part] = (
                np.where(better, score, best[part]),
                np.where(better, place + start, row[part]),
            )
        advance(len(rows))
    return np.maximum(1 - best, 0).astype(np.float32), row


def _unit(rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(unit_rows(rows))


def _best(
    queries: np.ndarray, rows: np.ndarray, there: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(exact cosine [n] float64, place [n]) of the best of `rows` for each query."""
    rough = torch.from_numpy(queries).to(there.device).float() @ there.T
    places = np.sort(rough.topk(min(CANDIDATES, len(rows)), 1).indices.cpu().numpy(), 1)
    exact = np.matmul(rows[places].astype(np.float64), queries.astype(np.float64)[:, :, None])[
        :, :, 0
    ]
    first = exact.argmax(1)
    return exact[np.arange(len(first)), first], places[np.arange(len(first)), first]


def training_distances(table: NeighbourTable) -> np.ndarray:
    """Each training image's cosine distance to its own nearest other, sorted [N]: what is usual, from a table mined with cosine."""
    parts = [table.rows(np.arange(*table.shard_range(s)))[1][:, 0] for s in range(table.num_shards)]
    return np.sort(np.maximum(1 - np.concatenate(parts), 0).astype(np.float32))


def fraction_nearer(distance: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Share [n] float32 of the training images that lie nearer to their nearest other than each of `distance` [n]: 0.99 is a stranger."""
    return (np.searchsorted(usual, distance, side="left") / len(usual)).astype(np.float32)
