"""Two 224 px views (random resized crop, flip) per image: pairs per CPU-second on one thread, one JSON line per row.

    python -m benchmarks.loader FOLDER_OF_IMAGES --compare
    python -m benchmarks.loader FOLDER_OF_IMAGES --compare --views 1 2 --resolution 224 256 384 --stored jpeg raw original
    srun ... python -m benchmarks.loader SOURCE --folder SHARED     # all ranks of a job, each with all its cores: images/s together

--compare runs torchvision's PIL pipeline in turns with ours, on the same stored JPEGs (`speedup`: median over rounds) and on the source's own
files (`speedup_to_source`), as one would without storing anything. Files lie in memory for both: no disk is measured.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.interleaved import job_world, measure_job, medians
from benchmarks.rows import emit, spread
from dist_scan.config import DataConfig, SplitConfig
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.beton.format import check_beton
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


def stored_files(path: Path) -> list[bytes]:
    """The JPEGs that lie in a .beton."""
    tables, data = check_beton(path), path.read_bytes()
    return [
        data[s : s + n]
        for s, n in zip(tables.rows["f0"]["data_ptr"].tolist(), tables.sizes.tolist())
    ]


def peer(files: list[bytes], size: int, views: int) -> Callable[[int], None]:
    """torchvision's ImageFolder and DataLoader but for the reading: Pillow and torchvision's transforms, from files in memory."""
    from PIL import Image
    from torchvision import transforms as T

    cut = T.Compose(
        [T.RandomResizedCrop(size, (0.2, 1.0)), T.RandomHorizontalFlip(), T.PILToTensor()]
    )

    class Views(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> list[torch.Tensor]:
            image = Image.open(io.BytesIO(files[i])).convert("RGB")
            return [cut(image) for _ in range(views)]

    def run(epoch: int) -> None:
        for _ in torch.utils.data.DataLoader(Views(), batch_size=32):
            pass

    return run


def crops(size: int, views: int) -> tuple[CropSpec, ...]:
    """What is cut of each image."""
    return (CropSpec("random_resized", size, flip=0.5),) * views


def ours(path: Path, size: int, views: int) -> tuple[Callable[[int], None], float]:
    """One epoch of our loader, and the seconds to its first batch (compilation included)."""
    begin = time.perf_counter()
    loader = BetonLoader(path, crops(size, views), seed=0, batch_size=32, num_threads=1)
    next(loader.batches(np.arange(loader.num_images), 0))
    first_s = time.perf_counter() - begin

    def run(epoch: int) -> None:
        for _ in loader.batches(np.arange(loader.num_images), epoch):
            pass

    return run, first_s


def over_ranks(args: argparse.Namespace) -> None:
    """Every rank of the job cuts its share of the images of one file in --folder, on all its cores."""
    from dist_scan.world.collectives import barrier
    from dist_scan.world.world import cores_per_rank

    config = DataConfig(
        train=SplitConfig(source=args.source, limit=args.images),
        stored=args.stored[0],
        resolution=args.resolution[0],
        size=args.size,
    )
    path = args.folder / "loader.beton"
    with job_world() as world:
        workers = cores_per_rank(world)
        if world.rank == 0:
            args.folder.mkdir(parents=True, exist_ok=True)
            write_beton(open_source(config.train), path, config, workers, show=False)
        barrier()
        loader = BetonLoader(
            path, crops(args.size, args.views[0]), seed=0, batch_size=32, num_threads=workers
        )
        mine, epochs = (
            np.arange(world.rank, loader.num_images, world.world_size),
            iter(range(10**6)),
        )

        def work() -> None:
            for _ in loader.batches(mine, next(epochs)):
                pass

        took = medians(measure_job(work, args.rounds))
        if world.rank == 0:
            emit(
                {
                    "row": "all ranks",
                    "views": args.views[0],
                    "stored": args.stored[0],
                    "resolution": args.resolution[0],
                    "size": args.size,
                    "images": loader.num_images,
                    "world_size": world.world_size,
                    "workers": workers,
                    **took,
                    "images_per_s": round(loader.num_images / took["wall_s"], 1),
                }
            )


def measure(args: argparse.Namespace, resolution: int, views: int) -> None:
    """One stored size and number of views: build, warm up, measure in turns."""
    with tempfile.TemporaryDirectory() as folder:
        rows, first, count = {}, {}, 0
        for kind in dict.fromkeys([*args.stored, *["jpeg"] * args.compare]):
            path = Path(folder) / f"{kind}.beton"
            config = DataConfig(
                train=SplitConfig(source=args.source), stored=kind, resolution=resolution
            )
            count = write_beton(open_source(config.train), path, config, 1, show=False).num_images
            if kind in args.stored:
                rows[kind], first[kind] = ours(path, args.size, views)
        if args.compare:
            source = open_source(SplitConfig(source=args.source))
            rows["torchvision"] = peer(stored_files(Path(folder) / "jpeg.beton"), args.size, views)
            rows["torchvision on the source"] = peer(
                [image.data for image in source.read(range(len(source)))], args.size, views
            )
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for epoch in range(args.rounds + 1):
            for name, run in rows.items():
                begin = time.process_time()
                run(epoch)
                seconds[name].append(time.process_time() - begin)
    for name in rows:
        times = np.array(seconds[name][1:])  # the first round warms up
        rate = round(count / float(np.median(times)))
        row = {
            "row": name,
            "images": count,
            "resolution": resolution,
            "size": args.size,
            "views": views,
            ("pairs_per_cpu_s" if views == 2 else "img_per_cpu_s"): rate,
        }
        if name in first:
            row["first_batch_s"] = round(first[name], 2)
        if args.compare:
            row |= spread(np.array(seconds["torchvision"][1:]) / times, "speedup")
            row |= spread(
                np.array(seconds["torchvision on the source"][1:]) / times, "speedup_to_source"
            )
        emit(row)


def main(argv: list[str] | None = None) -> None:
    """Every stored size and number of views in turn; over the ranks of a job, the first of each."""
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
        help="shorter side in pixels of what is stored",
    )
    parser.add_argument("--size", type=int, default=224, help="of a view")
    parser.add_argument(
        "--folder", type=Path, help="for the ranks of a job: a folder that all nodes see"
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="for the ranks of a job: at most so many"
    )
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        over_ranks(args)
        return
    torch.set_num_threads(1)
    for resolution in args.resolution:
        for views in args.views:
            measure(args, resolution, views)


if __name__ == "__main__":
    main()
