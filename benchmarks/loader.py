"""Two 224 px views per image (random resized crop, flip): pairs per CPU-second of one thread.

    python -m benchmarks.loader FOLDER_OF_IMAGES --compare
    python -m benchmarks.loader FOLDER_OF_IMAGES --compare --views 1 2 \\
        --resolution 224 256 384 --stored jpeg raw original
    srun ... python -m benchmarks.loader SOURCE --folder SHARED   # all ranks of a job together

--compare measures torchvision's PIL pipeline interleaved with ours, on the same stored JPEGs
(`speedup`: median over rounds) and on the source's own files (`speedup_to_source`), as one would
without storing anything. Files lie in memory for both: no disk is measured. The ranks of a job use
all their cores and print images per second. One JSON line a row.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms

from benchmarks.interleaved import job_world, measure_job, measure_works, medians
from benchmarks.rows import emit, spread
from benchmarks.torchvision_peer import Views, stored_jpegs
from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source

CLUSTER = [
    "{source}",
    "--folder",
    "{folder}",
    "--stored",
    "{stored}",
    "--resolution",
    "{resolution}",
    "--size",
    "{size}",
]
NEEDS = "data:imagenet-samples"
QUICK = ["--rounds", "3"]
BATCH = 32
SCALE = (0.2, 1.0)
"""Of a crop: fraction of the image's area."""
PEER, PEER_ON_SOURCE = "torchvision", "torchvision on the source"


def crops(size: int, views: int) -> tuple[CropSpec, ...]:
    """The random crops of each image, one for each view."""
    return (CropSpec("random_resized", size, flip=0.5),) * views


def make_ours(path: Path, size: int, views: int) -> tuple[Callable[[], None], float]:
    """An epoch of our loader, and the seconds to its first batch (compilation included)."""
    begin = time.perf_counter()
    loader = BetonLoader(path, crops(size, views), seed=0, batch_size=BATCH, num_threads=1)
    images = np.arange(loader.num_images)
    next(loader.batches(images, 0))
    first_batch_s = time.perf_counter() - begin
    epochs = count()

    def work() -> None:
        for _ in loader.batches(images, next(epochs)):
            pass

    return work, first_batch_s


def make_peer(jpegs: list[bytes], size: int, views: int) -> Callable[[], None]:
    """An epoch of torchvision's DataLoader, without reading files."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    images = Views(jpegs, transform, views)

    def work() -> None:
        for _ in torch.utils.data.DataLoader(images, batch_size=BATCH):
            pass

    return work


def measure(args: argparse.Namespace, resolution: int, views: int) -> None:
    """Measure one stored size and number of views, and print the rows."""
    works: dict[str, Callable[[], None]] = {}
    first_batch_s = {}
    num_images = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The peer needs the JPEGs, also where ours are not measured.
        kinds = [*args.stored, "jpeg"] if args.compare else args.stored
        for kind in dict.fromkeys(kinds):
            path = folder / f"{kind}.beton"
            config = DataConfig(
                train=SplitConfig(source=args.source), stored=kind, resolution=resolution
            )
            written = write_beton(open_source(config.train), path, config, 1, show_progress=False)
            num_images = written.num_images
            if kind in args.stored:
                works[kind], first_batch_s[kind] = make_ours(path, args.size, views)
        if args.compare:
            jpegs = stored_jpegs(folder / "jpeg.beton")
            works[PEER] = make_peer(jpegs, args.size, views)
            source = open_source(SplitConfig(source=args.source))
            files = [image.data for image in source.read(range(len(source)))]
            works[PEER_ON_SOURCE] = make_peer(files, args.size, views)
        seconds = measure_works(works, args.rounds)
    for name, values in seconds.items():
        rate = round(num_images / float(np.median(values)))
        row = {
            "row": name,
            "images": num_images,
            "resolution": resolution,
            "size": args.size,
            "views": views,
            ("pairs_per_cpu_s" if views == 2 else "img_per_cpu_s"): rate,
        }
        if name in first_batch_s:
            row["first_batch_s"] = round(first_batch_s[name], 2)
        if args.compare:
            row |= spread(seconds[PEER] / values, "speedup")
            row |= spread(seconds[PEER_ON_SOURCE] / values, "speedup_to_source")
        emit(row)


def measure_over_job(args: argparse.Namespace) -> None:
    """Measure the ranks of a job, each with its part of the images of one file in --folder."""
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import cores_per_rank

    views, stored, resolution = args.views[0], args.stored[0], args.resolution[0]
    config = DataConfig(
        train=SplitConfig(source=args.source, limit=args.images),
        stored=stored,
        resolution=resolution,
        size=args.size,
    )
    path = args.folder / "loader.beton"
    with job_world() as world:
        threads = cores_per_rank(world)
        if world.rank == 0:
            args.folder.mkdir(parents=True, exist_ok=True)
            write_beton(open_source(config.train), path, config, threads, show_progress=False)
        barrier()
        loader = BetonLoader(
            path, crops(args.size, views), seed=0, batch_size=BATCH, num_threads=threads
        )
        images = np.arange(world.rank, loader.num_images, world.world_size)
        epochs = count()

        def work() -> None:
            for _ in loader.batches(images, next(epochs)):
                pass

        took = medians(measure_job(work, args.rounds))
        if world.rank == 0:
            emit(
                {
                    "row": "all ranks",
                    "views": views,
                    "stored": stored,
                    "resolution": resolution,
                    "size": args.size,
                    "images": loader.num_images,
                    "world_size": world.world_size,
                    "workers": threads,
                    **took,
                    "images_per_s": round(loader.num_images / took["wall_s"], 1),
                }
            )


def main(argv: list[str] | None = None) -> None:
    """Measure every stored size and number of views; over a job the first of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--views", type=int, nargs="+", default=[2], help="per image")
    parser.add_argument(
        "--stored", nargs="+", choices=["jpeg", "raw", "original"], default=["jpeg", "raw"]
    )
    parser.add_argument(
        "--resolution",
        type=int,
        nargs="+",
        default=[256],
        help="shorter side of stored images in pixels",
    )
    parser.add_argument("--size", type=int, default=224, help="of a view in pixels")
    job = parser.add_argument_group("for the ranks of a job")
    job.add_argument("--folder", type=Path, help="a folder that all nodes see")
    job.add_argument("--images", type=int, default=2000, help="largest number of images")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        measure_over_job(args)
        return
    torch.set_num_threads(1)
    for resolution in args.resolution:
        for views in args.views:
            measure(args, resolution, views)


if __name__ == "__main__":
    main()
