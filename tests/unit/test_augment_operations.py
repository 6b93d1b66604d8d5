"""Each operation equals its definition in Pillow or torchvision.

On photographs of scikit-learn and, if they are on this machine, CIFAR and ImageNet images.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tv

from dist_scan.data.augment import colour, randaugment, warp
from dist_scan.data.augment.colour import Strength
from tests.support.photographs import photographs
from tests.support.shared_data import shared_data

AFFINE = Image.Transform.AFFINE
PIL_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, v: image,
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "rotate": lambda image, v: image.rotate(v),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "colour": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "shear_x": lambda image, v: image.transform(image.size, AFFINE, (1, v, 0, 0, 1, 0)),
    "shear_y": lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, v, 1, 0)),
    "translate_x": lambda image, v: image.transform(
        image.size, AFFINE, (1, 0, v * image.size[0], 0, 1, 0)
    ),
    "translate_y": lambda image, v: image.transform(
        image.size, AFFINE, (1, 0, 0, 0, 1, v * image.size[1])
    ),
}
OPERATIONS = [(apply.__name__, low, high) for apply, low, high in randaugment.OPERATIONS]
for_each_operation = pytest.mark.parametrize("name, low, high", OPERATIONS)


def to_tensor(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float in 0..255."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous().float()


def map_pil(
    operation: Callable[[Image.Image, float], Any], images: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """A function of Pillow images, applied to each image with its value."""
    results = [operation(Image.fromarray(image), v) for image, v in zip(images, values)]
    return np.stack([np.asarray(result) for result in results])


def check_operation(name: str, low: float, high: float, images: np.ndarray) -> None:
    """An operation on a batch, with a value for each image, equals Pillow's to the bit."""
    values = np.random.default_rng(1).uniform(low, high, len(images))
    ours = getattr(randaugment, name)(to_tensor(images), values).permute(0, 2, 3, 1).numpy()
    theirs = map_pil(PIL_OPERATIONS[name], images, values)
    assert ours.min() >= 0
    assert ours.max() <= 255
    differing = (ours != theirs).mean()
    largest = np.abs(ours - theirs).max()
    assert differing == 0, f"{differing:.2e} of the values differ, by up to {largest}"
    if name != "identity":
        assert (theirs != images).any(), "the operation changed nothing, so nothing is tested"


# --- RandAugment -----------------------------------------------------------------------------


def test_there_are_fourteen_operations_with_the_intervals_of_the_paper() -> None:
    table_s2 = [
        ("identity", 0, 1),
        ("autocontrast", 0, 1),
        ("equalize", 0, 1),
        ("rotate", -30, 30),
        ("solarize", 0, 256),
        ("colour", 0.05, 0.95),
        ("contrast", 0.05, 0.95),
        ("brightness", 0.05, 0.95),
        ("sharpness", 0.05, 0.95),
        ("shear_x", -0.1, 0.1),
        ("shear_y", -0.1, 0.1),
        ("translate_x", -0.1, 0.1),
        ("translate_y", -0.1, 0.1),
        ("posterize", 4, 8),
    ]
    assert sorted(OPERATIONS) == sorted(table_s2)


@pytest.mark.parametrize("size, count", [(32, 60), (97, 20)])
@for_each_operation
def test_operation_equals_pil_on_photographs(
    name: str, low: float, high: float, size: int, count: int
) -> None:
    images = photographs(size, count)
    low_contrast = images // 4 + 40  # for autocontrast to stretch
    check_operation(name, low, high, np.concatenate([images, low_contrast]))


@for_each_operation
def test_operation_equals_pil_on_cifar(name: str, low: float, high: float) -> None:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(shared_data("cifar10-test.parquet")).read_row_group(0).slice(0, 100)
    files = [
        next(value for value in row.values() if isinstance(value, dict))["bytes"]
        for row in table.to_pylist()
    ]
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    check_operation(name, low, high, np.stack(images))


@for_each_operation
def test_operation_equals_pil_on_imagenet(name: str, low: float, high: float) -> None:
    files = sorted(shared_data("imagenet-samples").rglob("*"))
    jpegs = [file for file in files if file.suffix.lower() in (".jpeg", ".jpg")][:4]
    assert jpegs, "imagenet-samples has no JPEG"
    images = [Image.open(file).convert("RGB").resize((224, 224)) for file in jpegs]
    check_operation(name, low, high, np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_operation_equals_pil_on_flat_images_and_every_range_of_grey(name: str) -> None:
    ramps = [
        np.linspace(low, high, 256).round()
        for low in range(0, 256, 15)
        for high in range(low, 256, 6)
    ]
    images = np.stack(ramps).astype(np.uint8).reshape(-1, 16, 16, 1).repeat(3, 3)
    check_operation(name, 0, 1, images)


def test_posterize_keeps_4_to_7_bits() -> None:
    every_value = to_tensor(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3))
    values = 4 + 4 * (np.arange(400) + 0.5) / 400
    out = randaugment.posterize(every_value.expand(400, 3, 16, 16), values)
    assert {len(image.unique()) for image in out} == {16, 32, 64, 128}


# --- colour jitter ---------------------------------------------------------------------------

TORCHVISION = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}
for_each_adjustment = pytest.mark.parametrize(
    "name, low, high",
    [
        ("brightness", 0.2, 1.8),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.2, 1.8),
        ("hue", -0.5, 0.5),
    ],
)


@for_each_adjustment
def test_adjustment_equals_torchvision(name: str, low: float, high: float) -> None:
    x = to_tensor(photographs(32, 40)) / 255
    values = np.random.default_rng(2).uniform(low, high, len(x))
    ours = getattr(colour, name)(x, colour.per_image(values, x))
    theirs = torch.stack([TORCHVISION[name](image, float(v)) for image, v in zip(x, values)])
    # torchvision's weights of grey sum to 0.9999, Pillow's and ours to 1.
    tolerance = 2e-4 if name in ("contrast", "saturation") else 5e-6
    assert (ours - theirs).abs().max() < tolerance
    assert (ours - x).abs().mean() > 0.01


@for_each_adjustment
def test_adjustment_is_within_rounding_of_pil(name: str, low: float, high: float) -> None:
    images = photographs(32, 40)
    values = np.random.default_rng(3).uniform(low, high, len(images))
    x = to_tensor(images) / 255
    ours = getattr(colour, name)(x, colour.per_image(values, x)) * 255
    theirs = map_pil(lambda image, v: TORCHVISION[name](image, float(v)), images, values)
    error = (ours - to_tensor(theirs)).abs()
    if name == "hue":  # Pillow has 256 steps of hue and of saturation: coarser than rounding
        assert error.mean() < 2.0
    else:
        assert error.mean() < 0.8
        assert error.max() < 2


def jitter_by_torchvision(image: Tensor, draws: np.ndarray, strength: Strength) -> Tensor:
    """ColorJitter of one image with these draws [8]."""
    spread = 2 * draws[:4] - 1
    for number in draws[4:].argsort():
        name = list(TORCHVISION)[number]
        amount = strength[number] * spread[number]
        image = TORCHVISION[name](image, float(amount if name == "hue" else 1 + amount))
    return image


def test_jitter_applies_the_adjustments_in_a_random_order_for_each_image() -> None:
    x = to_tensor(photographs(32, 150)) / 255
    draws = np.random.default_rng(4).random((150, 8))
    strength = (0.8, 0.8, 0.8, 0.2)
    theirs = torch.stack([jitter_by_torchvision(i, d, strength) for i, d in zip(x, draws)])
    error = (colour.jitter(x, draws, strength) - theirs).abs()
    assert error.max() < 3e-3
    assert error.mean() < 2e-4
    assert len({tuple(d[4:].argsort()) for d in draws}) == 24
    other_order = draws.copy()
    other_order[:, 4:] = draws[:, 4:][:, ::-1]
    difference = (colour.jitter(x, other_order, strength) - theirs).abs().mean()
    assert difference > 5e-3, "the order has no effect, so it is not tested"


@pytest.mark.parametrize("hue, tolerance", [(0.0, 0.003), (0.1, 0.033)])
def test_fused_jitter_is_close_to_the_exact_one(hue: float, tolerance: float) -> None:
    x = to_tensor(photographs(32, 150)) / 255
    draws = np.random.default_rng(5).random((150, 8))
    strength = (0.4, 0.4, 0.4, hue)
    fused = colour.jitter_fused(x, draws, strength)
    assert (fused - colour.jitter(x, draws, strength)).abs().mean() < tolerance


def test_fused_jitter_of_strength_zero_is_the_identity() -> None:
    x = to_tensor(photographs(32, 150)) / 255
    no_change = np.full((150, 8), 0.5)
    assert (colour.jitter_fused(x, no_change, (0.4, 0.4, 0.4, 0.1)) - x).abs().max() < 1e-5


@pytest.mark.parametrize("jitter", [colour.jitter, colour.jitter_fused])
def test_positive_hue_turns_red_to_yellow(jitter: Callable[..., Tensor]) -> None:
    """A rotation in YIQ differs from one in HSV, but must have the same direction."""
    red = torch.tensor([0.6, 0.1, 0.1]).view(1, 3, 1, 1)
    draws = np.full((1, 8), 0.5)
    draws[0, 3] = 0.999
    r, g, b = jitter(red, draws, (0.0, 0.0, 0.0, 1 / 12)).flatten()
    assert r > g > 0.2
    assert b < 0.11


def test_greyscale_equals_pil_within_rounding() -> None:
    images = photographs(32, 10)
    ours = colour.random_greyscale(to_tensor(images) / 255, np.zeros(10), 0.5) * 255
    theirs = map_pil(lambda image, _: image.convert("L"), images, np.zeros(10))
    assert np.abs(ours.numpy() - theirs[:, None]).max() < 0.51


def test_blur_is_close_to_pil_for_every_sigma() -> None:
    images = photographs(96, 12)
    x = to_tensor(images)
    sigmas = np.linspace(0.1, 2, 12)
    draws = np.stack([np.zeros(12), (sigmas - 0.1) / 1.9], 1)
    ours = colour.random_blur(x / 255, draws, 0.5) * 255
    theirs = to_tensor(
        map_pil(lambda i, s: i.filter(ImageFilter.GaussianBlur(float(s))), images, sigmas)
    )
    error = (ours - theirs).abs().mean((1, 2, 3))
    assert error.max() < 1.2, "Pillow's three box filters with 8 bits are about 0.5 away"
    effect = (x - theirs).abs().mean((1, 2, 3))
    is_visible = effect > 1.5  # images that are out of focus hardly change
    assert is_visible.sum() >= 3
    assert (error[is_visible] < effect[is_visible] / 4).all()


def test_operations_return_the_batch_if_no_image_is_selected() -> None:
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(colour.random_blur(x, np.full((2, 2), 0.9), 0.5), x)
    assert torch.equal(colour.random_greyscale(x, np.full(2, 0.9), 0.2), x)


def test_image_mean_is_the_mean_and_does_not_depend_on_the_batch() -> None:
    x = torch.rand(5, 1, 37, 41)
    mean = colour.image_mean(x)
    assert (mean.flatten() - x.double().mean((1, 2, 3))).abs().max() < 1e-6
    for i in range(5):
        assert torch.equal(colour.image_mean(x[i : i + 1]), mean[i : i + 1])


# --- warps and cutout ------------------------------------------------------------------------


def digits_matrix(draws: np.ndarray, side: int) -> np.ndarray:
    """The map [2, 3] of digits_affine as a product of matrices, from the top left corner."""
    spread = 2 * draws - 1
    angle = np.deg2rad(15 * spread[1])
    stretch = np.exp(0.15 * spread[3] / 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, 0.3 * spread[2]], [0, 1]])
    m = rotation @ shear @ np.diag([stretch, 1 / stretch]) / (1 + 0.2 * spread[0])
    centre = np.array([side / 2, side / 2])
    start = centre + 0.15 * side * spread[4:] - m @ centre
    return np.concatenate([m, start[:, None]], 1)


def test_digits_affine_equals_pil_inside_the_image() -> None:
    side = 48
    images = photographs(side, 6)
    draws = np.random.default_rng(6).random((6, 6))
    ours = warp.digits_affine(to_tensor(images), draws).permute(0, 2, 3, 1).numpy()
    ys, xs = np.mgrid[0:side, 0:side] + 0.5
    for image, result, d in zip(images, ours, draws):
        m = digits_matrix(d, side)
        pil = Image.fromarray(image)
        bilinear = Image.Resampling.BILINEAR
        theirs = np.asarray(pil.transform((side, side), AFFINE, tuple(m.flatten()), bilinear))
        source = m @ np.stack([xs.ravel(), ys.ravel(), np.ones(side * side)])
        source = source.reshape(2, side, side)
        # At the edges Pillow repeats a pixel and grid_sample fades to black.
        inside = ((source > 1) & (source < side - 1)).all(0)
        outside = ((source < -1) | (source > side + 1)).any(0)
        assert inside.mean() > 0.3
        assert np.abs(result - theirs)[inside].max() < 1.01
        assert (result[outside] == 0).all()


def test_digits_affine_without_change_is_the_identity() -> None:
    x = to_tensor(photographs(33, 3))
    assert (warp.digits_affine(x, np.full((3, 6), 0.5)) - x).abs().max() < 2e-3


def test_rotation_is_counter_clockwise() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    rotated = warp.warp_bilinear(x, warp.rotation(np.array([90.0])))
    torch.testing.assert_close(rotated, torch.rot90(x, 1, (2, 3)), atol=1e-4, rtol=0)


def test_cutout_is_one_square_clipped_at_the_edges() -> None:
    x = torch.ones(4, 3, 16, 16)
    side, row, column = np.array([0, 4, 6, 4]), np.array([8, 8, 0, 15]), np.array([8, 5, 0, 15])
    expected = torch.ones(4, 16, 16)
    expected[1, 6:10, 3:7] = 0
    expected[2, 0:3, 0:3] = 0
    expected[3, 13:16, 13:16] = 0
    out = colour.cutout(x, side, row, column)
    assert torch.equal(out, expected[:, None].expand(4, 3, 16, 16))
