"""Recipes: what is drawn, what it depends on, and what a config may say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from dist_scan.data.augment import colour, randaugment
from dist_scan.data.augment import recipes as augment
from dist_scan.data.augment.recipes import RECIPES, RecipeConfig, build_recipe
from tests.unit.test_augment_operations import photographs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VARIANTS = [
    (name, c)
    for name, look in RECIPES.items()
    for c in (("exact", "fused") if look.jitter else ("exact",))
]


def made(name, size=32, **settings):
    return build_recipe(RecipeConfig(name=name, **settings), size, MEAN, STD)


def run(recipe, images, index, seed=1, epoch=2, view=0):
    return recipe(torch.from_numpy(images), index, seed=seed, epoch=epoch, view=view)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check_independence(recipe, images) -> None:
    index = np.arange(len(images)) * 5 + 2
    together = run(recipe, images, index)
    assert (
        together.dtype == torch.float32
        and together.shape == (len(images), 3, *images.shape[1:3])
        and together.isfinite().all()
    )
    alone = torch.cat(
        [run(recipe, images[i : i + 1], index[i : i + 1]) for i in range(len(images))]
    )
    assert torch.equal(together, alone)
    order = np.random.default_rng(0).permutation(len(images))
    assert torch.equal(run(recipe, images[order], index[order]), together[torch.from_numpy(order)])
    assert torch.equal(run(recipe, images[3:8], index[3:8]), together[3:8])


@pytest.mark.parametrize("name, colours", VARIANTS)
def test_an_image_does_not_see_its_batch(name, colours) -> None:
    check_independence(made(name, colour=colours), photographs(32, 40))


@pytest.mark.parametrize("name", ["moco_v1", "randaugment", "digits"])
def test_large_images_do_not_see_their_batch_nor_the_threads(name, threads) -> None:
    """Above 32,768 values torch adds up a batch of one in parallel, and in another order."""
    check_independence(made(name, 224), photographs(224, 9))


@pytest.mark.parametrize(
    "name", [n for n, look in RECIPES.items() if look.jitter or look.special != "none"]
)
def test_the_same_key_gives_the_same_and_another_key_another(name) -> None:
    recipe, images, index = made(name), photographs(32, 60), np.arange(60)
    first = run(recipe, images, index)
    assert torch.equal(first, run(recipe, images, index))
    others = [run(recipe, images, index, **key) for key in ({"view": 1}, {"epoch": 3}, {"seed": 2})]
    for other in (*others, run(recipe, images, index + 60)):
        assert (other - first).flatten(1).abs().amax(1).gt(0).float().mean() > 0.6


def test_input_is_left_alone() -> None:
    images = photographs(32, 20)
    before = images.copy()
    for name in RECIPES:
        run(made(name), images, np.arange(20))
    assert np.array_equal(images, before)


# --- draws ---------------------------------------------------------------------------------------------------------------


def flat(count, value=(200, 40, 90), size=8):
    return np.broadcast_to(np.array(value, np.uint8), (count, size, size, 3)).copy()


def share_close(seen, p, n):
    return abs(seen - p) < 4 * np.sqrt(p * (1 - p) / n) + 1e-9


def test_center_and_standard_only_normalise() -> None:
    images = photographs(32, 8)
    expected = (
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)
    ) / torch.tensor(STD).view(3, 1, 1)
    for name in ("center", "standard", "deepcluster"):
        assert torch.allclose(run(made(name), images, np.arange(8)), expected, atol=1e-6)


def test_mmdc_is_not_normalised() -> None:
    images = photographs(32, 8)
    assert torch.allclose(
        run(made("mmdc_center"), images, np.arange(8)),
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        atol=1e-7,
    )
    out = run(made("mmdc"), images, np.arange(8))
    assert out.min() >= 0 and out.max() <= 1


def test_probabilities_of_jitter_and_grey() -> None:
    n = 4000
    out = run(made("simclr"), flat(n), np.arange(n)) * torch.tensor(STD).view(
        3, 1, 1
    ) + torch.tensor(MEAN).view(3, 1, 1)
    original = torch.tensor([200, 40, 90]) / 255
    pixel = out[:, :, 0, 0]
    grey = (pixel.amax(1) - pixel.amin(1)) < 1e-4
    assert share_close(grey.float().mean().item(), 0.2, n)
    assert share_close(
        ((pixel - original).abs().amax(1) < 1e-4).float().mean().item(), 0.2 * 0.8, n
    )  # no jitter and no grey
    always = run(made("moco_v1"), flat(n), np.arange(n)) * torch.tensor(STD).view(
        3, 1, 1
    ) + torch.tensor(MEAN).view(3, 1, 1)
    assert ((always[:, :, 0, 0] - original).abs().amax(1) < 1e-4).float().mean() < 0.01


def test_probability_and_range_of_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        augment.colour, "random_blur", lambda x, draws, p, *a: (seen.append((draws, p)), x)[1]
    )
    n = 4000
    run(made("moco_v2"), flat(n), np.arange(n))
    ((draws, p),) = seen
    assert p == 0.5 and share_close((draws[:, 0] < p).mean(), 0.5, n)
    assert (
        draws[:, 1].min() < 0.01
        and draws[:, 1].max() > 0.99
        and abs(np.corrcoef(draws.T)[0, 1]) < 0.06
    )
    run(made("simclr"), flat(4), np.arange(4))
    assert len(seen) == 1, "SCAN's SimCLR has no blur"


def holes(out):
    """Side of the box of zeros of each image that is whole inside it (-1: cut by an edge or none)."""
    zero = (out == 0).all(1)
    rows, cols = zero.any(2).sum(1), zero.any(1).sum(1)
    assert torch.equal(zero.sum((1, 2)), rows * cols), "the hole is one box"
    return rows, cols


@pytest.mark.parametrize("size, longest", [(32, 16), (96, 32), (224, 75)])
def test_cutout_of_randaugment_is_even_and_bounded(
    size, longest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "randaugment", lambda x, draws: x)
    n = 1500 if size < 200 else 150
    out = run(made("randaugment", size), flat(n, size=size), np.arange(n))
    rows, cols = holes(out)
    assert max(rows.max(), cols.max()) <= 2 * (longest // 2)
    zero = (out == 0).all(1)
    inside = ~(
        zero[:, 0].any(1) | zero[:, -1].any(1) | zero[:, :, 0].any(1) | zero[:, :, -1].any(1)
    ) & (rows > 0)
    assert torch.equal(rows[inside], cols[inside]) and (rows[inside] % 2 == 0).all()
    if n > 1000:
        assert set(rows[inside].tolist()) == set(range(2, 2 * (longest // 2) + 1, 2))
        assert share_close((rows == 0).float().mean().item(), 1 / longest, n), (
            "L = 1 leaves no hole"
        )


def test_cutout_can_be_set_and_left_out() -> None:
    n = 300
    assert (
        holes(run(made("randaugment", 32, cutout=6), photographs(32, n), np.arange(n)))[0].max()
        <= 6
    )
    images = photographs(32, 50)
    off = run(made("randaugment", 32, cutout=0), images, np.arange(50))
    assert (off != run(made("randaugment", 32), images, np.arange(50))).any()


@pytest.mark.parametrize("name, p", [("digits", 0.5), ("digits_strong", 1.0)])
def test_cutout_of_digits(name, p, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment.warp, "digits_affine", lambda x, draws: x)
    n = 2000
    rows, cols = holes(run(made(name), flat(n, size=32), np.arange(n)))
    assert share_close(((rows > 0) & (cols > 0)).float().mean().item(), p, n)
    assert max(rows.max(), cols.max()) == 16 and rows[rows > 0].min() >= 1


def test_operations_are_drawn_evenly_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, rows_of = np.zeros(14), []
    spied = []
    for number, (apply, low, high) in enumerate(randaugment.OPERATIONS):

        def spy(x, value, number=number, low=low, high=high):
            assert (value >= low).all() and (value < high).all()
            counts[number] += len(x)
            rows_of.append(x[:, 0, 0, 0].long().tolist())
            return x

        spied.append((spy, low, high))
    monkeypatch.setattr(randaugment, "OPERATIONS", tuple(spied))
    n = 250
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 8, 8, 3)).copy()
    for epoch in range(20):
        run(made("randaugment", 8), images, np.arange(n), epoch=epoch)
    total = 4 * n * 20
    assert counts.sum() == total
    assert all(share_close(c / total, 1 / 14, total) for c in counts)
    assert sum(len(set(r)) for r in rows_of) == total


def test_crops_the_decoder_cuts() -> None:
    crop = {name: made(name, 224).crop for name in RECIPES}
    assert (crop["simclr"].kind, crop["simclr"].scale, crop["simclr"].flip) == (
        "random_resized",
        (0.2, 1.0),
        0.5,
    )
    assert (
        crop["standard"].scale == (0.08, 1.0)
        and crop["moco_v2"].scale == (0.2, 1.0)
        and crop["deepcluster"].scale == (0.08, 1.0)
    )
    assert (crop["center"].kind, crop["center"].resize, crop["center"].flip) == ("center", 256, 0)
    assert (crop["randaugment"].kind, crop["randaugment"].resize, crop["randaugment"].flip) == (
        "random",
        256,
        0.5,
    )
    assert made("center", 32).crop.resize is None and made("randaugment", 96).crop.resize is None
    assert crop["digits"].flip == 0 and crop["digits_strong"].flip == 0
    assert made("simclr", scale=(0.5, 0.9), flip=0.0).crop.scale == (0.5, 0.9)


@pytest.mark.parametrize(
    "size, stored, share, side",
    [(32, 32, 20 / 32, 20), (64, 96, 64 / 96, 64), (64, 64, 40 / 64, 40)],
)
def test_mmdc_crops_the_published_sides(size, stored, share, side) -> None:
    from dist_scan.data.augment.crops import crop_boxes

    for name in ("mmdc", "mmdc_center"):
        side_of = np.full(5, stored)
        boxes, _ = crop_boxes(
            made(name, size, share=share).crop, side_of, side_of, 0, 0, np.arange(5), 0
        )
        assert (boxes[:, 2:] == side).all()


# --- settings ---------------------------------------------------------------------------------------------------------------


def test_a_name_is_enough() -> None:
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
def test_mistakes_are_refused_with_the_way_out(settings, words) -> None:
    with pytest.raises(ValidationError) as error:
        RecipeConfig(**settings)
    assert all(word in str(error.value) for word in words)


def test_strength_is_simclrs() -> None:
    images = photographs(32, 10)
    assert torch.equal(
        run(made("simclr", strength=0.5), images, np.arange(10)),
        run(made("simclr"), images, np.arange(10)),
    )
    full = made("simclr", strength=1.0, blur_p=0.5, scale=(0.08, 1.0))
    assert torch.equal(run(full, images, np.arange(10)), run(made("dcv2"), images, np.arange(10)))


@pytest.mark.parametrize(
    "images, index",
    [
        (torch.zeros(2, 8, 8, 3), [0, 1]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1]),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0]),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, index) -> None:
    with pytest.raises(ValueError, match="uint8"):
        made("simclr")(images, np.array(index), seed=0, epoch=0, view=0)


def test_colour_of_nobody() -> None:
    """A batch in which no image is chosen comes back as it was."""
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(colour.random_blur(x, np.full((2, 2), 0.9), 0.5), x) and torch.equal(
        colour.random_greyscale(x, np.full(2, 0.9), 0.2), x
    )


def test_mmdc_of_mnist_cuts_one_of_three_sides_and_turns_by_up_to_25_degrees() -> None:
    from dist_scan.data.augment.crops import crop_boxes

    side_of = np.full(3000, 28)
    boxes, flips = crop_boxes(made("mmdc_mnist").crop, side_of, side_of, 0, 0, np.arange(3000), 0)
    sides, counts = np.unique(boxes[:, 2], return_counts=True)
    assert (
        sides.tolist() == [16, 20, 24]
        and all(share_close(c / 3000, 1 / 3, 3000) for c in counts)
        and not flips.any()
    )
    assert (
        (boxes[:, 2] == boxes[:, 3]).all()
        and (boxes[:, 0] + boxes[:, 2]).max() == 28
        and boxes[:, 0].min() == 0
    )
    centre, _ = crop_boxes(
        made("mmdc_mnist_center").crop, side_of[:3], side_of[:3], 0, 0, np.arange(3), 0
    )
    assert centre.tolist() == [[2, 2, 24, 24]] * 3
    only, _ = crop_boxes(
        made("mmdc_mnist", share=0.5).crop, side_of[:9], side_of[:9], 0, 0, np.arange(9), 0
    )
    assert set(only[:, 2]) == {14}
    bar = np.zeros((400, 33, 33, 3), np.uint8)
    bar[:, :17, 16] = 255  # a hand that points up; where its end goes tells the angle
    out = run(made("mmdc_mnist", 33), bar, np.arange(400))[:, 0]
    ys, xs = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    angle = torch.rad2deg(torch.atan2((out * xs).sum((1, 2)), -(out * ys).sum((1, 2))))
    assert 23 < angle.max() < 26 and -26 < angle.min() < -23 and abs(float(angle.mean())) < 2.5
    assert torch.equal(
        run(made("mmdc_mnist", 33, degrees=0.0), bar, np.arange(400))[:, 0],
        torch.from_numpy(bar[..., 0]).float() / 255,
    )


def test_a_turn_is_counter_clockwise() -> None:
    from dist_scan.data.augment import warp

    picture = torch.arange(25.0).view(1, 1, 5, 5)
    torch.testing.assert_close(
        warp.rotate(picture, np.array([90.0])), torch.rot90(picture, 1, (2, 3)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "settings, size, stored, resolution, words",
    [
        (
            {"name": "center"},
            32,
            "raw",
            256,
            ["cuts 32 x 32 px", "of 256 px: 2% of a square image", "data.resolution: 37"],
        ),
        (
            {"name": "randaugment"},
            96,
            "jpeg",
            128,
            ["cuts 96 x 96 px", "56%", "data.resolution: 110"],
        ),
        (
            {"name": "crop"},
            64,
            "original",
            256,
            ["cuts 64 x 64 px", "whatever their size", "data.stored: jpeg and data.resolution: 73"],
        ),
        (
            {"name": "center"},
            224,
            "raw",
            128,
            ["enlarges", "128 px to 224", "data.resolution: 256"],
        ),
        ({"name": "simclr"}, 64, "raw", 32, ["enlarges", "32 px to 64"]),
        ({"name": "center"}, 32, "raw", 32, []),
        ({"name": "center"}, 32, "raw", 37, []),
        ({"name": "center"}, 224, "jpeg", 512, []),
        ({"name": "simclr"}, 32, "raw", 256, []),
        ({"name": "whole"}, 32, "raw", 256, []),
        ({"name": "mmdc"}, 64, "jpeg", 96, []),
        ({"name": "center"}, 224, "original", 256, []),
        ({"name": "dcv2", "size": 96}, 224, "jpeg", 256, []),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_the_way_out(
    settings, size, stored, resolution, words
) -> None:
    text = augment.resolution_warning(RecipeConfig(**settings), size, stored, resolution)
    assert bool(text) == bool(words) and all(word in text for word in words), text


def test_the_way_out_fits() -> None:
    for name in ("center", "randaugment", "simclr"):
        for size in (16, 96, 224):
            assert not augment.resolution_warning(
                RecipeConfig(name=name), size, "raw", round(size * 256 / 224)
            )
