"""Clusters for images through a published model, batch by batch, and the features that say how new each image is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.data.augment.recipes import Recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feed import eval_batches
from dist_scan.engine.precision import Precision, autocast
from dist_scan.models.cluster_model import ClusterModel

TOP = 5


class Predicted(NamedTuple):
    """Of some rows, most probable first: top [n, T] int32, probability [n, T] float32; features [n, D] float16 when asked for."""

    top: np.ndarray
    probability: np.ndarray
    features: np.ndarray | None


class Embedder(NamedTuple):
    """What made a run's feature table: its network (eval mode, on the device) and number format."""

    network: nn.Module
    precision: Precision


def top_clusters(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] -> (probability [B, T], cluster [B, T]) of the T = min(5, C) most probable, on the CPU."""
    probability, top = torch.softmax(logits, 1).topk(min(TOP, logits.shape[1]), 1)
    return probability.cpu(), top.cpu()


class Predictor:
    """`for part in Predictor(...)(rows)`: predictions of these rows in order. A batch that does not fit is halved, and that is said."""

    def __init__(
        self,
        model: ClusterModel,
        loader: BetonLoader,
        recipe: Recipe,
        device: torch.device,
        precision: Precision = "fp32",
        embedder: Embedder | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.loader, self.recipe, self.device, self.precision = (
            model,
            loader,
            recipe,
            device,
            precision,
        )
        self.embedder, self.say = embedder, say
        # heads on a frozen backbone: the features of the table are the ones the head reads, so one pass gives both
        self.shared = (
            embedder is not None
            and embedder.precision == precision
            and equal_weights(embedder.network, model.backbone)
        )

    @torch.inference_mode()
    def __call__(self, rows: np.ndarray) -> Iterator[Predicted]:
        """Raises torch.OutOfMemoryError when not even one image fits."""
        done = 0
        while done < len(rows):
            try:
                for batch in eval_batches(self.loader, self.recipe, rows[done:], self.device):
                    part = self._predict(batch.views[0])
                    done += len(part.top)
                    yield part
            except torch.OutOfMemoryError:
                if self.loader.batch_size == 1:
                    raise
                self.loader.batch_size //= 2
                self.say(f"out of memory: going on with batches of {self.loader.batch_size}")

    def _predict(self, images: Tensor) -> Predicted:
        features = None
        with autocast(self.precision, self.device):
            if self.shared:
                features = self.model.backbone(images)
                logits = self.model.from_features(features)
            else:
                logits = self.model(images)
        if self.embedder is not None and not self.shared:
            with autocast(self.embedder.precision, self.device):
                features = self.embedder.network(images)
        probability, top = top_clusters(logits.float())
        kept = None if features is None else features.float().cpu().numpy().astype(np.float16)
        return Predicted(top.numpy().astype(np.int32), probability.numpy(), kept)


def equal_weights(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether two networks are the same, bit for bit."""
    first, second = one.state_dict(), other.state_dict() if other is not None else {}
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
