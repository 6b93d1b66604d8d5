"""Streams of random numbers: one use each, and embedding draws views of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dist_scan.data import order
from dist_scan.data.augment import crops, recipes
from dist_scan.data.augment.recipes import RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.engine import training_loop
from dist_scan.engine.embed import EmbedOptions, embed_images
from dist_scan.engine.stop import StopFlag
from dist_scan.methods import _clustering
from dist_scan.models import sphere_codes
from dist_scan.search import kmeans_init
from tests.support.images import build_beton, write_image_folder

SIZE = 16


def test_no_stream_has_two_uses() -> None:
    streams = [
        *(training_loop.EPOCH_STREAM, training_loop.STEP_STREAM),
        *(order.ORDER, order.NEIGHBOUR, order.VIEW, order.HELD_OUT),
        *(order.DRAW, order.SHUFFLE, order.REPEAT),
        *(crops.CROP, recipes.COLOUR),
        *(kmeans_init.SAMPLE_STREAM, kmeans_init.FIRST_STREAM, kmeans_init.DRAW_STREAM),
        *(_clustering.TOP_LAYER_STREAM, _clustering.KMEANS_STREAM),
        *(sphere_codes.COMPONENT, sphere_codes.NOISE, sphere_codes.MEANS),
    ]
    repeated = [stream for stream, count in Counter(streams).items() if count > 1]
    assert not repeated


class Pixels(nn.Module):
    """The views themselves as features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_embedding_draws_other_views_than_the_first_epoch_of_a_training(tmp_path: Path) -> None:
    beton = build_beton(write_image_folder(tmp_path / "images"), tmp_path / "images.beton")
    recipe = build_recipe(RecipeConfig(name="standard"), SIZE, (0.5,) * 3, (0.5,) * 3)
    loader = BetonLoader(beton, (recipe.crop,), seed=0, batch_size=12, num_threads=1)
    options = EmbedOptions(3 * SIZE**2, num_shards=1, seed=0)
    table = embed_images(Pixels(), loader, (recipe,), tmp_path / "table", options, StopFlag())
    rows = np.arange(loader.num_images)
    embedded = torch.from_numpy(table.rows(rows).astype(np.float32))
    _, (view,) = next(iter(loader.batches(rows, 0)))
    trained = recipe(view, rows, seed=0, epoch=0, view=0).flatten(1)
    differences = (embedded - trained).abs().mean(1)
    assert (differences > 0.01).all(), "an image has the view of epoch 0"
