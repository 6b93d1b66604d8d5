"""Augmentation after the crop: images per CPU-second of one thread, one JSON line a row.

    python -m benchmarks.augment [--compare] [--sizes 32 224] [--recipes NAME ...]

From the crop's uint8 to normalised floats. --compare also measures torchvision's transforms on PIL
images, one at a time, interleaved with ours (the same crops, ToTensor and Normalize included),
where torchvision has the transforms of a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.interleaved import measure_works
from benchmarks.rows import emit, spread
from benchmarks.torchvision_peer import MEAN, STD, colour_transform
from dist_scan.data.augment.recipes import RECIPES, RecipeConfig, build_recipe

QUICK = ["--sizes", "32", "--recipes", "simclr", "moco_v2", "--repeats", "3"]
SMALL_SIZE = 100
SMALL_BATCH, LARGE_BATCH = 256, 32
"""Of crops smaller than SMALL_SIZE, and of the others."""
PEER_IMAGES = 64


def crops(size: int, batch: int) -> np.ndarray:
    """Crops of a photograph, [batch, size, size, 3] uint8."""
    photo, rng = load_sample_image("china.jpg"), np.random.default_rng(0)
    tops = rng.integers(0, photo.shape[0] - size, batch)
    lefts = rng.integers(0, photo.shape[1] - size, batch)
    return np.stack([photo[top : top + size, left : left + size] for top, left in zip(tops, lefts)])


def measure(name: str, colour: str, size: int, repeats: int, compare: bool) -> None:
    """Measure one recipe and print its row."""
    batch = SMALL_BATCH if size < SMALL_SIZE else LARGE_BATCH
    recipe = build_recipe(RecipeConfig(name=name, colour=colour), size, MEAN, STD)
    array = crops(size, batch)
    images, index, epochs = torch.from_numpy(array), np.arange(batch), count()
    few = array[:PEER_IMAGES]
    transform = colour_transform(RECIPES[name]) if compare and colour == "exact" else None

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: recipe(images, index, seed=0, epoch=next(epochs), view=0)
    }
    if transform is not None:
        works["torchvision"] = lambda: [transform(Image.fromarray(image)) for image in few]
    seconds = measure_works(works, repeats)
    ours = seconds["ours"] / batch
    row = {
        "row": name,
        "colour": colour,
        "size": size,
        "batch": batch,
        "img_per_cpu_s": round(1 / np.median(ours)),
    }
    if transform is not None:
        peer = seconds["torchvision"] / len(few)
        row["torchvision_img_per_cpu_s"] = round(1 / np.median(peer))
        row |= spread(peer / ours, "speedup")
    emit(row)


def main() -> None:
    """Measure every recipe at every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        for name in args.recipes:
            measure(name, "exact", size, args.repeats, args.compare)
            if RECIPES[name].jitter:
                measure(name, "fused", size, args.repeats, args.compare)


if __name__ == "__main__":
    main()
