"""RELIABILITY.md rows 5 to 8 at the level of files: what is on disk after each way of dying, and what is loaded then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Never

import pytest
import torch

from dist_scan.engine.checkpoint import CheckpointError, CheckpointStore
from dist_scan.storage.artifacts import sha256_of
from dist_scan.world.world import current
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def store(tmp_path: Path, keep=2):
    said = []
    return CheckpointStore(tmp_path / "checkpoints", keep, said.append), said


def state(step):
    return {"method": {"w": torch.full((64,), float(step))}, "position": {"step": step}}


def loaded_step(checkpoints):
    found = checkpoints.load(CPU)
    return None if found is None else found[0]["position"]["step"]


def names(tmp_path: Path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_the_newest_loads_and_old_ones_are_pruned(tmp_path: Path) -> None:
    c, _ = store(tmp_path)
    assert c.load(CPU) is None
    for step in (1, 2, 3):
        assert c.save(step, state(step), {})
    assert loaded_step(c) == 3 and names(tmp_path) == ["step-000000002", "step-000000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_is_named_kept_aside_and_the_one_before_is_used(
    tmp_path: Path, damage
) -> None:
    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    file = tmp_path / "checkpoints" / "step-000000002" / "state.pt"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("{")
    assert loaded_step(c) == 1
    assert "bad-step-000000002" in names(tmp_path) and "step-000000002 is bad" in said[0]


def test_when_every_one_is_bad_it_refuses_and_goes_on_refusing(tmp_path: Path) -> None:
    c, _ = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
        (tmp_path / "checkpoints" / f"step-{step:09d}" / "state.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not starting again at step 0"):
            c.load(CPU)


SAVER = textwrap.dedent("""
    import os, signal, sys, torch
    from dist_scan.engine import checkpoint
    from dist_scan.engine.checkpoint import Checkpoints
    folder, where = sys.argv[1], sys.argv[2]
    def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
    c = Checkpoints(folder, 2)
    make = lambda s: {"position": {"step": s}, "w": torch.ones(1000)}
    c.save(1, make(1), {}); c.save(2, make(2), {})
    if where == "data": checkpoint._save_file = die
    if where == "manifest": checkpoint.write_json = die
    if where == "rename": checkpoint.os.replace = die
    if where == "prune": checkpoint.shutil.rmtree = die
    c.save(3, make(3), {})
""")


@pytest.mark.parametrize(
    "where, expected", [("data", 2), ("manifest", 2), ("rename", 2), ("prune", 3)]
)
def test_killed_inside_a_save(tmp_path: Path, where, expected) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(tmp_path / "checkpoints"), where], timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    c, _ = store(tmp_path)
    assert loaded_step(c) == expected
    assert c.save(4, state(4), {}) and loaded_step(c) == 4
    assert not [n for n in names(tmp_path) if n.startswith(".tmp")] and len(names(tmp_path)) == 2


def test_a_save_that_fails_lets_training_go_on_until_the_third_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.engine import checkpoint

    c, said = store(tmp_path)
    c.save(1, state(1), {})
    real = checkpoint._save_file

    def full(path, value) -> Never:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_file", full)
    assert c.save(2, state(2), {}) is False and "No space left" in said[-1] and loaded_step(c) == 1
    monkeypatch.setattr(checkpoint, "_save_file", real)
    assert c.save(3, state(3), {}) and loaded_step(c) == 3
    monkeypatch.setattr(checkpoint, "_save_file", full)
    assert not c.save(4, state(4), {}) and not c.save(5, state(5), {})
    with pytest.raises(CheckpointError, match="3 checkpoints in a row"):
        c.save(6, state(6), {})
    assert not [n for n in os.listdir(tmp_path / "checkpoints") if n.startswith(".tmp")]


def test_a_disk_that_changes_what_was_written_is_noticed_when_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.engine import checkpoint

    c, said = store(tmp_path)
    assert c.save(1, state(1), {})
    plain = checkpoint._save_file

    def flipping(path, value):
        facts = plain(path, value)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return facts

    monkeypatch.setattr(checkpoint, "_save_file", flipping)
    assert not c.save(2, state(2), {})
    assert "sha256" in said[-1] and names(tmp_path) == ["step-000000001"] and loaded_step(c) == 1
    monkeypatch.undo()
    assert c.save(2, state(2), {}) and loaded_step(c) == 2


def with_sums(folder, data: bytes | None, **facts) -> str:
    """A manifest that is right about what lies in state.pt."""
    file = folder / "state.pt"
    if data is not None:
        file.write_bytes(data)
    return json.dumps(
        {
            "step": 2,
            "world_size": 1,
            "files": {"state.pt": {"size": file.stat().st_size, "sha256": sha256_of(file)}},
        }
        | facts
    )


WRONG = {
    "a list": lambda folder: "[]",
    "facts are a number": lambda folder: '{"step": 2, "files": {"state.pt": 7}}',
    "no files, a spoilt state": lambda folder: with_sums(folder, b"junk", files={}),
    "no files, no state": lambda folder: (
        (folder / "state.pt").unlink() or '{"step": 2, "files": {}}'
    ),
    "another step": lambda folder: with_sums(folder, None, step=1),
    "a step that is none": lambda folder: with_sums(folder, None, step="2"),
    "files outside": lambda folder: with_sums(
        folder,
        None,
        files=json.loads(with_sums(folder, None))["files"] | {"../x": {"size": 0, "sha256": ""}},
    ),
    "right sums of junk": lambda folder: with_sums(folder, b"junk"),
    "right sums of nothing": lambda folder: with_sums(folder, b""),
    "right sums of a list": lambda folder: (
        torch.save([1], folder / "state.pt") or with_sums(folder, None)
    ),
    "no text": lambda folder: b"\xff\xfe",
    "a bank that is not listed": lambda folder: (
        (folder / "bank-x-00000.pt").touch() or with_sums(folder, None)
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_checkpoint_that_is_wrong_under_right_json_is_set_aside_too(tmp_path: Path, how) -> None:
    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    folder = tmp_path / "checkpoints" / "step-000000002"
    text = WRONG[how](folder)
    (folder / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert loaded_step(c) == 1
    assert (
        names(tmp_path) == ["bad-step-000000002", "step-000000001"]
        and f"{folder} is bad" in said[0]
        and len(said) == 1
    ), said


def test_a_machine_without_memory_spoils_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, _ = store(tmp_path)
    c.save(1, state(1), {})

    def none_left(*given, **more) -> Never:
        raise MemoryError()

    monkeypatch.setattr(torch, "load", none_left)
    with pytest.raises(MemoryError):
        c.load(CPU)
    monkeypatch.undo()
    assert loaded_step(c) == 1


def leave(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "checkpoints"
    if what == "a file .tmp-":
        (folder / ".tmp-x").write_text("x")
    elif what == "an old one elsewhere":
        (folder / "step-000000001").rename(tmp_path / "elsewhere")
        (folder / "step-000000001").symlink_to(tmp_path / "elsewhere")
    elif what == "a link to nothing":
        (folder / "step-000000003").symlink_to("/nonexistent")
    elif what == "a file of the next name":
        (folder / "step-000000003").touch()
    else:
        shutil.copytree(folder / "step-000000001", folder / what)


@pytest.mark.parametrize(
    "what",
    [
        "a file .tmp-",
        "an old one elsewhere",
        "a link to nothing",
        "a file of the next name",
        "step-copy",
        "step-9",
        "step-0000000009",
    ],
)
def test_leftovers_in_the_folder_cost_no_save_and_are_not_loaded(tmp_path: Path, what) -> None:
    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    leave(tmp_path, what)
    assert loaded_step(c) == 2
    for step in (3, 4, 5):
        assert c.save(step, state(step), {}) and loaded_step(c) == step, said
    mine = [n for n in names(tmp_path) if n != what and not n.startswith("bad-")]
    assert mine == ["step-000000004", "step-000000005"] and c.failures == 0
    if what.startswith("step-"):
        assert what in names(tmp_path) and f"{what} is left alone" in said[0], "somebody's own"
    if what == "an old one elsewhere":
        assert (tmp_path / "elsewhere" / "state.pt").is_file(), (
            "the link is ours, not what it points to"
        )


def test_a_copy_under_the_name_of_another_step_is_not_taken_for_it(tmp_path: Path) -> None:
    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    shutil.copytree(
        tmp_path / "checkpoints" / "step-000000001", tmp_path / "checkpoints" / "step-000000009"
    )
    assert (
        loaded_step(c) == 2
        and "of step 1, not of 9" in said[0]
        and "bad-step-000000009" in names(tmp_path)
    )


def test_a_name_for_the_bad_one_that_is_taken(tmp_path: Path) -> None:
    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    (tmp_path / "checkpoints" / "bad-step-000000002").touch()
    (tmp_path / "checkpoints" / "step-000000002" / "state.pt").write_bytes(b"")
    assert loaded_step(c) == 1 and (tmp_path / "checkpoints" / "bad-step-000000002").is_dir()


def test_the_same_step_saved_again_replaces_one_that_was_damaged(tmp_path: Path) -> None:
    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    before = os.stat(tmp_path / "checkpoints" / "step-000000002").st_ino
    assert (
        c.save(2, state(2), {})
        and os.stat(tmp_path / "checkpoints" / "step-000000002").st_ino == before
    ), "equal by construction"
    (tmp_path / "checkpoints" / "step-000000002" / "state.pt").write_bytes(b"")
    assert c.save(2, state(2), {}) and "saved again" in said[-1]
    assert loaded_step(c) == 2 and "bad-step-000000002" in names(tmp_path)


def test_an_old_one_that_cannot_be_removed_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_scan.engine import checkpoint

    c, said = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})

    def busy(path) -> Never:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    for step in (3, 4, 5, 6):
        assert c.save(step, state(step), {}), said
    assert (
        c.failures == 0
        and "step-000000001 is not wanted any more and cannot be removed" in said[0]
        and loaded_step(c) == 6
    )


class Spoilt:
    """A bank that rank 1 cannot write."""

    def state(self):
        if current().rank == 1:
            raise OSError(28, "No space left on device")
        return {"rows": torch.zeros(1)}


def save_and_load(folder):
    said = []
    c = CheckpointStore(folder, 2, said.append)
    return loaded_step(c), c.save(3, state(3), {"b": Spoilt()}), said


def test_two_ranks_agree_on_the_one_before_and_rank_0_says_what_failed_on_rank_1(
    tmp_path: Path,
) -> None:
    c, _ = store(tmp_path)
    for step in (1, 2):
        c.save(step, state(step), {})
    (tmp_path / "checkpoints" / "step-000000002" / "manifest.json").write_text("[]")
    (first, first_saved, said), (second, second_saved, _) = run_ranks(
        save_and_load, 2, tmp_path / "checkpoints"
    )
    assert first == second == 1 and not first_saved and not second_saved
    assert (
        "lists no files" in said[0] and "could not save" in said[1] and "No space left" in said[1]
    ), said
    assert names(tmp_path) == ["bad-step-000000002", "step-000000001"]
