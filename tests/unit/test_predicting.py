"""The parts of prediction: nearest training row, batches that fit memory, shared networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_scan.data.augment.recipes import Recipe, RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.batch_size import bytes_per_image, fitting_batch
from dist_scan.engine.predictor import BatchPrediction, Embedder, Predictor
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.models.cluster_model import ClusterModel
from dist_scan.models.layers import FeatureNorm
from dist_scan.monitoring.memory import free_memory
from dist_scan.search import novelty
from tests.support.images import build_beton, write_image_folder

CPU = torch.device("cpu")
NUM_IMAGES = 23
OpenLoader = Callable[[int], tuple[BetonLoader, Recipe]]


def feature_table(path: Path, rows: np.ndarray) -> FeatureTable:
    """A table of these rows."""
    np.save(path.with_suffix(".npy"), rows)
    return FeatureTable.from_npy(path.with_suffix(".npy"), path, 3)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length in float64; zero rows stay zero."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def test_the_nearest_row_is_that_of_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "CHUNK_ROWS", 37)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((100, 24)).astype(np.float16)
    new = generator.standard_normal((50, 24)).astype(np.float16)
    rows[90] = rows[5]  # of equal rows the first counts
    new[0] = rows[5] * np.float16(2)
    new[1] = rows[63]
    new[2] = 0
    advances: list[int] = []
    table = feature_table(tmp_path / "table", rows)
    distance, row = novelty.nearest_row(new, table, advances.append)
    cosine = unit_rows(new) @ unit_rows(rows).T
    assert row[:2].tolist() == [5, 63]
    assert np.array_equal(row[3:], cosine[3:].argmax(1))
    np.testing.assert_allclose(distance, np.maximum(1 - cosine.max(1), 0), atol=2e-3)
    assert distance[:2].max() < 2e-3
    assert distance[2] == 1
    assert sum(advances) == 100
    with pytest.raises(ValueError, match="features of width 8 against a table of width 24"):
        novelty.nearest_row(new[:, :8], table)


def test_the_distances_of_training_images_are_those_to_their_first_neighbour(
    tmp_path: Path,
) -> None:
    neighbours = NeighbourTable.create(tmp_path / "neighbours", (4, 2), 2)
    scores = np.array([[0.9, 0.5], [0.8, 0.1], [0.6, 0.6], [1.0, 0.2]])
    for shard in range(2):
        ids = np.zeros((2, 2), np.int64)
        neighbours.write_shard(shard, ids, scores[2 * shard : 2 * shard + 2])
    distances = novelty.training_distances(NeighbourTable.open(tmp_path / "neighbours"))
    np.testing.assert_allclose(distances, [0, 0.1, 0.2, 0.4], atol=1e-6)
    nearer = novelty.fraction_nearer(np.array([0.0, 0.15, 0.9], np.float32), distances)
    assert nearer.tolist() == [0, 0.5, 1]


def test_bytes_per_image_are_twice_those_of_the_largest_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    input_and_output_of_relu = 2 * 8 * 16 * 16 * 4
    assert bytes_per_image(network, torch.zeros(2, 3, 16, 16)) == 2 * input_and_output_of_relu
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("free_bytes", "batch"), [(0, 256), (600_000, 256), (511_000, 128), (2_100, 1), (10, 1)]
)
def test_a_batch_is_the_largest_that_fits(free_bytes: int, batch: int) -> None:
    assert fitting_batch(256, 1000, free_bytes) == batch


def test_free_memory_of_the_host_is_known() -> None:
    assert 2**20 < free_memory(CPU) < 2**50


@pytest.fixture(scope="module")
def open_loader(tmp_path_factory: pytest.TempPathFactory) -> OpenLoader:
    """A loader of batches of a given size, and its recipe."""
    root = tmp_path_factory.mktemp("beton")
    images = write_image_folder(root / "images", NUM_IMAGES)
    beton = build_beton(images, root / "images.beton", stored="raw", resolution=16)
    recipe = build_recipe(RecipeConfig(name="center"), 16, (0.5,) * 3, (0.2,) * 3)

    def open_one(batch: int) -> tuple[BetonLoader, Recipe]:
        loader = BetonLoader(beton, (recipe.crop,), seed=0, batch_size=batch, num_threads=1)
        return loader, recipe

    return open_one


class LimitedModel(ClusterModel):
    """Runs out of memory, as a GPU does, with more than `most` images at once."""

    most = 10**9

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def cluster_model(seed: int = 0) -> LimitedModel:
    """A small model with random weights."""
    torch.manual_seed(seed)
    config = BackboneConfig(name="resnet_small", width=4)
    head = nn.Linear(16, 7)
    return LimitedModel(build_backbone(config), FeatureNorm("l2", 16), head, config).eval()


def predict_all(predictor: Predictor) -> BatchPrediction:
    """The predictions of all images."""
    parts = list(predictor(np.arange(NUM_IMAGES)))
    features = [part.features for part in parts if part.features is not None]
    return BatchPrediction(
        np.concatenate([part.top for part in parts]),
        np.concatenate([part.probability for part in parts]),
        np.concatenate(features) if features else None,
    )


def test_batches_are_halved_until_they_fit(open_loader: OpenLoader) -> None:
    lines: list[str] = []
    whole = predict_all(Predictor(cluster_model(), *open_loader(8), CPU))
    model = cluster_model()
    model.most = 3
    predictor = Predictor(model, *open_loader(8), CPU, log=lines.append)
    halved = predict_all(predictor)
    assert whole.top.shape == (NUM_IMAGES, 5)
    assert np.array_equal(whole.top, halved.top)
    assert np.allclose(whole.probability, halved.probability, atol=1e-6)
    assert predictor.loader.batch_size == 2
    assert lines == [
        "out of memory: continuing with batches of 4",
        "out of memory: continuing with batches of 2",
    ]
    model.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        predict_all(Predictor(model, *open_loader(2), CPU, log=lines.append))


def test_features_are_those_of_the_embedder(open_loader: OpenLoader) -> None:
    model, other = cluster_model(0), cluster_model(1)

    def predictor_of(model: ClusterModel, embedder: ClusterModel | None) -> Predictor:
        network = None if embedder is None else Embedder(embedder.backbone, "fp32")
        return Predictor(model, *open_loader(8), CPU, embedder=network)

    same_weights = predictor_of(model, cluster_model(0))
    other_weights = predictor_of(model, other)
    assert same_weights.has_shared_backbone and not other_weights.has_shared_backbone
    plain = predict_all(predictor_of(model, None))
    shared = predict_all(same_weights)
    separate = predict_all(other_weights)
    assert plain.features is None
    assert np.array_equal(plain.probability, shared.probability)
    assert np.array_equal(plain.probability, separate.probability)
    expected = predict_all(predictor_of(other, other)).features
    assert np.array_equal(separate.features, expected)
    assert not np.array_equal(shared.features, separate.features)
    assert shared.features.dtype == np.float16
