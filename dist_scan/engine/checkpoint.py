"""Checkpoints that can be trusted: written aside, hashed, renamed in; verified before they are used.

A folder `step-00000123/` holds state.pt (method, optimizer, position; rank 0), bank files (a file per bank and rank; RELIABILITY.md)
and manifest.json with every file's sha256. One flipped bit loads silently through torch.load: the hash catches it.
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
from typing import Any, BinaryIO

import torch

from dist_scan.engine.stop import NonRetryableError
from dist_scan.monitoring.watchdog import watched
from dist_scan.storage.artifacts import MANIFEST, sha256_of
from dist_scan.storage.atomic import fsync_dir, write_json
from dist_scan.world.collectives import agree, barrier, broadcast_object, gather_objects
from dist_scan.world.world import current

Say = Callable[[str], None]
FATAL_FAILURES = 3  # saves that may fail in a row before training is pointless
NAME = re.compile(
    r"step-(\d{9}|[1-9]\d{9,})(-begun)?"
)  # anything else in the folder is somebody's own


class CheckpointError(NonRetryableError):
    """No checkpoint can be used, or none can be written: said once, with what to do."""


class CheckpointStore:
    """The checkpoints of one stage. Every method is collective."""

    def __init__(self, folder: Path, keep: int, say: Say = print) -> None:
        self.folder, self.keep, self.say = Path(folder), keep, say
        self.failures = 0
        self.save_s = 0.0

    @watched("save")
    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        banks: Mapping[str, Any],
        after_moment: bool = False,
    ) -> bool:
        """Write one. A failure is said and training goes on; the third in a row raises CheckpointError on all ranks.

        after_moment: the next epoch has begun; at the same step there may be one from the end of the epoch before, which is older.
        """
        began, error = time.monotonic(), None
        name = f"step-{step:09d}{'-begun' if after_moment else ''}"
        temporary = self.folder / f".tmp-{name}"
        if current().rank == 0:
            error = _try(lambda: self._prepare(temporary))
        if not agree(error is not None):
            mine: dict[str, dict[str, Any]] = {}
            error = _try(lambda: mine.update(self._write(temporary, state, banks)))
            if not agree(error is not None):
                files = {
                    file: facts for part in gather_objects(mine) for file, facts in part.items()
                }
                if current().rank == 0:
                    error = _try(lambda: self._commit(temporary, name, step, files))
        if agree(error is not None):
            self._failed(error, temporary)
            return False
        self.failures, self.save_s = 0, time.monotonic() - began
        return True

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".tmp-*"):
            self._remove(stale)
        temporary.mkdir()

    def _write(
        self, temporary: Path, state: Mapping[str, Any], banks: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """This rank's files; returns their sizes and sha256 by name."""
        files = {}
        if current().rank == 0:
            files["state.pt"] = _save_file(temporary / "state.pt", dict(state))
        for name, bank in banks.items():
            file = f"bank-{name}-{current().rank:05d}.pt"
            files[file] = _save_file(temporary / file, bank.state())
        return files

    def _commit(
        self, temporary: Path, name: str, step: int, files: Mapping[str, Mapping[str, Any]]
    ) -> None:
        write_json(
            temporary / MANIFEST, {"step": step, "world_size": current().world_size, "files": files}
        )
        _verify(
            temporary, step
        )  # read back against what was meant: before it gets its name, and before an older one goes
        final = self.folder / name
        if os.path.lexists(
            final
        ):  # the same step saved again (stopped right after a save): equal by construction, unless it was damaged since
            problem = _problem(final)
            if not problem:
                shutil.rmtree(temporary)
                return
            self._set_aside(final, problem, "saved again")
        os.replace(temporary, final)
        fsync_dir(self.folder)
        for old in self._found()[self.keep :]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        """Drop what is not wanted any more; what cannot be removed costs room and no checkpoint, and is said."""
        try:
            _unlink(path)
        except OSError as error:
            self.say(
                f"checkpoint: {path} is not wanted any more and cannot be removed ({error}); remove it by hand"
            )

    def _set_aside(self, path: Path, problem: str, then: str) -> str:
        """Rename to bad-*; returns the name that it then has."""
        aside = path.with_name(f"bad-{path.name}")
        self.say(f"checkpoint: {path} is bad ({problem}); kept aside as {aside.name}, {then}")
        try:
            _unlink(aside)
            path.rename(aside)
        except OSError as error:
            self.say(
                f"checkpoint: {path} cannot be renamed to {aside.name} ({error}); it is passed over"
            )
            return path.name
        return aside.name

    def _failed(self, error: Exception | None, temporary: Path) -> None:
        if current().rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failures += 1
        errors = [
            text
            for text in gather_objects(None if error is None else str(error))
            if text is not None
        ]  # rank 0 alone speaks, whosever it is
        if errors:
            self.say(
                f"checkpoint: could not save in {self.folder}: {errors[0]}; training goes on, older ones are intact"
            )
        if self.failures >= FATAL_FAILURES:
            raise CheckpointError(
                f"{self.failures} checkpoints in a row could not be saved in {self.folder}; "
                "make room there (or make it writable) and start the same command again"
            )

    def _found(self) -> list[Path]:
        """Checkpoints by name, the newest first."""
        named = [(NAME.fullmatch(p.name), p) for p in self.folder.glob("step-*") if p.is_dir()]
        return [p for _, p in sorted(((int(m[1]), bool(m[2])), p) for m, p in named if m)][::-1]

    @watched("load a checkpoint")
    def load(self, device: torch.device) -> tuple[dict[str, Any], Path] | None:
        """(state, folder) of the newest that verifies, or None when there was never one.

        A bad one is renamed bad-* and named; when some exist and none verifies, CheckpointError: never again at step 0.
        """
        chosen, problem = None, ""
        if current().rank == 0:
            chosen, problem = self._choose()
        chosen, problem = broadcast_object((chosen, problem))
        if problem:
            raise CheckpointError(problem)
        if chosen is None:
            return None
        state = torch.load(chosen / "state.pt", map_location=device, weights_only=True)
        barrier()
        return state, chosen

    def _choose(self) -> tuple[Path | None, str]:
        bad = [p.name for p in self.folder.glob("bad-*")]
        for other in self.folder.glob("step-*"):
            if not NAME.fullmatch(other.name):
                self.say(
                    f"checkpoint: {other} is left alone: that is not the name of a checkpoint (step-000000120, step-000000120-begun)"
                )
        for path in self._found():
            problem = _problem(path, content=True)
            if not problem:
                return path, ""
            bad.append(self._set_aside(path, problem, "trying the one before"))
        if bad:
            return None, (
                f"no checkpoint in {self.folder} can be used (bad: {', '.join(sorted(bad))}); not starting again at step 0. "
                "Restore one, or remove the folder to train this stage from its beginning"
            )
        return None, ""


def load_bank_files(folder: Path, name: str) -> list[dict]:
    """All parts of a bank in a checkpoint, whichever ranks wrote them."""
    return [
        torch.load(f, map_location="cpu", weights_only=True)
        for f in sorted(folder.glob(f"bank-{name}-*.pt"))
    ]


def _try(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except (OSError, RuntimeError, ValueError, CheckpointError) as error:
        return (
            error.__context__ if isinstance(error.__context__, OSError) else error
        )  # torch.save hides a full disk behind its own error
    return None


class _Hashing:
    """A file to write to, hashed on the way: the sha256 is of what was meant, and reading back then tells what the disk made of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _save_file(path: Path, value: Any) -> dict[str, Any]:
    with open(path, "wb") as f:
        hashing = _Hashing(f)
        torch.save(value, hashing)
        f.flush()
        os.fsync(f.fileno())
    return {"sha256": hashing.digest.hexdigest(), "size": hashing.size}


def _unlink(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _problem(path: Path, content: bool = False) -> str:
    """What is wrong with a checkpoint, or "". content: also look whether its files can be read as what they are (nothing in them is executed)."""
    try:
        files = _verify(path, int(NAME.fullmatch(path.name)[1]))
        for name in files if content else ():
            if not isinstance(
                torch.load(path / name, map_location="cpu", weights_only=True, mmap=True), dict
            ):
                raise ValueError(f"{name} holds no dict")
    except MemoryError:
        raise  # the machine's, not the checkpoint's
    except Exception as error:  # whatever a file of somebody else's makes its reader raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _verify(path: Path, step: int) -> Mapping[str, Any]:
    """Hold a checkpoint of this step against its manifest; returns the files' facts. Raises ValueError or OSError that names what is wrong."""
    manifest = json.loads((path / MANIFEST).read_text())
    files = _files(manifest, step)
    for name, facts in files.items():
        size = (path / name).stat().st_size
        if size != facts["size"]:
            raise ValueError(f"{name} has {size} bytes instead of {facts['size']}")
        if sha256_of(path / name) != facts["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
    unlisted = {p.name for p in path.glob("bank-*.pt")} - set(files)
    if unlisted:
        raise ValueError(f"{min(unlisted)} is not in {MANIFEST}")
    return files


def _files(manifest: Any, step: int) -> Mapping[str, Any]:
    """The facts of the files in a manifest of this step. Raises ValueError when it does not have that shape."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} lists no files")
    if manifest.get("step") != step:
        raise ValueError(f"{MANIFEST} is of step {manifest.get('step')!r}, not of {step}")
    files = manifest["files"]
    if "state.pt" not in files:
        raise ValueError(f"{MANIFEST} lists no state.pt")
    for name, facts in files.items():
        if (
            not isinstance(facts, dict)
            or not isinstance(facts.get("size"), int)
            or not isinstance(facts.get("sha256"), str)
            or "/" in name
        ):
            raise ValueError(f"{MANIFEST}: the size and sha256 of {name} are {facts!r}")
    return files
