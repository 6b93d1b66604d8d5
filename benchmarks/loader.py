"""Two 224 px views (random resized crop, flip) per image: pairs per CPU-second on one thread, one JSON line per row.

    python -m benchmarks.loader FOLDER_OF_IMAGES --compare

--compare runs torchvision's PIL pipeline on the same stored JPEGs, interleaved with ours; `speedup` is the median over rounds.
"""
from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import emit, spread
from dist_scan.data.beton.format import check_beton
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import write_beton
from dist_scan.data.crops import CropSpec
from dist_scan.data.sources import DataConfig, SplitConfig, open_source

NEEDS = "data:imagenet-samples"
QUICK = ["--rounds", "3"]
VIEWS = (CropSpec("random_resized", 224, flip=0.5),) * 2


def peer(path: Path) -> Callable[[int], None]:
    """torchvision on Pillow, from the JPEGs that lie in a .beton."""
    from PIL import Image
    from torchvision import transforms as T

    tables = check_beton(path)
    data = path.read_bytes()
    files = [data[s:s + n] for s, n in zip(tables.rows["f0"]["data_ptr"].tolist(), tables.sizes.tolist())]
    cut = T.Compose([T.RandomResizedCrop(224, (0.2, 1.0)), T.RandomHorizontalFlip(), T.PILToTensor()])

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            image = Image.open(io.BytesIO(files[i])).convert("RGB")
            return cut(image), cut(image)

    def run(epoch: int) -> None:
        for _ in torch.utils.data.DataLoader(Pairs(), batch_size=32):
            pass

    return run


def ours(path: Path) -> tuple[Callable[[int], None], float]:
    """One epoch of our loader, and the seconds to its first batch (compilation included)."""
    begin = time.perf_counter()
    loader = BetonLoader(path, VIEWS, seed=0, batch_size=32, workers=1)
    next(loader.batches(np.arange(loader.num_images), 0))
    first_s = time.perf_counter() - begin

    def run(epoch: int) -> None:
        for _ in loader.batches(np.arange(loader.num_images), epoch):
            pass

    return run, first_s


def main() -> None:
    """Build, warm up, measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, first, count = {}, {}, 0
        for kind in ("jpeg", "raw"):
            config, path = DataConfig(train=SplitConfig(source=args.source), stored=kind), Path(folder) / f"{kind}.beton"
            count = write_beton(open_source(config.train), path, config, 1, show=False).num_images
            rows[kind], first[kind] = ours(path)
        if args.compare:
            rows["torchvision"] = peer(Path(folder) / "jpeg.beton")
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for epoch in range(args.rounds + 1):
            for name, run in rows.items():
                begin = time.process_time()
                run(epoch)
                seconds[name].append(time.process_time() - begin)
    for name in rows:
        times = np.array(seconds[name][1:])  # the first round warms up
        row = {"row": name, "images": count, "pairs_per_cpu_s": round(count / float(np.median(times)))}
        if name in first:
            row["first_batch_s"] = round(first[name], 2)
        if args.compare:
            row |= spread(np.array(seconds["torchvision"][1:]) / times, "speedup")
        emit(row)


if __name__ == "__main__":
    main()
