"""Each operation against its PIL or torchvision definition, on photographs (sklearn's) and, where they are, CIFAR and ImageNet images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms import functional as tv

from dist_scan.data.augment import colour, randaugment, warp
from tests.support.shared_data import shared_data

AFFINE = Image.Transform.AFFINE
PIL_OPERATIONS = {
    "identity": lambda p, v: p,
    "autocontrast": lambda p, v: ImageOps.autocontrast(p),
    "equalize": lambda p, v: ImageOps.equalize(p),
    "rotate": lambda p, v: p.rotate(v),
    "solarize": lambda p, v: ImageOps.solarize(p, v),
    "colour": lambda p, v: ImageEnhance.Color(p).enhance(v),
    "contrast": lambda p, v: ImageEnhance.Contrast(p).enhance(v),
    "brightness": lambda p, v: ImageEnhance.Brightness(p).enhance(v),
    "sharpness": lambda p, v: ImageEnhance.Sharpness(p).enhance(v),
    "posterize": lambda p, v: ImageOps.posterize(p, int(v)),
    "shear_x": lambda p, v: p.transform(p.size, AFFINE, (1, v, 0, 0, 1, 0)),
    "shear_y": lambda p, v: p.transform(p.size, AFFINE, (1, 0, 0, v, 1, 0)),
    "translate_x": lambda p, v: p.transform(p.size, AFFINE, (1, 0, v * p.size[0], 0, 1, 0)),
    "translate_y": lambda p, v: p.transform(p.size, AFFINE, (1, 0, 0, 0, 1, v * p.size[1])),
}


def photographs(size: int, count: int) -> np.ndarray:
    """[count, size, size, 3] uint8."""
    rng, out = np.random.default_rng(0), []
    for k in range(count):
        photo = load_sample_image(("china.jpg", "flower.jpg")[k % 2])
        top, left = rng.integers(0, photo.shape[0] - size), rng.integers(0, photo.shape[1] - size)
        out.append(photo[top : top + size, left : left + size])
    return np.stack(out)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous().float()


def check_operation(name: str, low: float, high: float, images: np.ndarray) -> None:
    """To the bit, every image with a value of its own in one batch."""
    apply = getattr(randaugment, name)
    value = np.random.default_rng(1).uniform(low, high, len(images))
    ours = apply(to_tensor(images), value).permute(0, 2, 3, 1).numpy()
    theirs = np.stack(
        [np.asarray(PIL_OPERATIONS[name](Image.fromarray(i), v)) for i, v in zip(images, value)]
    )
    assert ours.min() >= 0 and ours.max() <= 255
    differing = (ours != theirs).mean()
    assert differing == 0, (
        f"{name}: {differing:.2e} of the values differ from PIL's, by up to {np.abs(ours - theirs).max()}"
    )
    if name != "identity":
        assert (theirs != images).any(), "the operation did nothing: the test shows nothing"


OPERATIONS = [(apply.__name__, low, high) for apply, low, high in randaugment.OPERATIONS]


def test_fourteen_operations_with_the_papers_intervals() -> None:
    assert sorted(OPERATIONS) == sorted(
        [  # SCAN, Table S2 (FIDELITY.md 1.3)
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
    )


@pytest.mark.parametrize("size", [32, 97])
@pytest.mark.parametrize("name, low, high", OPERATIONS)
def test_randaugment_equals_pil_to_the_bit(name, low, high, size) -> None:
    images = photographs(size, 60 if size == 32 else 20)
    images = np.concatenate(
        [images, images // 4 + 40]
    )  # a narrow range of colours too: something for autocontrast to stretch
    check_operation(name, low, high, images)


@pytest.mark.parametrize("name, low, high", OPERATIONS)
def test_randaugment_equals_pil_on_cifar(name, low, high) -> None:
    import pyarrow.parquet as pq

    rows = (
        pq.ParquetFile(shared_data("cifar10-test.parquet"))
        .read_row_group(0)
        .slice(0, 100)
        .to_pylist()
    )
    pictures = [next(v for v in row.values() if isinstance(v, dict))["bytes"] for row in rows]
    check_operation(
        name,
        low,
        high,
        np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in pictures]),
    )


@pytest.mark.parametrize("name, low, high", OPERATIONS)
def test_randaugment_equals_pil_on_imagenet(name, low, high) -> None:
    files = sorted(
        p
        for p in shared_data("imagenet-samples").rglob("*")
        if p.suffix.lower() in (".jpeg", ".jpg")
    )[:4]
    assert files, "imagenet-samples holds no JPEG"
    check_operation(
        name,
        low,
        high,
        np.stack([np.asarray(Image.open(f).convert("RGB").resize((224, 224))) for f in files]),
    )


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_flat_images_and_every_range_of_grey(name) -> None:
    ramps = [
        np.linspace(low, high, 256).round()
        for low in range(0, 256, 15)
        for high in range(low, 256, 6)
    ]
    images = np.stack(ramps).astype(np.uint8).reshape(-1, 16, 16, 1).repeat(3, 3)
    check_operation(name, 0, 1, images)


def test_posterize_keeps_4_to_7_bits() -> None:
    full = to_tensor(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)).expand(
        400, 3, 16, 16
    )
    out = randaugment.posterize(full, 4 + 4 * (np.arange(400) + 0.5) / 400)
    assert {len(image.unique()) for image in out} == {16, 32, 64, 128}


# --- colour jitter ----------------------------------------------------------------------------------------------------

TORCHVISION = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("brightness", 0.2, 1.8),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.2, 1.8),
        ("hue", -0.5, 0.5),
    ],
)
def test_colour_equals_torchvision(name, low, high) -> None:
    x = to_tensor(photographs(32, 40)) / 255
    value = np.random.default_rng(2).uniform(low, high, len(x))
    ours = getattr(colour, name)(x, colour.per_image(value, x))
    theirs = torch.stack([TORCHVISION[name](image, float(v)) for image, v in zip(x, value)])
    # torchvision's grey uses .2989 and .587 and .114 (sum .9999), PIL's .299: up to 1.8e-4 apart
    assert (ours - theirs).abs().max() < (2e-4 if name in ("contrast", "saturation") else 5e-6)
    assert (ours - x).abs().mean() > 0.01


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("brightness", 0.2, 1.8),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.2, 1.8),
        ("hue", -0.5, 0.5),
    ],
)
def test_colour_is_within_rounding_of_pil(name, low, high) -> None:
    images = photographs(32, 40)
    value = np.random.default_rng(3).uniform(low, high, len(images))
    x = to_tensor(images) / 255
    ours = getattr(colour, name)(x, colour.per_image(value, x)) * 255
    theirs = to_tensor(
        np.stack(
            [
                np.asarray(TORCHVISION[name](Image.fromarray(i), float(v)))
                for i, v in zip(images, value)
            ]
        )
    )
    error = (ours - theirs).abs()
    # PIL's hue has 256 steps of hue and of saturation: coarser by far than rounding
    assert error.mean() < (2.0 if name == "hue" else 0.8) and (name == "hue" or error.max() < 2)


def jitter_by_torchvision(
    image: torch.Tensor, draws: np.ndarray, strength: tuple[float, ...]
) -> torch.Tensor:
    """What ColorJitter does with these numbers."""
    spread = 2 * draws[:4] - 1
    for number in draws[4:].argsort():
        name = list(TORCHVISION)[number]
        amount = strength[number] * spread[number]
        image = TORCHVISION[name](image, float(amount if name == "hue" else 1 + amount))
    return image


def test_jitter_takes_the_four_in_an_order_of_each_images_own() -> None:
    x, draws, strength = (
        to_tensor(photographs(32, 150)) / 255,
        np.random.default_rng(4).random((150, 8)),
        (0.8, 0.8, 0.8, 0.2),
    )
    ours = colour.jitter(x, draws, strength)
    theirs = torch.stack([jitter_by_torchvision(i, d, strength) for i, d in zip(x, draws)])
    assert len({tuple(d[4:].argsort()) for d in draws}) == 24
    assert (ours - theirs).abs().max() < 3e-3 and (ours - theirs).abs().mean() < 2e-4
    fixed = draws.copy()
    fixed[:, 4:] = draws[:, 4:][:, ::-1]
    assert (colour.jitter(x, fixed, strength) - theirs).abs().mean() > 5e-3, (
        "the order makes no difference: the test shows nothing"
    )


def test_fused_jitter_is_near_the_exact_one() -> None:
    x, draws = to_tensor(photographs(32, 150)) / 255, np.random.default_rng(5).random((150, 8))
    for strength, tolerance in (
        ((0.4, 0.4, 0.4, 0.0), 0.003),
        ((0.4, 0.4, 0.4, 0.1), 0.033),
    ):  # FFCV.md 4
        assert (
            colour.jitter_fused(x, draws, strength) - colour.jitter(x, draws, strength)
        ).abs().mean() < tolerance
    assert (
        colour.jitter_fused(x, np.full((150, 8), 0.5), (0.4, 0.4, 0.4, 0.1)) - x
    ).abs().max() < 1e-5


@pytest.mark.parametrize("jitter", [colour.jitter, colour.jitter_fused])
def test_hue_turns_red_to_yellow(jitter) -> None:
    """A rotation in YIQ is no rotation in HSV, but it must go the same way round."""
    red, draws = torch.tensor([0.6, 0.1, 0.1]).view(1, 3, 1, 1), np.full((1, 8), 0.5)
    draws[0, 3] = 0.999
    r, g, b = jitter(red, draws, (0.0, 0.0, 0.0, 1 / 12)).flatten()
    assert r > g > 0.2 and b < 0.11


def test_greyscale_equals_pils_within_rounding() -> None:
    images = photographs(32, 10)
    ours = colour.random_greyscale(to_tensor(images) / 255, np.zeros(10), 0.5) * 255
    theirs = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in images])
    assert np.abs(ours.numpy() - theirs[:, None]).max() < 0.51


def test_blur_is_near_pils_and_scales_with_sigma() -> None:
    images = photographs(96, 12)
    sigma = np.linspace(0.1, 2, 12)
    ours = (
        colour.random_blur(to_tensor(images) / 255, np.stack([np.zeros(12), (sigma - 0.1) / 1.9], 1), 0.5)
        * 255
    )
    theirs = to_tensor(
        np.stack(
            [
                np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(float(s))))
                for i, s in zip(images, sigma)
            ]
        )
    )
    error = (ours - theirs).abs().mean((1, 2, 3))
    assert error.max() < 1.2, "PIL's is three box filters and 8 bits: about 0.5 grey levels away"
    moved = (to_tensor(images) - theirs).abs().mean((1, 2, 3))
    sharp = moved > 1.5  # what is out of focus already hardly moves
    assert sharp.sum() >= 3 and (error[sharp] < moved[sharp] / 4).all()


# --- warps and holes ---------------------------------------------------------------------------------------------------


def test_bilinear_warp_equals_pils() -> None:
    images = photographs(48, 6)
    draws = np.random.default_rng(6).random((6, 6))
    ours = warp.digits_affine(to_tensor(images), draws).permute(0, 2, 3, 1).numpy()
    for image, result, draw in zip(images, ours, 2 * draws - 1):
        turn, t = np.deg2rad(15 * draw[1]), np.exp(0.15 * draw[3] / 2)
        m = (
            np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            @ [[1, 0.3 * draw[2]], [0, 1]]
            @ np.diag([t, 1 / t])
            / (1 + 0.2 * draw[0])
        )
        start = np.array([24, 24]) + 0.15 * 48 * draw[4:] - m @ [24, 24]
        matrix = (*m[0], start[0], *m[1], start[1])
        theirs = np.asarray(
            Image.fromarray(image).transform((48, 48), AFFINE, matrix, Image.Resampling.BILINEAR)
        )
        ys, xs = np.mgrid[0:48, 0:48] + 0.5
        read = np.stack(
            [m[0, 0] * xs + m[0, 1] * ys + start[0], m[1, 0] * xs + m[1, 1] * ys + start[1]]
        )
        inside = ((read > 1) & (read < 47)).all(
            0
        )  # at the edges PIL repeats a pixel and grid_sample fades to black
        outside = ((read < -1) | (read > 49)).any(0)
        assert (
            inside.mean() > 0.3
            and np.abs(result - theirs)[inside].max() < 1.01
            and (result[outside] == 0).all()
        )


def test_a_still_warp_is_the_image() -> None:
    x = to_tensor(photographs(33, 3))
    assert (warp.digits_affine(x, np.full((3, 6), 0.5)) - x).abs().max() < 2e-3


def test_cutout_is_one_box_clipped_at_the_edges() -> None:
    x = torch.ones(4, 3, 16, 16)
    out = colour.cutout(x, np.array([0, 4, 6, 4]), np.array([8, 8, 0, 15]), np.array([8, 5, 0, 15]))
    expected = torch.ones(4, 16, 16)
    expected[1, 6:10, 3:7] = 0
    expected[2, 0:3, 0:3] = 0
    expected[3, 13:16, 13:16] = 0
    assert torch.equal(out, expected[:, None].expand(4, 3, 16, 16))


def test_image_mean_is_the_mean_and_ignores_the_batch() -> None:
    x = torch.rand(5, 1, 37, 41)
    mean = colour.image_mean(x)
    assert (mean.flatten() - x.double().mean((1, 2, 3))).abs().max() < 1e-6
    assert all(torch.equal(colour.image_mean(x[i : i + 1]), mean[i : i + 1]) for i in range(5))
