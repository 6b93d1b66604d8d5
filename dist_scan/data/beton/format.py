"""The .beton file: FFCV's format, with our own writer and checks.

FFCV's writer hangs on an unreadable image, and its reader checks only the version: the file of a
killed writer aborts the process, a truncated file gives wrong pixels. Here a file is assembled from
finished chunks and renamed when complete, and all of its tables are verified before it is read.

Beside IMAGES.beton are IMAGES.json (metadata), IMAGES.names.parquet, IMAGES.sums.npy (checksums)
and IMAGES.bad.csv (the images that could not be read, with the reasons).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_scan.storage.arrays import write_npy
from dist_scan.storage.atomic import write_atomic, write_json

VERSION = 2
PAGE = 8 * 2**20
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
IMAGE_FIELD, INT_FIELD = 2, 1
FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD), ("index", INT_FIELD))
STORED_IMAGE = np.dtype(
    [
        ("start", np.int64),
        ("size", np.int64),
        ("checksum", np.uint64),
        ("mode", np.int64),
        ("height", np.int64),
        ("width", np.int64),
        ("label", np.int64),
    ]
)
"""One image: place and checksum of its bytes, their mode, height and width in pixels, class."""
ROWS_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


class InvalidBetonError(ValueError):
    """A .beton that must not be read, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}; remove it (in a run: the folder it is in) "
            "and start the same command again"
        )


def sidecar(path: str | Path, ending: str) -> Path:
    """IMAGES.beton -> IMAGES.<ending>."""
    return Path(path).with_suffix(f".{ending}")


def checksum(data: bytes) -> int:
    """Sum of the 64-bit words, each times an odd weight by its position, modulo 2^64.

    It changes with any one flipped bit and takes 1 % of the time of decoding, so the loader
    verifies it at every read (crop_kernel.checksum); CRC-32 would take a fifth of reading raw
    images.
    """
    words = np.frombuffer(data + b"\0" * (-len(data) % 8), "<u8")
    weights = 2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1)
    return int((words * weights).sum(dtype=np.uint64))


def layout(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """(start of each image of these sizes, end of the data), in bytes.

    No image crosses the border of a page, or FFCV's own reader fails.
    """
    tables_end = ROWS_START + len(sizes) * ROW.itemsize
    position = -(-tables_end // PAGE) * PAGE
    starts = np.empty(len(sizes), np.uint64)
    for i, size in enumerate(sizes.tolist()):
        if position % PAGE + size > PAGE:
            position = -(-position // PAGE) * PAGE
        starts[i] = position
        position += size
    return starts, position


def build_tables(images: np.ndarray) -> tuple[bytes, bytes]:
    """(header, fields and rows, which precede the images; allocation table, which follows them).

    images: [N] STORED_IMAGE, without regard to their `start`.
    """
    n = len(images)
    starts, end = layout(images["size"])
    # Header and fields
    header = np.array((VERSION, len(FIELDS), PAGE, n, end), HEADER)
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    # Rows: image, label, index
    rows = np.zeros(n, ROW)
    for name in ("mode", "height", "width"):
        rows["f0"][name] = images[name]
    rows["f0"]["data_ptr"] = starts
    rows["f1"] = images["label"]
    rows["f2"] = np.arange(n)
    # Allocation table: where the bytes of each image are
    table = np.zeros(n, ALLOC)
    table["sample_id"] = np.arange(n)
    table["ptr"] = starts
    table["size"] = images["size"]
    return header.tobytes() + fields.tobytes() + rows.tobytes(), table.tobytes()


def write_file(path: Path, before: bytes, after: bytes, images: Iterator[bytes]) -> None:
    """Assemble a file atomically from its tables (see build_tables) and its images in order."""
    table = np.frombuffer(after, ALLOC)

    def write(file: BinaryIO) -> None:
        file.write(before)
        for start, image in zip(table["ptr"].tolist(), images, strict=True):
            file.seek(start)
            file.write(image)
        file.seek(int(table["ptr"][-1] + table["size"][-1]))
        file.write(after)

    # Remains of killed builds are as large as the data.
    for temporary in path.parent.glob(f".tmp-{glob.escape(path.name)}-*"):
        temporary.unlink(missing_ok=True)
    write_atomic(path, write)


def read_image_table(path: str | Path, verify_images: bool = False) -> np.ndarray:
    """Read and verify a file's tables; returns [N] STORED_IMAGE. Call it before native code reads.

    verify_images: also read every image and verify its checksum.
    Raises InvalidBetonError if the file is unfinished, truncated, inconsistent, damaged or not of
    this format, and ValueError if it does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; build it with: python -m dist_scan beton SOURCE {path.name}"
        )
    # Read the tables, bounded by the size of the file
    num_images, table_start = _check_header(path)
    rows = np.fromfile(path, ROW, num_images, offset=ROWS_START)
    table = np.fromfile(path, ALLOC, num_images, offset=table_start)
    if num_images == 0 or len(rows) != num_images:
        raise InvalidBetonError(path, "has no images, or fewer rows than its header says")
    images = np.zeros(num_images, STORED_IMAGE)
    images["start"] = rows["f0"]["data_ptr"]
    images["size"] = table["size"]
    images["label"] = rows["f1"]
    for name in ("mode", "height", "width"):
        images[name] = rows["f0"][name]
    _check_sizes(path, images)
    # They must equal the tables of these images as we write them
    before, after = build_tables(images)
    with open(path, "rb") as file:
        found = file.read(len(before))
        file.seek(table_start)
        if found != before or file.read() != after:
            raise InvalidBetonError(path, "its tables are not consistent")
    # And those that were written at the build
    images["checksum"] = _verified_checksums(path, before + after, num_images)
    if verify_images:
        data = np.memmap(path, np.uint8, "r")
        for i, image in enumerate(images):
            stored = data[image["start"] : image["start"] + image["size"]].tobytes()
            if checksum(stored) != image["checksum"]:
                name = read_names(path)[i]
                raise InvalidBetonError(path, f"image {i} ({name}) does not match its checksum")
    return images


def _check_header(path: Path) -> tuple[int, int]:
    """(number of images, start of the allocation table), if they fit the size of the file."""
    size = path.stat().st_size
    if size < ROWS_START:
        raise InvalidBetonError(path, f"has only {size} bytes, too few for a header")
    header = np.fromfile(path, HEADER, 1)[0]
    if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
        raise InvalidBetonError(path, "has another format version, or other fields")
    num_images, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    expected = table_start + num_images * ALLOC.itemsize
    if table_start == 0 or size != expected:
        raise InvalidBetonError(
            path, f"is truncated or unfinished ({size:,} bytes, its header says {expected:,})"
        )
    return num_images, table_start


def _check_sizes(path: Path, images: np.ndarray) -> None:
    """Check that the mode and the sizes of each image are plausible."""
    size = images["size"]
    pixels = images["height"] * images["width"] * 3
    is_valid = (pixels > 0) & (size > 0) & (size <= PAGE)
    # A JPEG has mode 0, raw pixels have mode 1.
    is_valid &= (images["mode"] == 0) | ((images["mode"] == 1) & (size == pixels))
    if not is_valid.all():
        raise InvalidBetonError(path, "has an image whose size does not fit its bytes")


def _verified_checksums(path: Path, tables: bytes, num_images: int) -> np.ndarray:
    """The images' checksums [N], after these and the tables' own checksum are verified.

    This finds a flipped label or width, and sidecar files of another build.
    """
    metadata = read_metadata(path)
    file = sidecar(path, "sums.npy")
    try:
        checksums = np.load(file)
    except (OSError, ValueError, EOFError):
        raise InvalidBetonError(path, f"{file.name} beside it is missing or damaged") from None
    if metadata.get("tables") != checksum(tables):
        raise InvalidBetonError(
            path, "its tables have changed on disk, or the files beside it are of another build"
        )
    if len(checksums) != num_images or metadata.get("sums") != checksum(checksums.tobytes()):
        raise InvalidBetonError(path, f"{file.name} beside it is damaged or of another build")
    return checksums


def read_labels(path: str | Path) -> np.ndarray:
    """[N] int64 class of each image; -1 if unknown."""
    return read_image_table(path)["label"]


def read_names(path: str | Path) -> list[str]:
    """Names of the stored images, in row order."""
    import pyarrow.parquet as pq

    return pq.read_table(sidecar(path, "names.parquet"))["name"].to_pylist()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """num_images, num_bad, class_names, source and storage settings. Raises ValueError."""
    file = sidecar(path, "json")
    if not file.is_file():
        raise ValueError(f"{file} is missing beside {path}; copy both, or build the dataset again")
    return json.loads(file.read_text())


def write_sidecars(
    path: Path, names: list[str], checksums: np.ndarray, metadata: dict[str, Any]
) -> None:
    """Write the files beside a .beton. The .beton is written last: then everything is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"name": pa.array(names, pa.string())})
    write_atomic(sidecar(path, "names.parquet"), lambda file: pq.write_table(table, file))
    write_npy(sidecar(path, "sums.npy"), checksums)
    write_json(sidecar(path, "json"), metadata)
