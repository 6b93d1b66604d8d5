"""The parts of prediction: the nearest training row, batches that fit, one network or two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_scan.data.augment.recipes import RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.feature_table import FeatureTable
from dist_scan.data.neighbour_table import NeighbourTable
from dist_scan.engine.batch_size import bytes_per_image, fitting_batch
from dist_scan.engine.predict import Embedder, Predictor
from dist_scan.models.backbone import BackboneConfig, build_backbone
from dist_scan.models.cluster_model import ClusterModel
from dist_scan.models.layers import FeatureNorm
from dist_scan.monitoring.memory import free_memory
from dist_scan.search import novelty
from tests.support.images import build_beton, write_image_folder

CPU = torch.device("cpu")


def table(path, rows) -> FeatureTable:
    np.save(path.with_suffix(".npy"), rows)
    return FeatureTable.from_npy(path.with_suffix(".npy"), path, 3)


def test_the_nearest_row_is_the_float64_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "CHUNK_ROWS", 37)
    rng = np.random.default_rng(0)
    rows, new = (rng.standard_normal((n, 24)).astype(np.float16) for n in (100, 50))
    rows[90] = rows[5]  # a copy: the first counts
    new[0], new[1], new[2] = rows[5] * np.float16(2), rows[63], 0
    told = []
    distance, row = novelty.nearest_row(new, table(tmp_path / "t", rows), told.append)
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)  # noqa: E731
    cosine = unit(new.astype(np.float64)) @ unit(rows.astype(np.float64)).T
    assert row[:2].tolist() == [5, 63] and np.array_equal(row[3:], cosine[3:].argmax(1))
    np.testing.assert_allclose(distance, np.maximum(1 - cosine.max(1), 0), atol=2e-3)
    assert distance[2] == 1 and distance[:2].max() < 2e-3 and sum(told) == 100
    with pytest.raises(ValueError, match="features of width 8 against a table of width 24"):
        novelty.nearest_row(new[:, :8], table(tmp_path / "u", rows))


def test_what_is_usual(tmp_path: Path) -> None:
    neighbours = NeighbourTable.create(tmp_path / "n", 4, 2, 2)
    scores = np.array([[0.9, 0.5], [0.8, 0.1], [0.6, 0.6], [1.0, 0.2]])
    for s in range(2):
        neighbours.write_shard(s, np.zeros((2, 2), np.int64), scores[2 * s : 2 * s + 2])
    usual = novelty.training_distances(NeighbourTable.open(tmp_path / "n"))
    np.testing.assert_allclose(usual, [0, 0.1, 0.2, 0.4], atol=1e-6)
    assert novelty.fraction_nearer(np.array([0.0, 0.15, 0.9], np.float32), usual).tolist() == [
        0,
        0.5,
        1,
    ]


def test_a_batch_is_what_fits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    need = bytes_per_image(network, torch.zeros(2, 3, 16, 16))
    assert need == 2 * 2 * 8 * 16 * 16 * 4  # the ReLU's input and output, twice
    assert not any(m._forward_hooks for m in network.modules())
    assert [fitting_batch(256, 1000, free) for free in (0, 600_000, 511_000, 2_100, 10)] == [
        256,
        256,
        128,
        1,
        1,
    ]
    assert 2**20 < free_memory(CPU) < 2**50


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("beton")
    beton = build_beton(
        write_image_folder(root / "images", 23), root / "i.beton", stored="raw", resolution=16
    )
    recipe = build_recipe(RecipeConfig(name="center"), 16, (0.5,) * 3, (0.2,) * 3)
    return lambda batch: (
        BetonLoader(beton, (recipe.crop,), seed=0, batch_size=batch, num_threads=1),
        recipe,
    )


class Model(ClusterModel):
    """Fails as a GPU does on more than `most` images at once."""

    most = 10**9

    def forward(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = BackboneConfig(name="resnet_small", width=4)
    return Model(build_backbone(config), FeatureNorm("l2", 16), nn.Linear(16, 7), config).eval()


def predictions(predictor, rows=23):
    parts = list(predictor(np.arange(rows)))
    return [
        np.concatenate([getattr(p, name) for p in parts])
        if getattr(parts[0], name) is not None
        else None
        for name in parts[0]._fields
    ]


def test_out_of_memory_halves_the_batch_and_loses_no_row(loader) -> None:
    said, whole = [], predictions(Predictor(model(), *loader(8), CPU))
    small = model()
    small.most = 3
    predictor = Predictor(small, *loader(8), CPU, log=said.append)
    halved = predictions(predictor)
    assert (
        np.array_equal(whole[0], halved[0])
        and np.allclose(whole[1], halved[1], atol=1e-6)
        and whole[0].shape == (23, 5)
    )
    assert (
        said
        == [
            "out of memory: continuing with batches of 4",
            "out of memory: continuing with batches of 2",
        ]
        and predictor.loader.batch_size == 2
    )
    small.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        predictions(Predictor(small, *loader(2), CPU, log=said.append))


def test_features_come_from_the_network_that_made_the_table(loader) -> None:
    one, other = model(), model(1)
    shared = Predictor(one, *loader(8), CPU, embedder=Embedder(model().backbone, "fp32"))
    apart = Predictor(one, *loader(8), CPU, embedder=Embedder(other.backbone, "fp32"))
    assert shared.has_shared_backbone and not apart.has_shared_backbone
    plain, first, second = (
        predictions(p) for p in (Predictor(one, *loader(8), CPU), shared, apart)
    )
    assert (
        plain[2] is None
        and np.array_equal(plain[1], first[1])
        and np.array_equal(plain[1], second[1])
    )
    lone = predictions(Predictor(other, *loader(8), CPU, embedder=Embedder(other.backbone, "fp32")))
    assert (
        np.array_equal(second[2], lone[2])
        and not np.array_equal(first[2], second[2])
        and first[2].dtype == np.float16
    )
