"""The loader's views are a function of (seed, epoch, row, view), with the right pixels."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from dist_scan.data.augment.crops import CropSpec, crop_boxes
from dist_scan.data.beton.format import read_image_table
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.encode import JPEG
from tests.support.images import build_beton, write_image_folder
from tests.support.shared_data import shared_data

NUM_IMAGES = 30
TWO_VIEWS = (CropSpec("random_resized", 32, flip=0.5), CropSpec("random", 24, resize=32, flip=0.5))
ALL_ROWS = np.arange(NUM_IMAGES)


@pytest.fixture(scope="module", params=["raw", "jpeg"])
def beton(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    images = write_image_folder(root / "images", NUM_IMAGES)
    return build_beton(images, root / "x.beton", stored=request.param)


def make_loader(
    path: Path,
    specs: tuple[CropSpec, ...] = TWO_VIEWS,
    *,
    seed: int = 1,
    batch_size: int = 8,
    num_threads: int = 1,
) -> BetonLoader:
    return BetonLoader(path, specs, seed=seed, batch_size=batch_size, num_threads=num_threads)


def read_views(
    loader: BetonLoader, rows: np.ndarray, epoch: int = 0, views: tuple[int, ...] | None = None
) -> list[Tensor]:
    """All batches of these rows, one tensor per view."""
    batches = list(loader.batches(rows, epoch, views))
    assert np.array_equal(np.concatenate([index for index, _ in batches]), rows)
    return [torch.cat(view) for view in zip(*[tensors for _, tensors in batches])]


def assert_all_equal(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_views_do_not_depend_on_threads_batch_size_order_or_start(beton: Path) -> None:
    views = read_views(make_loader(beton), ALL_ROWS)
    shuffled = np.random.default_rng(0).permutation(NUM_IMAGES)
    for batch_size, num_threads in ((7, 2), (30, 3), (1, 1)):
        loader = make_loader(beton, batch_size=batch_size, num_threads=num_threads)
        assert_all_equal(read_views(loader, shuffled), [view[shuffled] for view in views])
    resumed = read_views(make_loader(beton), ALL_ROWS[16:])
    assert_all_equal(resumed, [view[16:] for view in views])


def test_seed_epoch_and_view_each_change_the_crop(beton: Path) -> None:
    same_spec_twice = (TWO_VIEWS[0], TWO_VIEWS[0])
    loader = make_loader(beton, same_spec_twice)
    first, second = read_views(loader, ALL_ROWS)
    assert not torch.equal(first, second)
    assert not torch.equal(first, read_views(loader, ALL_ROWS, epoch=1)[0])
    other_seed = make_loader(beton, same_spec_twice, seed=2)
    assert not torch.equal(first, read_views(other_seed, ALL_ROWS)[0])


def test_rows_may_repeat_and_tensors_are_not_overwritten(beton: Path) -> None:
    loader = make_loader(beton, batch_size=4, num_threads=2)
    batches = [views for _, views in loader.batches(np.array([5, 5, 3, 3] * 10), 0)]
    assert [view.shape for view in batches[0]] == [(4, 32, 32, 3), (4, 24, 24, 3)]
    for views in batches:
        assert torch.equal(views[0], batches[0][0])
        assert torch.equal(views[0][0], views[0][1])


@pytest.mark.parametrize("rows", [[30], [-1], [0, 1, 2**40]])
def test_rows_out_of_range_are_refused_before_anything_is_read(
    beton: Path, rows: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"allowed: 0\.\.29"):
        make_loader(beton).batches(np.array(rows), 0)


def test_leaving_early_ends_the_threads_and_the_loader_can_be_used_again(beton: Path) -> None:
    before = threading.active_count()
    loader = make_loader(beton, batch_size=2, num_threads=2)
    for _ in range(5):
        for _ in loader.batches(ALL_ROWS, 0):
            break
    assert threading.active_count() == before
    assert len(list(loader.batches(ALL_ROWS, 0))) == 15


def test_torch_keeps_its_number_of_threads_and_nothing_is_printed(beton: Path) -> None:
    code = f"""
import numpy as np, torch
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.augment.crops import CropSpec
torch.set_num_threads(2)
for _ in range(2):
    loader = BetonLoader(
        {str(beton)!r}, (CropSpec('center', 32),), seed=0, batch_size=4, num_threads=2
    )
    list(loader.batches(np.arange(20), 0))
    del loader
assert torch.get_num_threads() == 2
"""
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""


def test_memory_does_not_grow_over_epochs(beton: Path) -> None:
    loader = make_loader(beton, num_threads=2)
    resident_bytes = []
    for epoch in range(60):
        for _ in loader.batches(ALL_ROWS, epoch):
            pass
        resident_pages = Path("/proc/self/statm").read_text().split()[1]
        resident_bytes.append(int(resident_pages) * 4096)
    assert resident_bytes[-1] - resident_bytes[20] < 8 * 2**20


def test_views_can_be_selected_in_any_order_and_repeated(beton: Path) -> None:
    """A view's randomness depends on its position in the selection."""
    loader = make_loader(beton, num_threads=2)
    both = read_views(make_loader(beton), ALL_ROWS)
    assert_all_equal(read_views(loader, ALL_ROWS, views=(0, 1)), both)
    swapped = read_views(loader, ALL_ROWS, views=(1, 0))
    assert [view.shape[1] for view in swapped] == [24, 32]
    assert_all_equal(swapped, read_views(make_loader(beton, TWO_VIEWS[::-1]), ALL_ROWS))
    first, again = read_views(loader, ALL_ROWS, views=(0, 0))
    assert torch.equal(first, read_views(loader, ALL_ROWS, views=(0,))[0])
    assert not torch.equal(first, again)


# --- crops against torchvision's and Pillow's ------------------------------------------------


def test_random_resized_crops_have_the_distribution_of_torchvision() -> None:
    n, h, w = 20000, 256, 341
    spec = CropSpec("random_resized", 224, scale=(0.2, 1.0))
    boxes, _ = crop_boxes(spec, np.full(n, h), np.full(n, w), 3, 0, np.arange(n), 0)
    torch.manual_seed(0)
    image = torch.empty(1, h, w)
    drawn = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]

    def measures(boxes: np.ndarray) -> np.ndarray:
        top, left, height, width = boxes.T
        return np.stack([height * width / (h * w), np.log(width / height), top, left])

    ours, theirs = measures(boxes), measures(np.array(drawn))
    mean, std = theirs.mean(1), theirs.std(1)
    assert (np.abs(ours.mean(1) - mean) < 5 * std / np.sqrt(n / 2)).all()
    assert (np.abs(ours.std(1) / std - 1) < 0.03).all()


def test_flips_have_their_probability() -> None:
    n = 20000
    spec = CropSpec("center", 8, flip=0.3)
    _, flips = crop_boxes(spec, np.full(n, 40), np.full(n, 50), 0, 0, np.arange(n), 0)
    assert abs(flips.mean() - 0.3) < 0.02


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ImageNet images, stored raw and as JPEG."""
    root = tmp_path_factory.mktemp("photos")
    source = shared_data("imagenet-samples")
    size = {"resolution": 256, "max_side": 1024}
    return {
        stored: build_beton(source, root / f"{stored}.beton", stored=stored, **size)
        for stored in ("raw", "jpeg")
    }


def stored_image(path: Path, row: int) -> Image.Image:
    """A stored image, decoded by Pillow."""
    image = read_image_table(path)[row]
    data = path.read_bytes()[image["start"] : image["start"] + image["size"]]
    if image["mode"] == JPEG:
        return Image.open(io.BytesIO(data))
    shape = (image["height"], image["width"], 3)
    return Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))


@pytest.mark.parametrize(
    "stored, tolerance",
    [("raw", 0.0), ("jpeg", 1.5)],  # turbojpeg's fast transform differs from Pillow's by about 1
)
def test_centre_crops_equal_those_of_torchvision(
    photos: dict[str, Path], stored: str, tolerance: float
) -> None:
    path = photos[stored]
    loader = make_loader(path, (CropSpec("center", 224, resize=256),))
    crops = read_views(loader, np.arange(20))[0].numpy().astype(int)
    for row, crop in enumerate(crops):
        expected = np.asarray(F.center_crop(F.resize(stored_image(path, row), 256), 224))
        assert np.abs(crop - expected).mean() <= tolerance


def test_random_crops_are_close_to_those_of_pillow(photos: dict[str, Path]) -> None:
    path = photos["raw"]
    spec = CropSpec("random_resized", 224, flip=0.5)
    rows = np.arange(20)
    crops = read_views(make_loader(path, (spec,)), rows, epoch=3)[0].numpy().astype(int)
    sizes = read_image_table(path)[rows]
    boxes, flips = crop_boxes(spec, sizes["height"], sizes["width"], 1, 3, rows, 0)
    differences = []
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        box = (left, top, left + width, top + height)
        cropped = stored_image(path, row).crop(box)
        expected = np.asarray(cropped.resize((224, 224), Image.Resampling.BILINEAR))
        crop = crops[row][:, ::-1] if flips[row] else crops[row]
        differences.append(np.abs(crop - expected).mean())
    # Over all 200 images 0.57 and 2.8 were measured.
    assert np.mean(differences) < 1.0
    assert max(differences) < 4.0
