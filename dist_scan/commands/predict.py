"""Clusters for new images from a finished run: a folder, parquet, tar shards or a .beton -> one parquet file (docs/predict.md)."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dist_scan.config import ConfigError

BLOCK = 131_072  # rows of the output at a time: what is held in memory
MOST_ON_GPU = 2048  # images a batch there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, of what, into what."""
    parser.add_argument("run", metavar="RUN", help="a finished run's folder (runs/NAME)")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        help="image folder, parquet file/folder/glob, tar shards, or a .beton stored as the run's",
    )
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="OUT.parquet",
        help="one row per image; what cannot be read is listed in OUT.bad.csv",
    )
    parser.add_argument(
        "--stage", help="whose model (default: the one behind what the report calls best)"
    )
    parser.add_argument(
        "--features",
        metavar="STAGE",
        help="the embed stage of training images that novelty is measured against (default: the one "
        "the neighbours were mined in; none: no novelty)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images at a time (default: the run's, or less where memory is short; more on a GPU)",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes and threads that read images (default: the cores this one may use)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT.parquet when it exists"
    )


def main(args: argparse.Namespace) -> int:
    """Check everything, encode, predict. The same command goes on from the encoded images when it was stopped."""
    from dist_scan.finished_run import open_finished

    out = checked_out(Path(args.out), args.overwrite, args.images)
    if args.device == "cuda":
        from dist_scan.world.world import device_for

        device_for("cuda")  # before images are encoded
    for name in ("batch", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < (name == "batch"):
            raise ConfigError(f"--{name}: {getattr(args, name)}; allowed: 1 or more")
    done = open_finished(args.run)
    stage, assign = done.chosen(args.stage)
    table = training_features(done, args.features)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        images = prepared(
            args.images, out, done.run.data, args.workers or len(os.sched_getaffinity(0))
        )
        count = predict(done, stage, assign, table, images, out, args)
    except KeyboardInterrupt:
        print(f"\nstopped; what was encoded is kept in {work_of(out)}, the same command goes on")
        return 130
    shutil.rmtree(work_of(out), ignore_errors=True)
    bad = (
        f"; {images.num_bad} could not be read (listed in {bad_of(out)})" if images.num_bad else ""
    )
    print(f"{out}: {count} images by stage {stage}{bad}")
    return 0


# --- before any work ---------------------------------------------------------------------------------------------------


def checked_out(out: Path, overwrite: bool, images: str) -> Path:
    """The output's path, once it can be written and would never be read as images. Raises ConfigError."""
    if out.suffix != ".parquet":
        raise ConfigError(f"-o: '{out}' must end in .parquet")
    if out.is_dir():
        raise ConfigError(f"-o: '{out}' is a folder; give another name")
    if among(out.resolve(), images):
        raise ConfigError(
            f"-o: '{out}' is, or lies among, the parquet files of '{images}' and would be read as images; give another folder"
        )
    there = [str(path) for path in (out, bad_of(out)) if path.exists()]
    if there and not overwrite:
        raise ConfigError(
            f"-o: {' and '.join(there)} {'exists' if len(there) == 1 else 'exist'}; give another name, or --overwrite"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"-o: cannot write in '{out.parent}' ({error.strerror}); give another place"
        ) from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"-o: cannot write in '{out.parent}'; give another place")
    return out


def among(out: Path, images: str) -> bool:
    """Whether a parquet file is one of IMAGES: that file, in that folder of parquet files, or met by that pattern."""
    source = Path(images)
    if source.is_dir():
        return out.parent == source.resolve() and any(
            file.resolve() != out for file in source.glob("*.parquet")
        )
    return out == source.resolve() or (
        any(c in images for c in "*?[") and out.match(str(source.absolute()))
    )


def bad_of(out: Path) -> Path:
    """OUT.parquet -> OUT.bad.csv."""
    return out.with_suffix(".bad.csv")


def work_of(out: Path) -> Path:
    """Where encoded images wait; removed at the end."""
    return out.with_name(out.name + ".work")


def training_features(done, wanted: str | None) -> str | None:
    """The embed stage that novelty is measured against, or None. Raises ConfigError when the wanted one cannot serve."""

    def serves(name: str) -> bool:
        config = done.config(name)
        return (
            config["images"] == "train"
            and config["backbone"] is not None
            and config["recipe"]["name"] == "center"
        )

    fit = [name for name in done.of_kind("embed") if serves(name)]
    if wanted == "none":
        return None
    if wanted is not None and wanted not in fit:
        raise ConfigError(
            f"--features: '{wanted}' holds no centre crops of the training images through a backbone; allowed: {', '.join([*fit, 'none'])}"
        )
    mined = [done.config(name)["features"] for name in done.of_kind("neighbours")]
    return wanted or next((name for name in [*mined, *fit] if name in fit), None)


# --- images ------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Images as the run stores them, and each one's place in the source (broken ones counted)."""

    beton: Path
    index: Any
    num_bad: int


def prepared(source: str, out: Path, data, workers: int) -> Images:
    """Encode the source as the run's own images were, or take a .beton that was. Raises ConfigError when nothing can be read."""
    import numpy as np

    from dist_scan.data.beton.format import read_metadata, sidecar

    beton = Path(source) if source.endswith(".beton") else encoded(source, out, data, workers)
    facts = read_metadata(beton)
    odd = [
        f"{k} {facts[k]} instead of {getattr(data, k)}"
        for k in ("stored", "resolution", "max_side", "quality")
        if facts[k] != getattr(data, k)
    ]
    if odd:
        raise ConfigError(
            f"'{beton}' is stored otherwise than the run's images ({', '.join(odd)}); give the images themselves, or build it with these settings"
        )
    bad = _rows(sidecar(beton, "bad.csv"))
    if bad:
        shutil.copyfile(sidecar(beton, "bad.csv"), bad_of(out))
    else:
        bad_of(out).unlink(missing_ok=True)
    index = np.setdiff1d(
        np.arange(facts["num_images"] + len(bad)), [int(row["row"]) for row in bad]
    )
    return Images(beton, index, len(bad))


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing beside the .beton; copy all files of its name, or give the images themselves"
        )
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def encoded(source: str, out: Path, data, workers: int) -> Path:
    """A .beton of the source in the work folder; the one of a stopped start is taken if it is of the same images."""
    from dist_scan.config import SplitConfig
    from dist_scan.data.beton.format import read_metadata, sidecar
    from dist_scan.data.beton.write import storage_fingerprint, write_beton
    from dist_scan.data.sources.open import open_source

    images, beton = open_source(SplitConfig(source=source)), work_of(out) / "images.beton"
    config = data.model_copy(update={"max_bad_share": 1.0})
    if beton.is_file() and read_metadata(beton)["mark"] == storage_fingerprint(
        images.fingerprint(), config
    ):
        return beton
    beton.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_beton(images, beton, config, workers)
    except ConfigError:
        shutil.copyfile(sidecar(beton, "bad.csv"), bad_of(out))
        raise ConfigError(
            f"not one of the {len(images)} images of '{source}' can be read; the reasons are in {bad_of(out)}"
        ) from None
    return beton


# --- work --------------------------------------------------------------------------------------------------------------


def predict(
    done,
    stage: str,
    assign: str | None,
    table: str | None,
    images: Images,
    out: Path,
    args: argparse.Namespace,
) -> int:
    """Write OUT.parquet, a block of rows at a time. Returns how many rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dist_scan.data.beton.format import read_names
    from dist_scan.monitoring.progress import Progress
    from dist_scan.storage.atomic import write_atomic

    predictor = opened(done, stage, assign, table, images, args)
    names, rows = read_names(images.beton), np.arange(len(images.index))
    measure = _novelty(done, table, predictor.device)

    def write(file) -> None:
        writer = None
        with Progress("predict", len(rows), "images") as progress:
            for start, columns in _blocks(predictor, rows, progress):
                span = slice(start, start + len(columns["top_clusters"]))
                block = pa.table(_arrow(names[span], images.index[span], columns, measure))
                writer = writer or pq.ParquetWriter(
                    file, block.schema.with_metadata(_about(done, stage, table))
                )
                writer.write_table(block)
            writer.close()

    write_atomic(out, write)
    return len(rows)


def opened(
    done,
    stage: str,
    assign: str | None,
    table: str | None,
    images: Images,
    args: argparse.Namespace,
):
    """The predictor: the stage's model as its assign stage ran it, and the backbone that made the training features."""
    import torch

    from dist_scan.data.images import open_images
    from dist_scan.engine.batch_size import bytes_per_image, fitting_batch
    from dist_scan.engine.embed import checked
    from dist_scan.engine.precision import memory_format, set_determinism
    from dist_scan.engine.predict import Embedder, Predictor
    from dist_scan.finished_run import recipe_of
    from dist_scan.models.backbone import load_embedder
    from dist_scan.models.cluster_model import load_cluster_model
    from dist_scan.monitoring.memory import free_memory
    from dist_scan.world.world import open_world

    set_determinism()
    world, settings = open_world(args.device), done.config(assign) if assign else {}
    recipe = recipe_of(done, assign)
    model = memory_format(checked(load_cluster_model(done.stages[stage].path)), world.device).eval()
    embedder = None
    if table is not None:
        config, made_by = done.config(table), done.stages[done.inputs(table)["backbone"]].path
        embedder = Embedder(
            memory_format(load_embedder(made_by, config["projection"]), world.device).eval(),
            config["precision"],
        )
    run = done.run.model_copy(
        update={"runtime": done.run.runtime.model_copy(update={"workers": args.workers})}
    )
    loader, recipes = open_images(images.beton, (recipe,), 1, run, world)
    sample = torch.zeros(1, 3, run.data.size, run.data.size, device=world.device)
    need = bytes_per_image(model, sample) + (
        bytes_per_image(embedder.network, sample) if embedder else 0
    )
    wanted = (
        MOST_ON_GPU if world.device.type == "cuda" else settings.get("batch", 256)
    )  # the run's own on a CPU: the same bits
    loader.batch_size = args.batch or fitting_batch(
        min(wanted, max(len(images.index), 1)), need, free_memory(world.device)
    )
    if not args.batch and loader.batch_size < min(wanted, len(images.index)):
        print(
            f"memory: batches of {loader.batch_size} images instead of {wanted} ({need / 2**20:.1f} MiB an image)"
        )
    return Predictor(
        model, loader, recipes[0], world.device, settings.get("precision", "fp32"), embedder
    )


def _blocks(predictor, rows, progress) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first row, columns) of BLOCK rows or a few more at a time."""
    import numpy as np

    parts, start, held = [], 0, 0
    for part in predictor(rows):
        parts.append(part)
        held += len(part.top)
        progress.advance(len(part.top))
        if held >= BLOCK or start + held == len(rows):
            features = (
                None if part.features is None else np.concatenate([p.features for p in parts])
            )
            yield (
                start,
                {
                    "top_clusters": np.concatenate([p.top for p in parts]),
                    "top_probabilities": np.concatenate([p.probability for p in parts]),
                    "features": features,
                },
            )
            parts, start, held = [], start + held, 0


def _novelty(done, table: str | None, device):
    """A function features [n, D] -> the columns about the nearest training image; none without a table of training features."""
    if table is None:
        return lambda features: {}
    from dist_scan.data.feature_table import FeatureTable
    from dist_scan.data.neighbour_table import NeighbourTable
    from dist_scan.monitoring.progress import Progress
    from dist_scan.search.novelty import fraction_nearer, nearest_row, training_distances

    trained = FeatureTable.open(done.stages[table].path)
    mined = next(
        (
            name
            for name in done.of_kind("neighbours")
            if done.config(name)["features"] == table and done.config(name)["metric"] == "cosine"
        ),
        None,
    )
    usual = training_distances(NeighbourTable.open(done.stages[mined].path)) if mined else None

    def measure(features) -> dict[str, Any]:
        with Progress("novelty", trained.num_rows, "training rows") as progress:
            distance, row = nearest_row(features, trained, device, progress.advance)
        return {"novelty": distance, "nearest": row} | (
            {"novelty_share": fraction_nearer(distance, usual)} if usual is not None else {}
        )

    return measure


def _arrow(names: list[str], index, columns: dict[str, Any], measure) -> dict[str, Any]:
    import pyarrow as pa

    top, probability = columns["top_clusters"], columns["top_probabilities"]
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(columns[name].reshape(-1)), top.shape[1])
        for name in ("top_clusters", "top_probabilities")
    }
    return {
        "name": pa.array(names, pa.string()),
        "index": pa.array(index),
        "cluster": pa.array(top[:, 0]),
        "probability": pa.array(probability[:, 0]),
        **lists,
        **{name: pa.array(values) for name, values in measure(columns["features"]).items()},
    }


def _about(done, stage: str, table: str | None) -> dict[str, str]:
    """Where the file came from, in its metadata."""
    return {
        "dist_scan": f"run {done.run.name}, stage {stage} ({done.stages[stage].manifest['fingerprint']}), novelty against {table or 'nothing'}"
    }
