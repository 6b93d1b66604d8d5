"""Filling the bank of cached views: images decoded, cut, coloured, and through the network; image views per CPU-second.

    python -m benchmarks.bankfill --compare [--model resnet50 --size 224 --source FOLDER]

--compare adds, in turns, what one would otherwise write: a DataLoader over Pillow and torchvision's transforms of the same look, and the
same network in eval mode. One thread each, so that the ratio of CPU seconds says what a core does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import emit, spread

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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(folder: Path, count: int) -> Path:
    """Crops of scikit-learn's photograph as JPEG files, when no source is given."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo, rng = load_sample_image("china.jpg"), np.random.default_rng(0)
    for i in range(count):
        top, left = rng.integers(0, 427 - 300), rng.integers(0, 640 - 400)
        path = folder / "photo" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[top : top + 300, left : left + 400]).save(path, quality=90)
    return folder


def ours(
    beton: Path, network: torch.nn.Module, args: argparse.Namespace, folder: Path
) -> Callable[[], None]:
    """All images, all views, into a table on disk."""
    from dist_scan.data.augment.recipes import RecipeConfig, build_recipe
    from dist_scan.data.beton.loader import BetonLoader
    from dist_scan.engine.embed import EmbedOptions, embed_images
    from dist_scan.engine.stop import StopFlag

    recipes = tuple(
        build_recipe(RecipeConfig(name=args.recipe), args.size, MEAN, STD)
        for _ in range(args.views)
    )
    loader = BetonLoader(
        beton, tuple(r.crop for r in recipes), seed=0, batch_size=32, num_threads=1
    )
    turn = iter(range(10**6))

    def work() -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            embed_images(
                network,
                loader,
                recipes,
                folder / f"bank{next(turn)}",
                EmbedOptions(network.num_features, num_shards=2),
                StopFlag(),
            )

    return work


def peer(beton: Path, network: torch.nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    """The plain loop, on the JPEGs that lie in the .beton."""
    import io

    from PIL import Image
    from torchvision import transforms as T

    from benchmarks.augment import peer as colours
    from dist_scan.data.augment.recipes import RECIPES
    from dist_scan.data.beton.format import check_beton

    look, tables, data = RECIPES[args.recipe], check_beton(beton), beton.read_bytes()
    files = [
        data[s : s + n]
        for s, n in zip(tables.rows["f0"]["data_ptr"].tolist(), tables.sizes.tolist())
    ]
    cut = T.Compose(
        [
            T.RandomResizedCrop(args.size, look.scale),
            T.RandomHorizontalFlip(look.flip),
            colours(look),
        ]
    )

    class Views(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> list[torch.Tensor]:
            image = Image.open(io.BytesIO(files[i])).convert("RGB")
            return [cut(image) for _ in range(args.views)]

    @torch.inference_mode()
    def work() -> None:
        for views in torch.utils.data.DataLoader(Views(), batch_size=32):
            np.stack([network(view).numpy() for view in views], 1).astype(np.float16)

    return work


def main() -> None:
    """Build, warm up, measure in turns."""
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
    from dist_scan.config import DataConfig, SplitConfig
    from dist_scan.data.beton.write import write_beton
    from dist_scan.data.sources.open import open_source
    from dist_scan.models.backbone import BackboneConfig, build_backbone

    torch.set_num_threads(1)
    network = build_backbone(BackboneConfig(name=args.model)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = args.source or str(photographs(folder / "in", args.images))
        config = DataConfig(train=SplitConfig(source=source, limit=args.images), size=args.size)
        count = write_beton(
            open_source(config.train), folder / "images.beton", config, 1, show=False
        ).num_images
        works = {"ours": ours(folder / "images.beton", network, args, folder)}
        if args.compare:
            works["plain"] = peer(folder / "images.beton", network, args)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(args.rounds + 1):
            for name, work in works.items():
                began = time.process_time()
                work()
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - began)
    took = np.array(seconds["ours"])
    row = {
        "row": args.recipe,
        "model": args.model,
        "size": args.size,
        "views": args.views,
        "images": count,
        "views_per_cpu_s": round(count * args.views / float(np.median(took)), 1),
    }
    if args.compare:
        plain = np.array(seconds["plain"])
        row |= {
            "plain_views_per_cpu_s": round(count * args.views / float(np.median(plain)), 1),
            **spread(plain / took, "speedup"),
        }
    emit(row)


if __name__ == "__main__":
    main()
