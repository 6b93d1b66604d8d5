"""Build a .beton: in chunks, by worker processes, resumable, with a list of unreadable images."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_scan.config.base import ConfigError
from dist_scan.config.data import DataConfig
from dist_scan.data.beton.ffcv_library import can_decode
from dist_scan.data.beton.format import (
    STORED_IMAGE,
    build_tables,
    checksum,
    sidecar,
    write_file,
    write_sidecars,
)
from dist_scan.data.encode import EncodedImage, UnreadableImageError, encode
from dist_scan.data.sources.base import Source
from dist_scan.monitoring.progress import Progress
from dist_scan.storage.arrays import write_npz
from dist_scan.storage.artifacts import fingerprint
from dist_scan.storage.atomic import write_atomic, write_text
from dist_scan.world.processes import available_cores

CHUNK = 512  # images; the unit of work and of resuming
MAX_CLASSES = 1 << 20
MIN_FOR_WORKERS = 4096  # fewer images are encoded sooner than worker processes start


class BetonReport(NamedTuple):
    """Result of a build."""

    num_images: int
    num_unreadable: int
    unreadable_list: Path


def storage_fingerprint(source: str, config: DataConfig) -> str:
    """Fingerprint of the stored bytes, from the fingerprint of their source."""
    return fingerprint(source, config.stored, config.resolution, config.max_side, config.quality)


def write_beton(
    source: Source, out: Path, config: DataConfig, workers: int = 1, show_progress: bool = True
) -> BetonReport:
    """Build `out`; the bytes are the same for any number of worker processes (0: one per core).

    A build that was killed resumes from its finished chunks in OUT.parts/. Raises ConfigError if
    more than config.max_bad_share of the images cannot be read; the list of them is still written.
    """
    build = _Build(source, config, sidecar(out, "parts"))
    source_fingerprint = source.fingerprint()
    build.open_parts(storage_fingerprint(source_fingerprint, config))
    missing = build.missing_chunks()
    done = len(source) - sum(len(build.rows(chunk)) for chunk in missing)
    with Progress(out.name, len(source), "images", done=done, enabled=show_progress) as progress:
        for count in _encode_chunks(build, missing, workers or available_cores()):
            progress.advance(count)
    report = _assemble(build, source_fingerprint, out)
    shutil.rmtree(build.parts)
    return report


@dataclass(frozen=True)
class _Build:
    """What is encoded, and the folder of finished chunks. Sent once to each worker process."""

    source: Source
    config: DataConfig
    parts: Path

    def open_parts(self, build_fingerprint: str) -> None:
        """Empty the folder unless its chunks have this fingerprint."""
        file = self.parts / "fingerprint"
        if not file.is_file() or file.read_text() != build_fingerprint:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True)
            write_text(file, build_fingerprint)

    def chunks(self) -> range:
        return range(-(-len(self.source) // CHUNK))

    def missing_chunks(self) -> list[int]:
        return [chunk for chunk in self.chunks() if not self.file(chunk, "npz").is_file()]

    def rows(self, chunk: int) -> range:
        """Images of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.source)))

    def file(self, chunk: int, ending: str) -> Path:
        return self.parts / f"{chunk:06d}.{ending}"

    def encode_chunk(self, chunk: int) -> int:
        """Write a chunk's images (.bin), then its tables (.npz). Returns the number of images.

        A chunk is complete when its .npz exists.
        """
        images: list[EncodedImage] = []
        stored = []
        names = []
        unreadable = []
        rows = self.rows(chunk)
        for row, sample in zip(rows, self.source.read(rows)):
            name = printable_name(sample.name)
            if not -1 <= sample.label < MAX_CLASSES:
                raise ConfigError(
                    f"image {row} ('{name}') has label {sample.label}; "
                    f"allowed: 0 to {MAX_CLASSES - 1}, or -1 for unknown. Number the classes from 0"
                )
            try:
                image = self._encode(sample.data)
            except UnreadableImageError as reason:
                unreadable.append((row, name, str(reason)))
                continue
            names.append(name)
            images.append(image)
            # Fields of STORED_IMAGE; where it starts is known when all are encoded
            sizes = (image.mode, image.height, image.width)
            stored.append((0, len(image.data), checksum(image.data), *sizes, sample.label))
        write_atomic(
            self.file(chunk, "bin"), lambda file: file.writelines(image.data for image in images)
        )
        tables = {
            "names": np.array(names, np.str_),
            "bad": np.array(unreadable, np.str_).reshape(-1, 3),
            "images": np.array(stored, STORED_IMAGE),
        }
        write_npz(self.file(chunk, "npz"), tables)
        return len(rows)

    def _encode(self, data: bytes) -> EncodedImage:
        """`encode`, but a JPEG that the loader cannot decode without a warning is encoded again."""
        image = encode(data, self.config)
        is_original = self.config.stored == "original" and image.data is data
        if is_original and not can_decode(image.data, image.height, image.width):
            return encode(data, self.config, pass_through=False)
        return image


def printable_name(name: str) -> str:
    """A file name as valid UTF-8; other bytes become backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _encode_chunks(build: _Build, missing: list[int], workers: int) -> Iterator[int]:
    """Encode the missing chunks, in worker processes if that is faster; yields numbers of images.

    Raises ValueError if a worker process is killed.
    """
    if workers <= 1 or len(missing) * CHUNK <= MIN_FOR_WORKERS:
        yield from map(build.encode_chunk, missing)
        return
    # Not fork: a child of a process with torch's threads can hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_scan.data.encode"])
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(build,)
    ) as pool:
        try:
            yield from pool.map(_encode_chunk_in_worker, missing)
        except BrokenProcessPool:
            raise ValueError(
                "a process that encodes images was killed (out of memory?); the same command "
                "resumes from the finished chunks. It needs less memory with fewer processes than "
                f"{workers}: lower --workers, or in a run runtime.loader_threads"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker_build: _Build  # of this worker process


def _start_worker(build: _Build) -> None:
    global _worker_build
    _worker_build = build
    # If the build is killed (kill -9), its workers would wait for the next chunk for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _encode_chunk_in_worker(chunk: int) -> int:
    return _worker_build.encode_chunk(chunk)


def _assemble(build: _Build, source_fingerprint: str, out: Path) -> BetonReport:
    """Write the list of unreadable images, the sidecar files and the .beton from the chunks."""
    # Merge the tables of the chunks
    config = build.config
    chunks = []
    for chunk in build.chunks():
        with np.load(build.file(chunk, "npz")) as arrays:
            chunks.append(dict(arrays))
    merged = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    names = merged["names"].tolist()
    unreadable = merged["bad"].tolist()
    checksums = merged["images"]["checksum"]
    # List the unreadable images, and stop if they are too many
    unreadable_list = sidecar(out, "bad.csv")
    _write_csv(unreadable_list, [["row", "name", "reason"], *unreadable])
    fraction = len(unreadable) / len(build.source)
    if fraction > config.max_bad_share or not names:
        first = "; ".join(f"{name}: {reason}" for _, name, reason in unreadable[:3])
        raise ConfigError(
            f"{len(unreadable)} of {len(build.source)} images ({fraction:.1%}) cannot be read, "
            f"more than data.max_bad_share = {config.max_bad_share:g} allows: {first}. "
            f"All are listed in {unreadable_list}; repair the source, or raise data.max_bad_share"
        )
    # Write the metadata, then the file
    before, after = build_tables(merged["images"])
    metadata = {
        "num_images": len(names),
        "num_bad": len(unreadable),
        "class_names": build.source.class_names,
        "fingerprint": storage_fingerprint(source_fingerprint, config),
        "source": source_fingerprint,
        "stored": config.stored,
        "resolution": config.resolution,
        "max_side": config.max_side,
        "quality": config.quality,
        "tables": checksum(before + after),
        "sums": checksum(checksums.tobytes()),
    }
    write_sidecars(out, names, checksums, metadata)
    write_file(
        out, before, after, _read_images(build, [chunk["images"]["size"] for chunk in chunks])
    )
    return BetonReport(len(names), len(unreadable), unreadable_list)


def _read_images(build: _Build, sizes: list[np.ndarray]) -> Iterator[bytes]:
    """Stored bytes of every image, in order."""
    for chunk, sizes_of_chunk in enumerate(sizes):
        with open(build.file(chunk, "bin"), "rb") as file:
            for size in sizes_of_chunk.tolist():
                yield file.read(size)


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())
