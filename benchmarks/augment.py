"""Augmentation after the crop: `python -m benchmarks.augment [--compare] [--sizes 32 224] [--recipes NAME ...]`, a JSON line a row.

Images per CPU-second of one thread, from the crop's uint8 to normalised floats. --compare also times torchvision's transforms on PIL
images, one at a time, interleaved with ours (the same crops, ToTensor and Normalize included), where torchvision has such a chain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_sample_image

from benchmarks.rows import emit, spread
from dist_scan.data.augment.recipes import RECIPES, RecipeConfig, RecipeSpec, build_recipe

QUICK = ["--sizes", "32", "--recipes", "simclr", "moco_v2", "--repeats", "3"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crops(size: int, count: int) -> np.ndarray:
    """[count, size, size, 3] uint8 out of a photograph."""
    photo, rng = load_sample_image("china.jpg"), np.random.default_rng(0)
    corners = zip(
        rng.integers(0, photo.shape[0] - size, count), rng.integers(0, photo.shape[1] - size, count)
    )
    return np.stack([photo[top : top + size, left : left + size] for top, left in corners])


def peer(look: RecipeSpec) -> Callable | None:
    """torchvision's chain for the same look, or None."""
    from PIL import ImageFilter
    from torchvision import transforms as t

    if look.special != "none" or not look.normalise:
        return None
    blur = t.Lambda(
        lambda image: image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(0.1, 2.0))))
    )
    chain = [t.RandomApply([t.ColorJitter(*look.jitter)], look.jitter_p)] if look.jitter else []
    chain += [t.RandomGrayscale(look.grey_p)] if look.grey_p else []
    chain += [t.RandomApply([blur], look.blur_p)] if look.blur_p else []
    return t.Compose([*chain, t.ToTensor(), t.Normalize(MEAN, STD)])


def cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, colour: str, size: int, batch: int, repeats: int, compare: bool) -> dict:
    recipe = build_recipe(RecipeConfig(name=name, colour=colour), size, MEAN, STD)
    array = crops(size, batch)
    images, index = torch.from_numpy(array), np.arange(batch)
    other = peer(RECIPES[name]) if compare and colour == "exact" else None
    few = array[: min(batch, 64)]
    ours, theirs = [], []
    recipe(images, index, seed=0, epoch=0, view=0)
    for epoch in range(1, repeats + 1):
        ours.append(cpu_s(lambda: recipe(images, index, seed=0, epoch=epoch, view=0)) / batch)
        if other is not None:
            theirs.append(cpu_s(lambda: [other(image) for image in _pil(few)]) / len(few))
    row = {
        "row": name,
        "colour": colour,
        "size": size,
        "batch": batch,
        "img_per_cpu_s": round(1 / np.median(ours)),
    }
    if theirs:
        row |= {
            "torchvision_img_per_cpu_s": round(1 / np.median(theirs)),
            **spread(np.array(theirs) / np.array(ours), "speedup"),
        }
    return row


def _pil(arrays: np.ndarray) -> list:
    from PIL import Image

    return [Image.fromarray(a) for a in arrays]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        for name in args.recipes:
            for colour in ("exact", "fused") if RECIPES[name].jitter else ("exact",):
                emit(
                    measure(
                        name, colour, size, 256 if size < 100 else 32, args.repeats, args.compare
                    )
                )


if __name__ == "__main__":
    main()
