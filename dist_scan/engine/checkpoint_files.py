"""Files of one checkpoint folder: hashed while they are written, verified against the manifest.

torch.load does not notice a flipped bit; the sha256 in the manifest does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, TypedDict, cast

import torch

from dist_scan.storage.artifacts import MANIFEST, sha256_of

STATE_FILE = "state.pt"


class FileInfo(TypedDict):
    """Size in bytes and sha256 of a file, as its writer meant it."""

    sha256: str
    size: int


def save_file(path: Path, value: object) -> FileInfo:
    """Write a value with torch.save and flush it to disk."""
    with open(path, "wb") as file:
        hashing = _HashingWriter(file)
        torch.save(value, cast("IO[bytes]", hashing))
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": hashing.sha256.hexdigest(), "size": hashing.size}


class _HashingWriter:
    """A binary file that hashes what is written to it.

    The hash is of the intended bytes, so that reading the file back shows what the disk made of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Write and hash data; returns the number of bytes written."""
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file's buffer (torch.save requires this method)."""
        self.file.flush()


def bank_file(name: str, rank: int) -> str:
    """Name of the file with one rank's rows of a memory bank."""
    return f"bank-{name}-{rank:05d}.pt"


def load_bank_files(folder: Path, name: str) -> list[dict[str, Any]]:
    """All parts of a memory bank in a checkpoint, whichever ranks wrote them."""
    files = sorted(folder.glob(f"bank-{name}-*.pt"))
    return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def find_problem(folder: Path, step: int, load_files: bool = False) -> str:
    """What is wrong with a checkpoint folder of this step; "" if nothing is.

    load_files: also check that torch can load every file (without executing anything in it).
    """
    try:
        files = verify_files(folder, step)
        if load_files:
            for name in files:
                _check_loads(folder / name)
    except MemoryError:
        raise  # The machine's problem, not the checkpoint's.
    except Exception as error:  # A damaged file may make its reader raise anything.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _check_loads(file: Path) -> None:
    value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} contains no dict")


def verify_files(folder: Path, step: int) -> Mapping[str, FileInfo]:
    """Check the size and sha256 of every file in the manifest; returns the manifest's files.

    Raises ValueError or OSError that names the first difference.
    """
    files = _manifest_files(json.loads((folder / MANIFEST).read_text()), step)
    for name, info in files.items():
        size = (folder / name).stat().st_size
        if size != info["size"]:
            raise ValueError(f"{name} has {size} bytes instead of {info['size']}")
        if sha256_of(folder / name) != info["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
    unlisted = {file.name for file in folder.glob("bank-*.pt")} - set(files)
    if unlisted:
        raise ValueError(f"{min(unlisted)} is not in {MANIFEST}")
    return files


def _manifest_files(manifest: Any, step: int) -> Mapping[str, FileInfo]:
    """The files in a manifest of this step. Raises ValueError if it has another shape."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} lists no files")
    if manifest.get("step") != step:
        raise ValueError(f"{MANIFEST} is of step {manifest.get('step')!r}, not of {step}")
    files = manifest["files"]
    if STATE_FILE not in files:
        raise ValueError(f"{MANIFEST} lists no {STATE_FILE}")
    for name, info in files.items():
        if "/" in name or not _is_file_info(info):
            raise ValueError(f"{MANIFEST}: the size and sha256 of {name} are {info!r}")
    return files


def _is_file_info(info: object) -> bool:
    return (
        isinstance(info, dict)
        and isinstance(info.get("size"), int)
        and isinstance(info.get("sha256"), str)
    )
