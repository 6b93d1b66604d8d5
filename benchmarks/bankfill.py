"""Filling the feature cache: image views per CPU-second of one thread, decoded to embedded.

    python -m benchmarks.bankfill --compare [--model resnet50 --size 224 --source FOLDER]

Images are decoded, cropped, coloured and passed through the network. --compare also measures what
one would otherwise write, interleaved: a DataLoader with Pillow and torchvision's transforms, and
the same network in eval mode.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision import transforms

from benchmarks.interleaved import measure_works
from benchmarks.rows import emit, spread
from benchmarks.torchvision_peer import MEAN, STD, Views, colour_transform, stored_jpegs
from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.augment.recipes import RECIPES, RecipeConfig, build_recipe
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source
from dist_scan.engine.embed import EmbedOptions, embed_images
from dist_scan.engine.stop import StopFlag
from dist_scan.models.backbone import BackboneConfig, build_backbone

QUICK = [
    "--compare",
    "--model",
    "resnet18",
    "--size",
    "64",
    "--images",
    "96",
    "--views",
    "2",
    "--rounds",
    "3",
]
BATCH = 32
HEIGHT, WIDTH = 300, 400
"""Of the images made from a photograph."""


def write_photographs(folder: Path, num_images: int) -> None:
    """Write crops of scikit-learn's photograph as JPEG files."""
    photo, rng = load_sample_image("china.jpg"), np.random.default_rng(0)
    (folder / "photo").mkdir(parents=True)
    for i in range(num_images):
        top = rng.integers(0, photo.shape[0] - HEIGHT)
        left = rng.integers(0, photo.shape[1] - WIDTH)
        crop = Image.fromarray(photo[top : top + HEIGHT, left : left + WIDTH])
        crop.save(folder / "photo" / f"{i:05d}.jpg", quality=90)


def make_ours(
    beton: Path, network: torch.nn.Module, args: argparse.Namespace, folder: Path
) -> Callable[[], None]:
    """All views of all images, into a table on disk."""
    config = RecipeConfig(name=args.recipe)
    recipes = tuple(build_recipe(config, args.size, MEAN, STD) for _ in range(args.views))
    crops = tuple(recipe.crop for recipe in recipes)
    loader = BetonLoader(beton, crops, seed=0, batch_size=BATCH, num_threads=1)
    options = EmbedOptions(network.num_features, num_shards=2)
    rounds = count()

    def work() -> None:
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            out = folder / f"features{next(rounds)}"
            embed_images(network, loader, recipes, out, options, StopFlag())

    return work


def make_peer(
    beton: Path, network: torch.nn.Module, args: argparse.Namespace
) -> Callable[[], None]:
    """A plain loop over the JPEGs of the .beton."""
    spec = RECIPES[args.recipe]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size, spec.scale),
            transforms.RandomHorizontalFlip(spec.flip),
            colour_transform(spec),
        ]
    )
    images = Views(stored_jpegs(beton), transform, args.views)

    @torch.inference_mode()
    def work() -> None:
        for views in torch.utils.data.DataLoader(images, batch_size=BATCH):
            np.stack([network(view).numpy() for view in views], 1).astype(np.float16)

    return work


def main() -> None:
    """Build the .beton, measure and print the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="images (default: crops of a photograph)")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument(
        "--recipe",
        default="standard",
        help="a random resized crop with the colours of this recipe (standard: none)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    network = build_backbone(BackboneConfig(name=args.model)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.source is None:
            write_photographs(folder / "in", args.images)
        source = args.source or str(folder / "in")
        config = DataConfig(train=SplitConfig(source=source, limit=args.images), size=args.size)
        beton = folder / "images.beton"
        written = write_beton(open_source(config.train), beton, config, 1, show_progress=False)
        works = {"ours": make_ours(beton, network, args, folder)}
        if args.compare:
            works["plain"] = make_peer(beton, network, args)
        seconds = measure_works(works, args.rounds)
    num_views = written.num_images * args.views
    row = {
        "row": args.recipe,
        "model": args.model,
        "size": args.size,
        "views": args.views,
        "images": written.num_images,
        "views_per_cpu_s": round(num_views / float(np.median(seconds["ours"])), 1),
    }
    if args.compare:
        plain = seconds["plain"]
        row["plain_views_per_cpu_s"] = round(num_views / float(np.median(plain)), 1)
        row |= spread(plain / seconds["ours"], "speedup")
    emit(row)


if __name__ == "__main__":
    main()
