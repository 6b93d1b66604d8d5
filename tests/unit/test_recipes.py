"""Recipes: what is drawn, what a view depends on, the crops, and which settings are valid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dist_scan.data.augment import colour, randaugment, recipes, warp
from dist_scan.data.augment.crops import crop_boxes
from dist_scan.data.augment.recipes import (
    RECIPES,
    Recipe,
    RecipeConfig,
    build_recipe,
    resolution_warning,
)
from tests.support.photographs import photographs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = (200, 40, 90)


def make_recipe(name: str, image_size: int = 32, **settings: Any) -> Recipe:
    return build_recipe(RecipeConfig(name=name, **settings), image_size, MEAN, STD)


def augment(
    recipe: Recipe,
    images: np.ndarray,
    index: np.ndarray | None = None,
    *,
    seed: int = 1,
    epoch: int = 2,
    view: int = 0,
) -> Tensor:
    """Views of images in the dataset rows `index` (default: 0, 1, 2, ...)."""
    if index is None:
        index = np.arange(len(images))
    return recipe(torch.from_numpy(images), index, seed=seed, epoch=epoch, view=view)


def denormalise(x: Tensor) -> Tensor:
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def uniform_images(count: int, size: int = 8) -> np.ndarray:
    """[count, size, size, 3] of one colour."""
    return np.broadcast_to(np.array(COLOUR, np.uint8), (count, size, size, 3)).copy()


def is_close(fraction: float, probability: float, n: int) -> bool:
    """True if a fraction of n draws is within four standard deviations of its probability."""
    deviation = np.sqrt(probability * (1 - probability) / n)
    return abs(fraction - probability) < 4 * deviation + 1e-9


# --- what a view depends on ------------------------------------------------------------------


def check_independence(recipe: Recipe, images: np.ndarray) -> None:
    """A view does not depend on the other images of the batch or on their order."""
    index = np.arange(len(images)) * 5 + 2
    views = augment(recipe, images, index)
    assert views.dtype == torch.float32
    assert views.shape == (len(images), 3, *images.shape[1:3])
    assert views.isfinite().all()
    alone = [augment(recipe, images[i : i + 1], index[i : i + 1]) for i in range(len(images))]
    assert torch.equal(views, torch.cat(alone))
    order = np.random.default_rng(0).permutation(len(images))
    assert torch.equal(augment(recipe, images[order], index[order]), views[order])
    assert torch.equal(augment(recipe, images[3:8], index[3:8]), views[3:8])


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_does_not_depend_on_the_batch(name: str) -> None:
    check_independence(make_recipe(name), photographs(32, 40))


@pytest.mark.parametrize("name", [name for name, spec in RECIPES.items() if spec.jitter])
def test_a_view_with_fused_jitter_does_not_depend_on_the_batch(name: str) -> None:
    check_independence(make_recipe(name, colour="fused"), photographs(32, 40))


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["moco_v1", "randaugment", "digits"])
def test_a_large_view_does_not_depend_on_the_batch_or_the_threads(
    name: str, num_threads: int
) -> None:
    """Above 32,768 values torch sums a batch of one in parallel, and in another order."""
    check_independence(make_recipe(name, 224), photographs(224, 9))


@pytest.mark.parametrize(
    "name",
    [name for name, spec in RECIPES.items() if spec.jitter or spec.first_augmentation != "none"],
)
def test_a_view_depends_on_seed_epoch_view_and_row(name: str) -> None:
    recipe, images = make_recipe(name), photographs(32, 60)
    index = np.arange(60)
    views = augment(recipe, images, index)
    assert torch.equal(views, augment(recipe, images, index))
    others = [
        augment(recipe, images, index, view=1),
        augment(recipe, images, index, epoch=3),
        augment(recipe, images, index, seed=2),
        augment(recipe, images, index + 60),
    ]
    for other in others:
        has_changed = (other - views).flatten(1).abs().amax(1) > 0
        assert has_changed.float().mean() > 0.6


@pytest.mark.parametrize("name", RECIPES)
def test_the_input_is_not_changed(name: str) -> None:
    images = photographs(32, 20)
    before = images.copy()
    augment(make_recipe(name), images)
    assert np.array_equal(images, before)


@pytest.mark.parametrize(
    "images, index",
    [
        (torch.zeros(2, 8, 8, 3), [0, 1]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1]),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0]),
    ],
    ids=["float", "channels first", "one row for two images"],
)
def test_input_of_another_dtype_or_shape_is_refused(images: Tensor, index: list[int]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        make_recipe("simclr")(images, np.array(index), seed=0, epoch=0, view=0)


# --- what is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["center", "standard", "deepcluster"])
def test_recipes_without_colours_only_normalise(name: str) -> None:
    images = photographs(32, 8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    expected = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(augment(make_recipe(name), images), expected, atol=1e-6)


def test_mmdc_does_not_normalise() -> None:
    images = photographs(32, 8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    assert torch.allclose(augment(make_recipe("mmdc_center"), images), x, atol=1e-7)
    views = augment(make_recipe("mmdc"), images)
    assert views.min() >= 0
    assert views.max() <= 1


def test_jitter_and_greyscale_have_their_probabilities() -> None:
    n = 4000
    images = uniform_images(n)
    original = torch.tensor(COLOUR) / 255
    pixel = denormalise(augment(make_recipe("simclr"), images))[:, :, 0, 0]
    is_grey = pixel.amax(1) - pixel.amin(1) < 1e-4
    assert is_close(is_grey.float().mean().item(), 0.2, n)
    is_unchanged = (pixel - original).abs().amax(1) < 1e-4
    assert is_close(is_unchanged.float().mean().item(), 0.2 * 0.8, n)
    always = denormalise(augment(make_recipe("moco_v1"), images))[:, :, 0, 0]
    is_unchanged = (always - original).abs().amax(1) < 1e-4
    assert is_unchanged.float().mean() < 0.01


def test_blur_has_its_probability_and_uniform_sigmas(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[np.ndarray, float]] = []

    def record(x: Tensor, draws: np.ndarray, probability: float) -> Tensor:
        calls.append((draws, probability))
        return x

    monkeypatch.setattr(colour, "random_blur", record)
    n = 4000
    augment(make_recipe("moco_v2"), uniform_images(n))
    ((draws, probability),) = calls
    assert probability == 0.5
    assert is_close((draws[:, 0] < probability).mean(), 0.5, n)
    assert draws[:, 1].min() < 0.01
    assert draws[:, 1].max() > 0.99
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.06
    augment(make_recipe("simclr"), uniform_images(4))
    assert len(calls) == 1, "SCAN's SimCLR has no blur"


def cutout_sizes(views: Tensor) -> tuple[Tensor, Tensor]:
    """(height, width) [B] of the box of zeros in each view; 0: none."""
    is_zero = (views == 0).all(1)
    height = is_zero.any(2).sum(1)
    width = is_zero.any(1).sum(1)
    assert torch.equal(is_zero.sum((1, 2)), height * width), "the zeros are one box"
    return height, width


def touches_edge(views: Tensor) -> Tensor:
    """True [B] for views with zeros in an outermost row or column."""
    is_zero = (views == 0).all(1)
    edges = [is_zero[:, 0], is_zero[:, -1], is_zero[:, :, 0], is_zero[:, :, -1]]
    return torch.cat(edges, 1).any(1)


@pytest.mark.parametrize("size, longest, n", [(32, 16, 1500), (96, 32, 1500), (224, 75, 150)])
def test_cutout_of_randaugment_has_an_even_side_and_a_bound(
    size: int, longest: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "randaugment", lambda x, draws: x)
    views = augment(make_recipe("randaugment", size), uniform_images(n, size))
    height, width = cutout_sizes(views)
    largest = 2 * (longest // 2)
    assert max(height.max(), width.max()) <= largest
    is_inside = ~touches_edge(views) & (height > 0)
    assert torch.equal(height[is_inside], width[is_inside])
    assert (height[is_inside] % 2 == 0).all()
    if n > 1000:
        assert set(height[is_inside].tolist()) == set(range(2, largest + 1, 2))
        # L = 1 gives a side of 0.
        assert is_close((height == 0).float().mean().item(), 1 / longest, n)


def test_cutout_of_randaugment_can_be_set_and_turned_off() -> None:
    images = photographs(32, 300)
    height, _ = cutout_sizes(augment(make_recipe("randaugment", cutout=6), images))
    assert height.max() <= 6
    default = augment(make_recipe("randaugment"), images)
    assert (augment(make_recipe("randaugment", cutout=0), images) != default).any()


@pytest.mark.parametrize("name, probability", [("digits", 0.5), ("digits_strong", 1.0)])
def test_cutout_of_digits_has_its_probability(
    name: str, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp, "digits_affine", lambda x, draws: x)
    n = 2000
    height, width = cutout_sizes(augment(make_recipe(name), uniform_images(n, 32)))
    has_cutout = (height > 0) & (width > 0)
    assert is_close(has_cutout.float().mean().item(), probability, n)
    assert max(height.max(), width.max()) == 16
    assert height[height > 0].min() >= 1


def test_randaugment_draws_operations_uniformly_with_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = np.zeros(14)
    rows_of_calls: list[list[int]] = []

    def spy_on(number: int, low: float, high: float) -> randaugment.Operation:
        def spy(x: Tensor, value: np.ndarray) -> Tensor:
            assert (value >= low).all()
            assert (value < high).all()
            counts[number] += len(x)
            rows_of_calls.append(x[:, 0, 0, 0].long().tolist())
            return x

        return spy

    spies = tuple(
        (spy_on(number, low, high), low, high)
        for number, (_, low, high) in enumerate(randaugment.OPERATIONS)
    )
    monkeypatch.setattr(randaugment, "OPERATIONS", spies)
    n, epochs = 250, 20
    number_of_image = np.arange(n, dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(number_of_image, (n, 8, 8, 3)).copy()
    for epoch in range(epochs):
        augment(make_recipe("randaugment", 8), images, epoch=epoch)
    total = 4 * n * epochs
    assert counts.sum() == total
    assert all(is_close(count / total, 1 / 14, total) for count in counts)
    assert sum(len(set(rows)) for rows in rows_of_calls) == total


def test_mmdc_mnist_rotates_by_up_to_25_degrees() -> None:
    # A hand that points up: the centre of mass of its view gives the angle.
    images = np.zeros((400, 33, 33, 3), np.uint8)
    images[:, :17, 16] = 255
    views = augment(make_recipe("mmdc_mnist", 33), images)[:, 0]
    ys, xs = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    x, y = (views * xs).sum((1, 2)), (views * ys).sum((1, 2))
    angle = torch.rad2deg(torch.atan2(x, -y))
    assert 23 < angle.max() < 26
    assert -26 < angle.min() < -23
    assert abs(float(angle.mean())) < 2.5
    unrotated = augment(make_recipe("mmdc_mnist", 33, degrees=0.0), images)[:, 0]
    assert torch.equal(unrotated, torch.from_numpy(images[..., 0]).float() / 255)


# --- crops -----------------------------------------------------------------------------------


def boxes_of(recipe: Recipe, side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(boxes, flips) for square images of this side."""
    sides = np.full(count, side)
    return crop_boxes(recipe.crop, sides, sides, 0, 0, np.arange(count), 0)


@pytest.mark.parametrize(
    "name, kind, scale, resize, flip",
    [
        ("simclr", "random_resized", (0.2, 1.0), None, 0.5),
        ("moco_v2", "random_resized", (0.2, 1.0), None, 0.5),
        ("standard", "random_resized", (0.08, 1.0), None, 0.5),
        ("deepcluster", "random_resized", (0.08, 1.0), None, 0.5),
        ("center", "center", None, 256, 0.0),
        ("randaugment", "random", None, 256, 0.5),
        ("digits", "center", None, 256, 0.0),
        ("digits_strong", "center", None, 256, 0.0),
    ],
)
def test_crops_at_224_pixels(
    name: str,
    kind: str,
    scale: tuple[float, float] | None,
    resize: int | None,
    flip: float,
) -> None:
    crop = make_recipe(name, 224).crop
    assert (crop.kind, crop.resize, crop.flip) == (kind, resize, flip)
    if scale is not None:
        assert crop.scale == scale


def test_crops_of_small_images_are_not_resized() -> None:
    assert make_recipe("center", 32).crop.resize is None
    assert make_recipe("randaugment", 96).crop.resize is None


def test_scale_can_be_set() -> None:
    assert make_recipe("simclr", scale=(0.5, 0.9), flip=0.0).crop.scale == (0.5, 0.9)


@pytest.mark.parametrize("name", ["mmdc", "mmdc_center"])
@pytest.mark.parametrize(
    "size, stored, share, side",
    [(32, 32, 20 / 32, 20), (64, 96, 64 / 96, 64), (64, 64, 40 / 64, 40)],
)
def test_mmdc_crops_have_the_published_sides(
    name: str, size: int, stored: int, share: float, side: int
) -> None:
    boxes, _ = boxes_of(make_recipe(name, size, share=share), stored, 5)
    assert (boxes[:, 2:] == side).all()


def test_mmdc_mnist_crops_one_of_three_sides() -> None:
    n = 3000
    boxes, flips = boxes_of(make_recipe("mmdc_mnist"), 28, n)
    top, _, height, width = boxes.T
    sides, counts = np.unique(height, return_counts=True)
    assert sides.tolist() == [16, 20, 24]
    assert all(is_close(count / n, 1 / 3, n) for count in counts)
    assert not flips.any()
    assert (height == width).all()
    assert top.min() == 0
    assert (top + height).max() == 28
    centre, _ = boxes_of(make_recipe("mmdc_mnist_center"), 28, 3)
    assert centre.tolist() == [[2, 2, 24, 24]] * 3
    one_side, _ = boxes_of(make_recipe("mmdc_mnist", share=0.5), 28, 9)
    assert set(one_side[:, 2]) == {14}


# --- settings --------------------------------------------------------------------------------


def test_a_name_is_a_recipe() -> None:
    assert TypeAdapter(RecipeConfig).validate_python("simclr") == RecipeConfig(name="simclr")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": "simclrr"}, ["did you mean 'simclr'", "moco_v2"]),
        ({"name": "simclr", "colour": "fast"}, ["exact", "fused"]),
        ({"name": "simclr", "scale": (0.9, 0.2)}, ["0 < low <= high"]),
        ({"name": "simclr", "cutout": 8}, ["simclr", "cutout"]),
        ({"name": "center", "scale": (0.2, 1.0)}, ["center", "scale"]),
        ({"name": "standard", "colour": "fused"}, ["standard", "colour"]),
        ({"name": "digits", "strength": 1.0}, ["digits", "strength"]),
        ({"name": "simclr", "blur": True}, ["blur"]),
    ],
)
def test_invalid_settings_are_refused_with_a_remedy(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValidationError) as error:
        RecipeConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_strength_is_that_of_simclr() -> None:
    images = photographs(32, 10)
    half = augment(make_recipe("simclr", strength=0.5), images)
    assert torch.equal(half, augment(make_recipe("simclr"), images))
    full = make_recipe("simclr", strength=1.0, blur_p=0.5, scale=(0.08, 1.0))
    assert torch.equal(augment(full, images), augment(make_recipe("dcv2"), images))


@pytest.mark.parametrize(
    "name, size, stored, resolution, words",
    [
        (
            "center",
            32,
            "raw",
            256,
            ["cuts 32 x 32 px", "of 256 px: 2% of a square image", "data.resolution: 37"],
        ),
        ("randaugment", 96, "jpeg", 128, ["cuts 96 x 96 px", "56%", "data.resolution: 110"]),
        (
            "crop",
            64,
            "original",
            256,
            ["cuts 64 x 64 px", "whatever their size", "data.stored: jpeg and data.resolution: 73"],
        ),
        ("center", 224, "raw", 128, ["enlarges", "128 px to 224", "data.resolution: 256"]),
        ("simclr", 64, "raw", 32, ["enlarges", "32 px to 64"]),
    ],
)
def test_a_resolution_that_does_not_fit_gives_a_warning_with_a_remedy(
    name: str, size: int, stored: str, resolution: int, words: list[str]
) -> None:
    text = resolution_warning(RecipeConfig(name=name), size, stored, resolution)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "settings, size, stored, resolution",
    [
        ({"name": "center"}, 32, "raw", 32),
        ({"name": "center"}, 32, "raw", 37),
        ({"name": "center"}, 224, "jpeg", 512),
        ({"name": "center"}, 224, "original", 256),
        ({"name": "simclr"}, 32, "raw", 256),
        ({"name": "whole"}, 32, "raw", 256),
        ({"name": "mmdc"}, 64, "jpeg", 96),
        ({"name": "dcv2", "size": 96}, 224, "jpeg", 256),
    ],
)
def test_a_resolution_that_fits_gives_no_warning(
    settings: dict[str, Any], size: int, stored: str, resolution: int
) -> None:
    assert resolution_warning(RecipeConfig(**settings), size, stored, resolution) == ""


@pytest.mark.parametrize("size", [16, 96, 224])
@pytest.mark.parametrize("name", ["center", "randaugment", "simclr"])
def test_the_recommended_resolution_gives_no_warning(name: str, size: int) -> None:
    fitting = round(size * 256 / 224)
    assert resolution_warning(RecipeConfig(name=name), size, "raw", fitting) == ""
