"""Verified checkpoints: launch/recovery.py says how a run uses them when a rank dies.

A checkpoint is a folder ``step-000000123`` with

- ``state.pt``: state dicts of method and optimizer, and the position (`TrainState`), by rank 0;
- ``bank-NAME-RANK.pt``: each rank's rows of a memory bank;
- ``manifest.json``: step, world size, and the size and sha256 of every file.

A save writes a temporary folder, reads it back against the intended sha256, and renames it. So a
rank may be killed at any point of a save: the older checkpoints stay valid. A load takes the newest
checkpoint that verifies; damaged ones are renamed to bad-*. torch.load does not notice a flipped
bit; the sha256 in the manifest does.

After a stop signal (engine/stop.py) all ranks agree at the end of a step to save a checkpoint too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, TypedDict, TypeVar, cast

import torch

from dist_scan.engine.stop import NonRetryableError
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.monitoring.watchdog import watched
from dist_scan.storage.artifacts import MANIFEST, sha256_of
from dist_scan.storage.atomic import error_reason, fsync_dir, write_json
from dist_scan.world.collectives import barrier, broadcast_object, gather_objects, on_every_rank
from dist_scan.world.world import current

T = TypeVar("T")
STATE_FILE = "state.pt"
MAX_FAILED_SAVES = 3
"""Number of failed saves in a row after which the training ends."""
CHECKPOINT_NAME = re.compile(r"step-(\d{9}|[1-9]\d{9,})(-begun)?")


class CheckpointError(NonRetryableError):
    """No checkpoint can be loaded, or none can be saved."""


class FileInfo(TypedDict):
    """Size in bytes and sha256 that a file is intended to have."""

    sha256: str
    size: int


class CheckpointStore:
    """The checkpoints of one stage in a folder; the newest `keep` remain. Methods are collective.

    log: called on every rank with lines for the user; only rank 0 should print them.
    """

    def __init__(self, folder: Path, keep: int, log: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.keep = keep
        self.log = log
        self.failed_saves = 0
        self.save_s = 0.0
        """Duration of the last successful save."""

    @watched("save")
    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        banks: Mapping[str, MemoryBank],
        epoch_begun: bool = False,
    ) -> bool:
        """Write a checkpoint; returns whether it succeeded.

        epoch_begun: `begin_epoch` of the next epoch has run. Such a checkpoint counts as newer than
        the one written at the same step at the end of the previous epoch.
        A failure is logged and training may continue. After MAX_FAILED_SAVES failures in a row
        CheckpointError is raised on all ranks.
        """
        started = time.monotonic()
        name = f"step-{step:09d}{'-begun' if epoch_begun else ''}"
        temporary = self.folder / f".tmp-{name}"
        is_rank_0 = current().rank == 0
        try:
            # 1. An empty temporary folder.
            _save_on_every_rank(lambda: self._prepare(temporary) if is_rank_0 else None)
            # 2. Every rank writes its files.
            parts = gather_objects(
                _save_on_every_rank(lambda: self._write(temporary, state, banks))
            )
            # 3. Manifest, verification, rename; then the oldest checkpoints are removed.
            files = {file: info for part in parts for file, info in part.items()}
            _save_on_every_rank(
                lambda: self._commit(temporary, name, step, files) if is_rank_0 else None
            )
        except ValueError as error:
            self._count_failure(str(error), temporary)
            return False
        self.failed_saves = 0
        self.save_s = time.monotonic() - started
        return True

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".tmp-*"):
            self._remove(stale)
        temporary.mkdir()

    def _write(
        self, temporary: Path, state: Mapping[str, Any], banks: Mapping[str, MemoryBank]
    ) -> dict[str, FileInfo]:
        """Write this rank's files; returns their sizes and sha256 by name."""
        files = {}
        if current().rank == 0:
            files[STATE_FILE] = save_file(temporary / STATE_FILE, dict(state))
        for name, bank in banks.items():
            file = bank_file(name, current().rank)
            files[file] = save_file(temporary / file, bank.state())
        return files

    def _commit(self, temporary: Path, name: str, step: int, files: Mapping[str, FileInfo]) -> None:
        manifest = {"step": step, "world_size": current().world_size, "files": files}
        write_json(temporary / MANIFEST, manifest)
        verify_files(temporary, step)
        final = self.folder / name
        # A run that is stopped just after a save writes the same step again, with equal content.
        if os.path.lexists(final):
            problem = find_problem(final, step)
            if not problem:
                shutil.rmtree(temporary)
                return
            self._set_aside(final, problem, "saving it again")
        os.replace(temporary, final)
        fsync_dir(self.folder)
        for _, old in self._newest_first()[self.keep :]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        """Remove a file or folder. A failure is only logged, as it harms no checkpoint."""
        try:
            _unlink(path)
        except OSError as error:
            reason = error_reason(error)
            self.log(f"checkpoint: cannot remove {path}, which is not needed any more ({reason})")

    def _set_aside(self, path: Path, problem: str, then: str) -> str:
        """Rename a damaged checkpoint to bad-*; returns its new name."""
        aside = path.with_name(f"bad-{path.name}")
        self.log(f"checkpoint: {path} is damaged ({problem}); renamed to {aside.name}, {then}")
        try:
            _unlink(aside)
            path.rename(aside)
        except OSError as error:
            reason = error_reason(error)
            self.log(f"checkpoint: cannot rename {path} to {aside.name} ({reason}); ignoring it")
            return path.name
        return aside.name

    def _count_failure(self, error: str, temporary: Path) -> None:
        if current().rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failed_saves += 1
        self.log(
            f"checkpoint: could not save in {self.folder}: {error}; "
            "training continues, earlier checkpoints are intact"
        )
        if self.failed_saves >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"{self.failed_saves} checkpoints in a row could not be saved in {self.folder}; "
                "free some space there (or make it writable) and start the same command again"
            )

    def _newest_first(self) -> list[tuple[int, Path]]:
        """(step, folder) of every folder whose name is that of a checkpoint."""
        found = []
        for path in self.folder.glob("step-*"):
            match = CHECKPOINT_NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), bool(match[2]), path))
        return [(step, path) for step, _, path in sorted(found, reverse=True)]

    @watched("load a checkpoint")
    def load(self, device: torch.device) -> tuple[dict[str, Any], Path] | None:
        """(state, folder) of the newest checkpoint that verifies; None if there never was one.

        Damaged checkpoints are renamed to bad-*. If there are only damaged ones, CheckpointError
        is raised: a training that has begun never starts at step 0 again by itself.
        """
        newest, problem = broadcast_object(
            self._find_newest() if current().rank == 0 else (None, "")
        )
        if problem:
            raise CheckpointError(problem)
        if newest is None:
            return None
        state = torch.load(newest / STATE_FILE, map_location=device, weights_only=True)
        barrier()
        return state, newest

    def _find_newest(self) -> tuple[Path | None, str]:
        """(newest valid checkpoint or None, error message or "")."""
        damaged = [path.name for path in self.folder.glob("bad-*")]
        for path in self.folder.glob("step-*"):
            if not CHECKPOINT_NAME.fullmatch(path.name):
                self.log(
                    f"checkpoint: ignoring {path}: the name of a checkpoint is step-NNNNNNNNN "
                    "or step-NNNNNNNNN-begun"
                )
        for step, path in self._newest_first():
            problem = find_problem(path, step, load_files=True)
            if not problem:
                return path, ""
            damaged.append(self._set_aside(path, problem, "trying the one before"))
        if damaged:
            return None, (
                f"no checkpoint in {self.folder} can be loaded (damaged: "
                f"{', '.join(sorted(damaged))}); not starting again at step 0. Restore one, or "
                "remove the folder to train this stage from its beginning"
            )
        return None, ""


def _save_on_every_rank(action: Callable[[], T]) -> T:
    """action() of this rank, a part of a save. Collective.

    Raises ValueError on all ranks if it raises OSError or RuntimeError on any.
    """

    def run() -> T:
        try:
            return action()
        except (OSError, RuntimeError) as error:
            # torch.save raises a RuntimeError of its own while it handles a disk-full error.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise ValueError(str(cause)) from error

    return on_every_rank(run)


def _unlink(path: Path) -> None:
    """Remove a file, a folder or a link (not what it points to), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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

    The hash is of the intended bytes: reading the file back shows whether the disk stored them.
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
                value = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
                if not isinstance(value, dict):
                    raise ValueError(f"{name} contains no dict")
    except MemoryError:
        raise  # Too little memory does not mean that the checkpoint is damaged.
    except Exception as error:  # A damaged file may raise any error in its reader.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


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
