"""The parquet file of a prediction: a row per image, written in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_scan.data.beton.format import read_names
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.predictor import BatchPrediction, Predictor
from dist_scan.finished_run import FinishedRun
from dist_scan.monitoring.progress import Progress
from dist_scan.prediction.images import StoredImages
from dist_scan.search.novelty import fraction_nearer, nearest_row, training_distances
from dist_scan.storage.atomic import write_atomic

BLOCK = 131_072
"""Rows that are collected in memory and written at a time."""


class NoveltyColumns:
    """Columns about the nearest training image, by the features of an embed stage.

    novelty: cosine distance to it; nearest: its row; novelty_share: share of the training images
    with a smaller distance to their nearest neighbour, if the run searched with cosine.
    """

    def __init__(self, run: FinishedRun, features: str) -> None:
        self.table = FeatureTable.open(run.artifacts[features].path)
        self.training_distances = None
        for name in run.stages_of_kind("neighbours"):
            settings = run.settings(name)
            if settings["features"] == features and settings["metric"] == "cosine":
                neighbours = NeighbourTable.open(run.artifacts[name].path)
                self.training_distances = training_distances(neighbours)
                break

    def __call__(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """The columns for images with these features [n, D]."""
        with Progress("novelty", self.table.num_rows, "training rows") as progress:
            distance, row = nearest_row(features, self.table, progress.advance)
        columns = {"novelty": distance, "nearest": row}
        if self.training_distances is not None:
            columns["novelty_share"] = fraction_nearer(distance, self.training_distances)
        return columns


def write_table(
    out: Path,
    predictor: Predictor,
    images: StoredImages,
    novelty: NoveltyColumns | None,
    source: str,
) -> None:
    """Predict all images and write `out` atomically; `source` goes into its metadata."""
    names = read_names(images.beton)
    rows = np.arange(len(images.index))

    def write(file: BinaryIO) -> None:
        writer, start = None, 0
        for predicted in _blocks(predictor, rows):
            block = slice(start, start + len(predicted.top))
            columns = _columns(names[block], images.index[block], predicted)
            if novelty is not None and predicted.features is not None:
                columns |= novelty(predicted.features)
            table = pa.table(columns)
            if writer is None:
                schema = table.schema.with_metadata({"dist_scan": source})
                writer = pq.ParquetWriter(file, schema)
            writer.write_table(table)
            start = block.stop
        assert writer is not None, "there is at least one image"
        writer.close()

    write_atomic(out, write)


def _blocks(predictor: Predictor, rows: np.ndarray) -> Iterator[BatchPrediction]:
    """Predictions of all rows, BLOCK or a few more at a time."""
    parts: list[BatchPrediction] = []
    num_pending = 0
    with Progress("predict", len(rows), "images") as progress:
        for part in predictor(rows):
            parts.append(part)
            num_pending += len(part.top)
            progress.advance(len(part.top))
            if num_pending >= BLOCK:
                yield _concatenate(parts)
                parts = []
                num_pending = 0
        if parts:
            yield _concatenate(parts)


def _concatenate(parts: list[BatchPrediction]) -> BatchPrediction:
    features = None
    if parts[0].features is not None:
        features = np.concatenate([part.features for part in parts])
    return BatchPrediction(
        np.concatenate([part.top for part in parts]),
        np.concatenate([part.probability for part in parts]),
        features,
    )


def _columns(
    names: list[str], index: np.ndarray, predicted: BatchPrediction
) -> dict[str, Sequence[str] | np.ndarray | pa.Array]:
    """Name, row in the source, clusters and their probabilities."""
    top, probability = predicted.top, predicted.probability
    return {
        "name": names,
        "index": index,
        "cluster": top[:, 0],
        "probability": probability[:, 0],
        "top_clusters": _list_column(top),
        "top_probabilities": _list_column(probability),
    }


def _list_column(values: np.ndarray) -> pa.Array:
    """A column of lists from an array [n, T]."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
