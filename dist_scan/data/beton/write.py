"""Building a .beton: in chunks, by worker processes, restartable, with a list of what could not be read."""

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
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_scan.config import ConfigError, DataConfig
from dist_scan.data.beton.decode import decodes
from dist_scan.data.beton.format import build_tables, checksum, sidecar, write_file, write_sidecars
from dist_scan.data.encode import EncodedImage, UnreadableImageError, encode
from dist_scan.data.sources.base import Source
from dist_scan.monitoring.progress import Progress
from dist_scan.storage.artifacts import fingerprint
from dist_scan.storage.atomic import write_atomic, write_text

CHUNK = 512  # images; the unit of work and of restarting
MOST_CLASSES = 1 << 20
ALONE_BELOW = 4096  # so few images are faster here than a pool takes to start


class BetonReport(NamedTuple):
    """What a build did."""

    num_images: int
    num_bad: int
    bad_path: Path


def storage_fingerprint(source: str, config: DataConfig) -> str:
    """Which bytes a build of this source would give."""
    return fingerprint(source, config.stored, config.resolution, config.max_side, config.quality)


def write_beton(
    source: Source, out: Path, config: DataConfig, workers: int = 1, show: bool = True
) -> BetonReport:
    """Build `out` (the same bytes for any number of workers). A killed build goes on from its finished chunks in OUT.parts/.

    Raises ConfigError when more than config.max_bad_share of the images cannot be read; the list is then still written.
    """
    out, parts = Path(out), sidecar(out, "parts")
    known, chunks = source.fingerprint(), -(-len(source) // CHUNK)
    mark = storage_fingerprint(known, config)
    if not parts.is_dir() or not (parts / "mark").is_file() or (parts / "mark").read_text() != mark:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_text(parts / "mark", mark)
    missing = [c for c in range(chunks) if not (parts / f"{c:06d}.npz").is_file()]
    done = len(source) - sum(len(_span(c, source)) for c in missing)
    with Progress(out.name, len(source), "images", done=done, enabled=show) as progress:
        for count in _run(source, config, parts, missing, workers):
            progress.advance(count)
    report = _assemble(source, known, out, config, parts, chunks)
    shutil.rmtree(parts)
    return report


def _span(chunk: int, source: Source) -> range:
    return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(source)))


def _run(
    source: Source, config: DataConfig, parts: Path, missing: list[int], workers: int
) -> Iterator[int]:
    """Make the missing chunks; yields how many images each held. A worker's crash ends the build with its error, never a hang."""
    if workers <= 1 or len(missing) * CHUNK <= ALONE_BELOW:
        yield from (_make_chunk(source, config, parts, chunk) for chunk in missing)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # forking a process that holds torch's threads can hang the child
    context.set_forkserver_preload(["dist_scan.data.encode"])
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(source, config, parts)
    ) as pool:
        try:
            yield from pool.map(_worker_chunk, missing)
        except BrokenProcessPool:
            raise ValueError(
                "a process that encodes images was killed (out of memory?); the same command goes on from the finished chunks, "
                f"with fewer workers than {workers} it needs less memory"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_job: tuple[Source, DataConfig, Path] | None = None  # a worker's source, sent once per process


def _start_worker(*job) -> None:
    global _job
    _job = job
    # a killed build (kill -9) cannot tell its workers: they would wait for the next chunk for ever
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _worker_chunk(chunk: int) -> int:
    return _make_chunk(*_job, chunk)


def _make_chunk(source: Source, config: DataConfig, parts: Path, chunk: int) -> int:
    """Encode one chunk into CHUNK.bin, then CHUNK.npz, whose presence means it is whole."""
    stored, names, labels, rows, bad = [], [], [], [], []
    span = _span(chunk, source)
    for row, sample in zip(span, source.read(span)):
        if not -1 <= sample.label < MOST_CLASSES:
            raise ConfigError(
                f"image {row} ('{_printable(sample.name)}') has label {sample.label}; allowed: 0 to {MOST_CLASSES - 1}, or -1 for unknown. "
                "Number the classes from 0"
            )
        try:
            stored.append(_encoded(sample.data, config))
            names.append(_printable(sample.name))
            labels.append(sample.label)
            rows.append(row)
        except UnreadableImageError as reason:
            bad.append((row, _printable(sample.name), str(reason)))
    write_atomic(parts / f"{chunk:06d}.bin", lambda f: f.writelines(s.data for s in stored))
    table = _table(stored)
    write_atomic(
        parts / f"{chunk:06d}.npz",
        lambda f: np.savez(
            f,
            names=np.array(names, dtype=np.str_),
            labels=np.array(labels, np.int64),
            bad=np.array(bad, dtype=np.str_).reshape(-1, 3),
            **table,
        ),
    )
    return len(span)


def _encoded(data: bytes, config: DataConfig) -> EncodedImage:
    """As `encode`; a JPEG passed through must also decode without a complaint here, where it can still be re-encoded, not in training."""
    stored = encode(data, config)
    if (
        config.stored == "original"
        and stored.data is data
        and not decodes(stored.data, stored.height, stored.width)
    ):
        return encode(data, config, pass_through=False)
    return stored


def _printable(name: str) -> str:
    """File names need not be UTF-8; tables and CSV must be."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _table(stored: list[EncodedImage]) -> dict[str, np.ndarray]:
    return {
        "modes": np.array([s.mode for s in stored], np.uint8),
        "heights": np.array([s.height for s in stored], np.uint16),
        "widths": np.array([s.width for s in stored], np.uint16),
        "sizes": np.array([len(s.data) for s in stored], np.uint64),
        "sums": np.array([checksum(s.data) for s in stored], np.uint64),
    }


def _assemble(
    source: Source, known: str, out: Path, config: DataConfig, parts: Path, chunks: int
) -> BetonReport:
    pieces = []
    for chunk in range(chunks):
        with np.load(parts / f"{chunk:06d}.npz") as piece:
            pieces.append({name: piece[name] for name in piece.files})
    whole = {
        name: np.concatenate([p[name] for p in pieces])
        for name in ("modes", "heights", "widths", "labels", "sizes", "sums")
    }
    names = [str(n) for p in pieces for n in p["names"]]
    bad = [row for p in pieces for row in p["bad"].tolist()]
    _write_bad(sidecar(out, "bad.csv"), bad)
    share = len(bad) / len(source)
    if share > config.max_bad_share or not names:
        worst = "; ".join(f"{name}: {reason}" for _, name, reason in bad[:3])
        raise ConfigError(
            f"{len(bad)} of {len(source)} images ({share:.1%}) cannot be read, more than data.max_bad_share = {config.max_bad_share:g} allows: "
            f"{worst}. All are listed in {sidecar(out, 'bad.csv')}; mend the source, or raise data.max_bad_share"
        )
    facts = {
        "num_images": len(names),
        "num_bad": len(bad),
        "class_names": source.class_names,
        "mark": storage_fingerprint(known, config),
        "source": known,
        "stored": config.stored,
        "resolution": config.resolution,
        "max_side": config.max_side,
        "quality": config.quality,
    }
    sums = whole.pop("sums")
    before, after = build_tables(**whole)
    write_sidecars(
        out,
        names,
        sums,
        facts | {"tables": checksum(before + after), "sums": checksum(sums.tobytes())},
    )
    write_file(out, before, after, _samples(parts, pieces))
    return BetonReport(len(names), len(bad), sidecar(out, "bad.csv"))


def _samples(parts: Path, pieces: list[dict[str, np.ndarray]]) -> Iterator[bytes]:
    for chunk, piece in enumerate(pieces):
        data, at = (parts / f"{chunk:06d}.bin").read_bytes(), 0
        for size in piece["sizes"].tolist():
            yield data[at : at + size]
            at += size


def _write_bad(path: Path, bad: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["row", "name", "reason"])
    writer.writerows(bad)
    write_text(path, text.getvalue())
