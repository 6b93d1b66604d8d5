"""Checkpoints on disk after every kind of failed or interrupted save, and what is loaded then."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Never

import pytest
import torch

from dist_scan.engine import checkpoint
from dist_scan.engine.checkpoint import CheckpointError, CheckpointStore, FileInfo
from dist_scan.models.memory_bank import MemoryBank
from dist_scan.storage.artifacts import sha256_of
from dist_scan.world.world import current
from tests.support.fault_checks import flip_a_bit
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the checkpoints."""
    return tmp_path / "checkpoints"


@pytest.fixture
def log() -> list[str]:
    """The lines that the store logged."""
    return []


@pytest.fixture
def store(folder: Path, log: list[str]) -> CheckpointStore:
    """A store that keeps two checkpoints."""
    return CheckpointStore(folder, 2, log.append)


def state(step: int) -> dict[str, Any]:
    return {"method": {"w": torch.full((64,), float(step))}, "train_state": {"step": step}}


def save(store: CheckpointStore, *steps: int) -> None:
    """Save these steps; each must succeed."""
    for step in steps:
        assert store.save(step, state(step), {})


def loaded_step(store: CheckpointStore) -> int | None:
    found = store.load(CPU)
    return None if found is None else found[0]["train_state"]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_loaded_and_old_ones_are_removed(
    folder: Path, store: CheckpointStore
) -> None:
    assert store.load(CPU) is None
    save(store, 1, 2, 3)
    assert loaded_step(store) == 3
    assert names(folder) == ["step-000000002", "step-000000003"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip_a_bit,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "removed": Path.unlink,
    "manifest": lambda file: (file.parent / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_renamed_and_the_one_before_is_loaded(
    folder: Path, store: CheckpointStore, log: list[str], damage: str
) -> None:
    save(store, 1, 2)
    DAMAGES[damage](folder / "step-000000002" / "state.pt")
    assert loaded_step(store) == 1
    assert "bad-step-000000002" in names(folder)
    assert "step-000000002 is damaged" in log[0]


def test_with_only_damaged_ones_it_never_starts_again_at_step_0(
    folder: Path, store: CheckpointStore
) -> None:
    save(store, 1, 2)
    for step in (1, 2):
        (folder / f"step-{step:09d}" / "state.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not starting again at step 0"):
            store.load(CPU)


KILLED_IN_A_SAVE = textwrap.dedent("""
    import os, pathlib, signal, sys, torch
    from dist_scan.engine import checkpoint
    folder, place = pathlib.Path(sys.argv[1]), sys.argv[2]
    def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
    store = checkpoint.CheckpointStore(folder, 2)
    def save(step): store.save(step, {"train_state": {"step": step}, "w": torch.ones(1000)}, {})
    save(1)
    save(2)
    if place == "data": checkpoint.save_file = die
    if place == "manifest": checkpoint.write_json = die
    if place == "rename": checkpoint.os.replace = die
    if place == "prune": checkpoint.shutil.rmtree = die
    save(3)
""")


@pytest.mark.parametrize(
    ("place", "expected"), [("data", 2), ("manifest", 2), ("rename", 2), ("prune", 3)]
)
def test_killed_inside_a_save(
    folder: Path, store: CheckpointStore, place: str, expected: int
) -> None:
    command = [sys.executable, "-c", KILLED_IN_A_SAVE, str(folder), place]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert loaded_step(store) == expected
    save(store, 4)
    assert loaded_step(store) == 4
    assert len(names(folder)) == 2
    assert not list(folder.glob(".tmp*"))


def test_training_continues_after_failed_saves_until_the_third_in_a_row(
    folder: Path, store: CheckpointStore, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(path: Path, value: object) -> Never:
        raise OSError(28, "No space left on device")

    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", disk_full)
        assert not store.save(2, state(2), {})
        assert "No space left" in log[-1]
        assert loaded_step(store) == 1
    save(store, 3)
    assert loaded_step(store) == 3
    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    assert not store.save(4, state(4), {})
    assert not store.save(5, state(5), {})
    with pytest.raises(CheckpointError, match="3 checkpoints in a row"):
        store.save(6, state(6), {})
    assert not list(folder.glob(".tmp*"))


def test_a_disk_that_changes_what_was_written_is_noticed_when_saving(
    folder: Path, store: CheckpointStore, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    save_file = checkpoint.save_file

    def save_and_flip(path: Path, value: object) -> FileInfo:
        info = save_file(path, value)
        flip_a_bit(path)
        return info

    monkeypatch.setattr(checkpoint, "save_file", save_and_flip)
    assert not store.save(2, state(2), {})
    assert "sha256" in log[-1]
    assert names(folder) == ["step-000000001"]
    assert loaded_step(store) == 1
    monkeypatch.undo()
    save(store, 2)
    assert loaded_step(store) == 2


def manifest_of(folder: Path, **changes: object) -> str:
    """A manifest whose size and sha256 are those of the state.pt that is in the folder."""
    file = folder / "state.pt"
    info = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    return json.dumps({"step": 2, "world_size": 1, "files": {"state.pt": info}} | changes)


def with_state(folder: Path, data: bytes, **changes: object) -> str:
    """Overwrite state.pt; returns a manifest that matches it."""
    (folder / "state.pt").write_bytes(data)
    return manifest_of(folder, **changes)


def without_state(folder: Path) -> str:
    (folder / "state.pt").unlink()
    return '{"step": 2, "files": {}}'


def with_file_outside(folder: Path) -> str:
    manifest = json.loads(manifest_of(folder))
    manifest["files"]["../x"] = {"size": 0, "sha256": ""}
    return json.dumps(manifest)


def with_a_list_as_state(folder: Path) -> str:
    torch.save([1], folder / "state.pt")
    return manifest_of(folder)


def with_unlisted_bank(folder: Path) -> str:
    (folder / "bank-x-00000.pt").touch()
    return manifest_of(folder)


WRONG_MANIFESTS: dict[str, Callable[[Path], str | bytes]] = {
    "a list": lambda folder: "[]",
    "file info is a number": lambda folder: '{"step": 2, "files": {"state.pt": 7}}',
    "no files and a spoilt state": lambda folder: with_state(folder, b"junk", files={}),
    "no files and no state": without_state,
    "another step": lambda folder: manifest_of(folder, step=1),
    "step is a string": lambda folder: manifest_of(folder, step="2"),
    "a file outside the folder": with_file_outside,
    "matching sums of junk": lambda folder: with_state(folder, b"junk"),
    "matching sums of an empty file": lambda folder: with_state(folder, b""),
    "matching sums of a list": with_a_list_as_state,
    "not UTF-8": lambda folder: b"\xff\xfe",
    "an unlisted bank": with_unlisted_bank,
}


@pytest.mark.parametrize("case", WRONG_MANIFESTS)
def test_a_checkpoint_that_does_not_fit_its_manifest_is_renamed(
    folder: Path, store: CheckpointStore, log: list[str], case: str
) -> None:
    save(store, 1, 2)
    newest = folder / "step-000000002"
    manifest = WRONG_MANIFESTS[case](newest)
    data = manifest if isinstance(manifest, bytes) else manifest.encode()
    (newest / "manifest.json").write_bytes(data)
    assert loaded_step(store) == 1
    assert names(folder) == ["bad-step-000000002", "step-000000001"]
    assert len(log) == 1
    assert f"{newest} is damaged" in log[0]


def test_a_machine_without_memory_does_not_make_a_checkpoint_damaged(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> Never:
        raise MemoryError()

    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", out_of_memory)
        with pytest.raises(MemoryError):
            store.load(CPU)
    assert loaded_step(store) == 1


def leave_something(folder: Path, what: str) -> None:
    if what == "a file .tmp-":
        (folder / ".tmp-x").write_text("x")
    elif what == "an old one that is a link":
        (folder / "step-000000001").rename(folder.parent / "elsewhere")
        (folder / "step-000000001").symlink_to(folder.parent / "elsewhere")
    elif what == "a link to nothing":
        (folder / "step-000000003").symlink_to("/nonexistent")
    elif what == "a file with the next name":
        (folder / "step-000000003").touch()
    else:
        shutil.copytree(folder / "step-000000001", folder / what)


@pytest.mark.parametrize(
    "what",
    [
        "a file .tmp-",
        "an old one that is a link",
        "a link to nothing",
        "a file with the next name",
        "step-copy",
        "step-9",
        "step-0000000009",
    ],
)
def test_leftovers_in_the_folder_cost_no_save_and_are_not_loaded(
    folder: Path, store: CheckpointStore, log: list[str], what: str
) -> None:
    save(store, 1, 2)
    leave_something(folder, what)
    assert loaded_step(store) == 2
    for step in (3, 4, 5):
        save(store, step)
        assert loaded_step(store) == step
    checkpoints = [n for n in names(folder) if n != what and not n.startswith("bad-")]
    assert checkpoints == ["step-000000004", "step-000000005"]
    assert store.failed_saves == 0
    if what.startswith("step-"):
        assert what in names(folder), "not a checkpoint's name: the folder is somebody else's"
        assert f"ignoring {folder / what}" in log[0]
    if what == "an old one that is a link":
        file = folder.parent / "elsewhere" / "state.pt"
        assert file.is_file(), "the link is removed, not what it points to"


def test_a_copy_under_the_name_of_another_step_is_not_loaded(
    folder: Path, store: CheckpointStore, log: list[str]
) -> None:
    save(store, 1, 2)
    shutil.copytree(folder / "step-000000001", folder / "step-000000009")
    assert loaded_step(store) == 2
    assert "of step 1, not of 9" in log[0]
    assert "bad-step-000000009" in names(folder)


def test_the_name_for_a_damaged_one_may_be_taken(folder: Path, store: CheckpointStore) -> None:
    save(store, 1, 2)
    (folder / "bad-step-000000002").touch()
    (folder / "step-000000002" / "state.pt").write_bytes(b"")
    assert loaded_step(store) == 1
    assert (folder / "bad-step-000000002").is_dir()


def test_saving_a_step_again_replaces_only_a_damaged_one(
    folder: Path, store: CheckpointStore, log: list[str]
) -> None:
    save(store, 1, 2)
    inode = (folder / "step-000000002").stat().st_ino
    save(store, 2)
    assert (folder / "step-000000002").stat().st_ino == inode, "equal by construction: it stays"
    (folder / "step-000000002" / "state.pt").write_bytes(b"")
    save(store, 2)
    assert "saving it again" in log[-1]
    assert loaded_step(store) == 2
    assert "bad-step-000000002" in names(folder)


def test_an_old_one_that_cannot_be_removed_is_no_failed_save(
    store: CheckpointStore, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> Never:
        raise OSError(16, "Device or resource busy")

    save(store, 1, 2)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    save(store, 3, 4, 5, 6)
    assert store.failed_saves == 0
    assert "cannot remove" in log[0]
    assert "step-000000001" in log[0]
    assert loaded_step(store) == 6


class FailingBank(MemoryBank):
    """A memory bank that rank 1 cannot write."""

    def state(self) -> Any:
        if current().rank == 1:
            raise OSError(28, "No space left on device")
        return super().state()


def load_and_save(folder: Path) -> tuple[int | None, bool, list[str]]:
    """(step that was loaded, whether a save succeeded, lines logged) of this rank."""
    log: list[str] = []
    store = CheckpointStore(folder, 2, log.append)
    banks: Mapping[str, MemoryBank] = {"b": FailingBank(8)}
    return loaded_step(store), store.save(3, state(3), banks), log


def test_all_ranks_agree_on_what_is_loaded_and_on_a_failure_of_one_rank(
    folder: Path, store: CheckpointStore
) -> None:
    save(store, 1, 2)
    (folder / "step-000000002" / "manifest.json").write_text("[]")
    ranks = run_ranks(load_and_save, 2, folder)
    assert [step for step, _, _ in ranks] == [1, 1]
    assert [saved for _, saved, _ in ranks] == [False, False]
    log = ranks[0][2]
    assert "lists no files" in log[0]
    assert "could not save" in log[1]
    assert "No space left" in log[1]
    assert names(folder) == ["bad-step-000000002", "step-000000001"]
