"""Prediction: clusters of images by a published model, and their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.data.augment.recipes import Recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feed import eval_batches
from dist_scan.engine.precision import Precision, autocast
from dist_scan.models.cluster_model import ClusterModel

NUM_TOP = 5
"""Number of most probable clusters that are recorded for each image."""


class BatchPrediction(NamedTuple):
    """Predictions for n images, T = min(5, number of clusters) clusters each."""

    top: np.ndarray
    """Clusters [n, T] int32, the most probable first."""
    probability: np.ndarray
    """Their probabilities [n, T] float32."""
    features: np.ndarray | None
    """[n, D] float16, if the Predictor has an Embedder."""


class Embedder(NamedTuple):
    """What computed a run's feature table: network (eval mode, on the device) and precision."""

    network: nn.Module
    precision: Precision


def top_clusters(probability: Tensor) -> tuple[Tensor, Tensor]:
    """The T most probable clusters from probabilities [B, C]: (probability, cluster) [B, T].

    On the CPU.
    """
    values, clusters = probability.topk(min(NUM_TOP, probability.shape[1]), 1)
    return values.cpu(), clusters.cpu()


@dataclass
class Predictor:
    """`for prediction in Predictor(...)(rows)`: predictions of these rows, batch by batch in order.

    A batch that does not fit into memory is halved, which is logged.
    """

    model: ClusterModel
    loader: BetonLoader
    recipe: Recipe
    device: torch.device
    precision: Precision = "fp32"
    embedder: Embedder | None = None
    log: Callable[[str], None] = print

    @cached_property
    def has_shared_backbone(self) -> bool:
        """True if the model's backbone computes the Embedder's features: one pass gives both."""
        return (
            self.embedder is not None
            and self.embedder.precision == self.precision
            and _equal_weights(self.embedder.network, self.model.backbone)
        )

    @torch.inference_mode()
    def __call__(self, rows: np.ndarray) -> Iterator[BatchPrediction]:
        """Raises torch.OutOfMemoryError if not even one image fits."""
        done = 0
        while done < len(rows):
            try:
                for batch in eval_batches(self.loader, self.recipe, rows[done:], self.device):
                    prediction = self._predict(batch.views[0])
                    done += len(prediction.top)
                    yield prediction
            except torch.OutOfMemoryError:
                if self.loader.batch_size == 1:
                    raise
                self.loader.batch_size //= 2
                self.log(f"out of memory: continuing with batches of {self.loader.batch_size}")

    def _predict(self, images: Tensor) -> BatchPrediction:
        features = None
        with autocast(self.precision, self.device):
            if self.has_shared_backbone and self.model.backbone is not None:
                features = self.model.backbone(images)
                logits = self.model.from_features(features)
            else:
                logits = self.model(images)
        if self.embedder is not None and not self.has_shared_backbone:
            with autocast(self.embedder.precision, self.device):
                features = self.embedder.network(images)
        probability, top = top_clusters(logits.float().softmax(1))
        if features is not None:
            features = features.float().cpu().numpy().astype(np.float16)
        return BatchPrediction(top.numpy().astype(np.int32), probability.numpy(), features)


def _equal_weights(network: nn.Module, other: nn.Module | None) -> bool:
    """True if two networks have the same weights, bit for bit."""
    if other is None:
        return False
    first, second = network.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
