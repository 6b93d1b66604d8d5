"""The .beton file: FFCV's format, written and checked by us.

FFCV's writer hangs on any bad image and its reader checks the version number alone: a killed writer's file aborts the process, a
cut one gives wrong pixels (FFCV.md 1). Here a file is built from finished chunks, renamed in whole, and held against its own
tables before anything is read natively. Beside IMAGES.beton lie IMAGES.json (facts), IMAGES.names.parquet, IMAGES.sums.npy and
IMAGES.bad.csv (what could not be read, and why).
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dist_scan.storage.atomic import write_atomic, write_json

VERSION, PAGE = 2, 8 * 2**20
IMAGE_FIELD, INT_FIELD = 2, 1
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ROW = np.dtype([("f0", IMAGE), ("f1", "<i8"), ("f2", "<i8")], align=True)
ALLOC = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD), ("index", INT_FIELD))


class InvalidBetonError(ValueError):
    """A .beton that must not be read, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}; remove it (of a run: the folder it lies in) and start the same command again"
        )


class Tables(NamedTuple):
    """What a checked file says about its samples: rows [N] of ROW, each one's bytes in the file, and their checksums."""

    rows: np.ndarray
    sizes: np.ndarray
    sums: np.ndarray


def sidecar(path: Path, ending: str) -> Path:
    """IMAGES.beton -> IMAGES.<ending>."""
    return Path(path).with_suffix(f".{ending}")


def checksum(data: bytes) -> int:
    """Sum of 64-bit words, each times its odd place, modulo 2^64: any one flipped bit shows, and it costs 1 % of decoding, so the
    loader takes it at every read (decode.py has the numba twin; CRC-32 would cost a fifth of reading raw images)."""
    words = np.frombuffer(data + b"\0" * (-len(data) % 8), "<u8")
    return int(
        (words * (2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1))).sum(dtype=np.uint64)
    )


def layout(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each sample of these sizes lies (no sample straddles a page, or FFCV's own reader breaks), and where data ends."""
    first = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + len(sizes) * ROW.itemsize
    at, starts = -(-first // PAGE) * PAGE, np.empty(len(sizes), np.uint64)
    for i, size in enumerate(sizes.tolist()):
        if at % PAGE + size > PAGE:
            at = -(-at // PAGE) * PAGE
        starts[i] = at
        at += size
    return starts, at


def build_tables(
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    labels: np.ndarray,
    sizes: np.ndarray,
) -> tuple[bytes, bytes]:
    """What stands before the samples (header, fields, rows) and after them (the allocation table)."""
    n, (starts, end) = len(sizes), layout(sizes)
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), PAGE, n, end)
    fields = np.zeros(len(FIELDS), FIELD)
    for row, (name, kind) in zip(fields, FIELDS):
        row["type_id"] = kind
        row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    rows = np.zeros(n, ROW)
    rows["f0"]["mode"], rows["f0"]["height"], rows["f0"]["width"], rows["f0"]["data_ptr"] = (
        modes,
        heights,
        widths,
        starts,
    )
    rows["f1"], rows["f2"] = labels, np.arange(n)
    table = np.zeros(n, ALLOC)
    table["sample_id"], table["ptr"], table["size"] = np.arange(n), starts, sizes
    return b"".join(part.tobytes() for part in (header, fields, rows)), table.tobytes()


def write_file(path: Path, before: bytes, after: bytes, data) -> None:
    """Assemble one file, atomically. `data` yields each sample's bytes in order."""
    table = np.frombuffer(after, ALLOC)

    def write(f: BinaryIO) -> None:
        f.write(before)
        for start, sample in zip(table["ptr"].tolist(), data, strict=True):
            f.seek(start)
            f.write(sample)
        f.seek(int(table["ptr"][-1] + table["size"][-1]))
        f.write(after)

    for left in path.parent.glob(
        f".tmp-{glob.escape(path.name)}-*"
    ):  # by a build that was killed: as large as the data
        left.unlink(missing_ok=True)
    write_atomic(path, write)


def check_beton(path: Path, whole: bool = False) -> Tables:
    """Hold a file against its own tables before any native code sees it. `whole` also reads every sample against its checksum.

    Raises BadBeton (killed writer, cut, foreign, out of bounds, rotted) or ValueError when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; build it with: python -m dist_scan beton SOURCE {path.name}"
        )
    total = path.stat().st_size
    if total < HEADER.itemsize + len(FIELDS) * FIELD.itemsize:
        raise InvalidBetonError(path, f"has only {total} bytes, too few for a header")
    header = np.fromfile(path, HEADER, 1)[0]
    if (
        header["version"] != VERSION
        or header["num_fields"] != len(FIELDS)
        or header["page_size"] != PAGE
    ):
        raise InvalidBetonError(path, "is no .beton of ours (another version or other fields)")
    fields = np.fromfile(path, FIELD, len(FIELDS), offset=HEADER.itemsize)
    if [
        (bytes(f["name"]).rstrip(b"\0").decode("ascii", "replace"), int(f["type_id"]))
        for f in fields
    ] != list(FIELDS):
        raise InvalidBetonError(path, "has other fields than image, label, index")
    n, end = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if end == 0 or total != end + n * ALLOC.itemsize:
        raise InvalidBetonError(
            path,
            f"is cut or unfinished ({total:,} bytes, its header says {end + n * ALLOC.itemsize:,})",
        )
    rows = np.fromfile(path, ROW, n, offset=HEADER.itemsize + len(FIELDS) * FIELD.itemsize)
    table = np.fromfile(path, ALLOC, n, offset=end)
    _check_tables(path, rows, table, end)
    sums = _check_sums(
        path, b"".join(part.tobytes() for part in (header, fields, rows)), table.tobytes(), n
    )
    if whole:
        _check_bytes(path, rows, table["size"], sums)
    return Tables(rows, table["size"].copy(), sums)


def _check_sums(path: Path, before: bytes, after: bytes, n: int) -> np.ndarray:
    """The checksums [N], once they and the tables match the facts: a flipped label or width, or another build's sidecars, show here."""
    facts, file = read_metadata(path), sidecar(path, "sums.npy")
    try:
        sums = np.load(file)
    except (OSError, ValueError, EOFError):
        raise InvalidBetonError(path, f"{file.name} beside it is missing or damaged") from None
    if facts.get("tables") != checksum(before + after):
        raise InvalidBetonError(
            path,
            "its tables are not what was written (rotted, or the files beside it are another build's)",
        )
    if len(sums) != n or facts.get("sums") != checksum(sums.tobytes()):
        raise InvalidBetonError(path, f"{file.name} beside it is damaged or another build's")
    return sums


def _check_tables(path: Path, rows: np.ndarray, table: np.ndarray, end: int) -> None:
    image, n = rows["f0"], len(rows)
    starts, data_end = layout(table["size"])
    if n == 0:
        raise InvalidBetonError(path, "holds no images")
    if (
        (table["size"] > PAGE).any()
        or data_end != end
        or not np.array_equal(starts, table["ptr"])
        or not np.array_equal(starts, image["data_ptr"])
    ):
        raise InvalidBetonError(path, "its tables disagree about where images lie")
    if not np.array_equal(table["sample_id"], np.arange(n)) or not np.array_equal(
        rows["f2"], np.arange(n)
    ):
        raise InvalidBetonError(path, "its images are out of order")
    raw = image["mode"] == 1
    pixels = image["height"].astype(np.int64) * image["width"] * 3
    if (
        (image["mode"] > 1).any()
        or (pixels == 0).any()
        or (table["size"] == 0).any()
        or not np.array_equal(pixels[raw], table["size"][raw].astype(np.int64))
    ):
        raise InvalidBetonError(path, "has an image whose size does not fit its bytes")


def _check_bytes(path: Path, rows: np.ndarray, sizes: np.ndarray, sums: np.ndarray) -> None:
    data = np.memmap(path, np.uint8, "r")
    for i, (start, size) in enumerate(zip(rows["f0"]["data_ptr"].tolist(), sizes.tolist())):
        if checksum(data[start : start + size].tobytes()) != int(sums[i]):
            raise InvalidBetonError(
                path, f"image {i} ({read_names(path)[i]}) does not match its checksum"
            )


def read_labels(path: Path) -> np.ndarray:
    """[N] int64, -1 where unknown."""
    return check_beton(path).rows["f1"].astype(np.int64)


def read_names(path: Path) -> list[str]:
    """The stored images' names, in row order."""
    import pyarrow.parquet as pq

    return pq.read_table(sidecar(path, "names.parquet"))["name"].to_pylist()


def read_metadata(path: Path) -> dict[str, Any]:
    """num_images, num_bad, class_names, source and storage settings, as written beside the file."""
    file = sidecar(path, "json")
    if not file.is_file():
        raise ValueError(f"{file} is missing beside {path}; copy both, or build the dataset again")
    return json.loads(file.read_text())


def write_sidecars(path: Path, names: list[str], sums: np.ndarray, facts: dict[str, Any]) -> None:
    """Names, checksums and facts; written before the .beton itself, whose presence means that all is there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"name": pa.array(names, pa.string())})
    write_atomic(sidecar(path, "names.parquet"), lambda f: pq.write_table(table, f))
    write_atomic(sidecar(path, "sums.npy"), lambda f: np.save(f, sums))
    write_json(sidecar(path, "json"), facts)
