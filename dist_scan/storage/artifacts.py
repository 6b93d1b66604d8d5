"""What stages hand to each other: folders RUN/stages/<name>/<fingerprint>/ that are done when, and only when, their
manifest.json is there. Everything is written elsewhere, flushed, and renamed in; nothing is unlinked first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
WORK = "work"  # checkpoints and other leftovers of an unfinished stage, inside its folder


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name a meaning: sha256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that readers see the old one or the new one, never a part: temporary, fsync, rename."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(
                error.errno,
                f"{error.strerror} (make room there and start the same command again: what is finished is kept)",
                str(path),
            ) from None
        raise
    fsync_dir(path.parent)


def ends_torn(file: BinaryIO) -> bool:
    """Whether the last line of a file that is open for reading has no end: a killed writer, or a full disk, may leave half a line. At its end then."""
    return (
        file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
    )


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to a file without a buffer. A disk that fills up takes a part first; the rest then gets the error."""
    while data:
        data = data[file.write(data) :]


def write_text(path: Path, text: str) -> None:
    """write_atomic for text (UTF-8)."""
    write_atomic(path, lambda f: f.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """write_atomic for JSON."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder and its manifest (files, config, inputs, seconds...)."""

    path: Path
    manifest: Mapping[str, Any]


class ArtifactStore:
    """The stages' folders of one run. Only rank 0 calls it."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def folder(self, name: str, mark: str) -> Path:
        """Where a stage of this fingerprint works and, once done, lies."""
        return self.root / name / mark

    def find(self, name: str, mark: str) -> Artifact | None:
        """The finished artefact, or None. Raises ValueError when it is marked done but its manifest is torn, or a file is missing or has another size."""
        path = self.folder(name, mark)
        if not (path / MANIFEST).is_file():
            return None
        manifest = _read_manifest(path / MANIFEST)
        for file, facts in manifest["files"].items():
            size = (path / file).stat().st_size if (path / file).is_file() else None
            if size != facts["size"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"artefact {path}: {file} {found}, the manifest says {facts['size']}; "
                    f"put the file back, or remove the folder and start again (the stage is then redone)"
                )
        return Artifact(path, manifest)

    def verify(self, artefact: Artifact) -> None:
        """Hold every file against its sha256; a .beton has sums of its own, for each image. Raises ValueError naming the file."""
        for file, facts in artefact.manifest["files"].items():
            if not file.endswith(".beton") and sha256_of(artefact.path / file) != facts["sha256"]:
                raise ValueError(
                    f"artefact {artefact.path}: {file} is not what was written (its sha256 differs): the disk or a hand has changed it; "
                    "put the file back, or remove the folder and start again (the stage is then redone)"
                )

    def clean(self, name: str, mark: str) -> None:
        """Remove what a killed process had not finished writing."""
        for left in self.folder(name, mark).rglob(".tmp-*"):
            if left.is_file():
                left.unlink(missing_ok=True)

    def started(self, name: str, mark: str) -> bool:
        """Whether an unfinished attempt left something to go on from."""
        path = self.folder(name, mark)
        return path.is_dir() and any(path.iterdir())

    def publish(self, name: str, mark: str, facts: Mapping[str, Any]) -> Artifact:
        """Mark a stage's folder as done: drop its work folder, list sizes and sha256, rename the manifest in last."""
        path = self.folder(name, mark)
        if (path / WORK).exists():
            shutil.rmtree(path / WORK)
        files = {
            str(f.relative_to(path)): {"size": f.stat().st_size, "sha256": sha256_of(f)}
            for f in sorted(path.rglob("*"))
            if f.is_file() and not f.name.startswith(".tmp-")
        }
        manifest = {"name": name, "fingerprint": mark, **facts, "files": files}
        write_json(path / MANIFEST, manifest)
        return Artifact(path, manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    """A stage's manifest. Raises ValueError naming the file when it is no JSON, or does not list files with their size and sha256."""
    try:
        manifest = json.loads(file.read_text())
        for facts in manifest["files"].values():
            facts["size"], facts["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"artefact {file.parent}: {file} is not what was written ({type(error).__name__}: {error}); put the file back, "
            "or remove the folder and start again (the stage is then redone)"
        ) from None
    return manifest
