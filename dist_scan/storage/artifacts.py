"""Stage artifacts: folders RUN/stages/<name>/<fingerprint>/, complete once they hold a manifest.

Files are written under a temporary name, flushed and renamed; the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_scan.storage.atomic import write_json

MANIFEST = "manifest.json"
STAGES = "stages.json"
"""In the run folder: fingerprint of each stage's current artifact, by the name of the stage."""
WORK = "work"
"""Subfolder for checkpoints and other temporary state of an unfinished stage."""
REMEDY = "restore the file, or remove the folder and start again (the stage is then recomputed)"


def fingerprint(*parts: Any) -> str:
    """First 16 hex digits of the sha256 of ``parts`` as canonical JSON.

    Equal configuration and inputs have equal fingerprints, so a stage is cached by it.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """sha256 of a file as hex digits, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """Folder of a finished stage and its manifest (files, configuration, inputs, seconds)."""

    path: Path
    manifest: Mapping[str, Any]


class ArtifactStore:
    """The stage folders of one run. Used by rank 0 only."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, fingerprint: str) -> Path:
        """Folder in which a stage with this fingerprint works and publishes its files."""
        return self.root / name / fingerprint

    def find(self, name: str, fingerprint: str) -> Artifact | None:
        """The finished artifact, or None.

        Raises ValueError if the manifest is not readable, or a file that it lists is missing or
        has another size.
        """
        path = self.folder(name, fingerprint)
        if not (path / MANIFEST).is_file():
            return None
        manifest = _read_manifest(path / MANIFEST)
        for file, entry in manifest["files"].items():
            size = (path / file).stat().st_size if (path / file).is_file() else None
            if size != entry["size"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"artifact {path}: {file} {found}, its manifest lists {entry['size']} bytes; "
                    f"{REMEDY}"
                )
        return Artifact(path, manifest)

    def verify(self, artifact: Artifact) -> None:
        """Compare the sha256 of every file with the manifest.

        Skips .beton files, which have a checksum per image. Raises ValueError naming the file.
        """
        for file, entry in artifact.manifest["files"].items():
            if file.endswith(".beton"):
                continue
            if sha256_of(artifact.path / file) != entry["sha256"]:
                raise ValueError(
                    f"artifact {artifact.path}: {file} has changed since it was written "
                    f"(its sha256 differs from the manifest); {REMEDY}"
                )

    def remove_temporary_files(self, name: str, fingerprint: str) -> None:
        """Remove unfinished files that a killed process has left."""
        for path in self.folder(name, fingerprint).rglob(".tmp-*"):
            if path.is_file():
                path.unlink(missing_ok=True)

    def is_started(self, name: str, fingerprint: str) -> bool:
        """Whether an earlier attempt left files to resume from."""
        return any(self.folder(name, fingerprint).glob("*"))

    def publish(self, name: str, fingerprint: str, metadata: Mapping[str, Any]) -> Artifact:
        """Mark a stage as finished: remove its work folder, then write the manifest.

        The manifest holds ``metadata``, and size and sha256 of every file.
        """
        path = self.folder(name, fingerprint)
        if (path / WORK).exists():
            shutil.rmtree(path / WORK)
        files = {
            str(file.relative_to(path)): {"size": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(path.rglob("*"))
            if file.is_file() and not file.name.startswith(".tmp-")
        }
        manifest = {"name": name, "fingerprint": fingerprint, **metadata, "files": files}
        write_json(path / MANIFEST, manifest)
        return Artifact(path, manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    """A stage's manifest.

    Raises ValueError if it is not JSON, or does not list files with their size and sha256.
    """
    try:
        manifest = json.loads(file.read_text())
        for entry in manifest["files"].values():
            entry["size"], entry["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"artifact {file.parent}: {file.name} is not a valid manifest "
            f"({type(error).__name__}: {error}); {REMEDY}"
        ) from None
    return manifest
