"""RELIABILITY.md rows 5 to 8 at the level of files: what is on disk after each way of dying, and what is loaded then."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from dist_scan.engine.checkpoint import CheckpointError, Checkpoints

CPU = torch.device("cpu")


def store(tmp_path, keep=2):
    said = []
    return Checkpoints(tmp_path / "checkpoints", keep, said.append), said


def state(step):
    return {"method": {"w": torch.full((64,), float(step))}, "position": {"step": step}}


def loaded_step(checkpoints):
    found = checkpoints.load(CPU)
    return None if found is None else found[0]["position"]["step"]


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_the_newest_loads_and_old_ones_are_pruned(tmp_path):
    c, _ = store(tmp_path)
    assert c.load(CPU) is None
    for step in (1, 2, 3):
        assert c.save(step, state(step), {})
    assert loaded_step(c) == 3 and names(tmp_path) == ["step-000000002", "step-000000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_is_named_kept_aside_and_the_one_before_is_used(tmp_path, damage):
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


def test_when_every_one_is_bad_it_refuses_and_goes_on_refusing(tmp_path):
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


@pytest.mark.parametrize("where, expected", [("data", 2), ("manifest", 2), ("rename", 2), ("prune", 3)])
def test_killed_inside_a_save(tmp_path, where, expected):
    done = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path / "checkpoints"), where], timeout=120)
    assert done.returncode == -signal.SIGKILL
    c, _ = store(tmp_path)
    assert loaded_step(c) == expected
    assert c.save(4, state(4), {}) and loaded_step(c) == 4
    assert not [n for n in names(tmp_path) if n.startswith(".tmp")] and len(names(tmp_path)) == 2


def test_a_save_that_fails_lets_training_go_on_until_the_third_in_a_row(tmp_path, monkeypatch):
    from dist_scan.engine import checkpoint

    c, said = store(tmp_path)
    c.save(1, state(1), {})
    real = checkpoint._save_file

    def full(path, value):
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


def test_a_disk_that_changes_what_was_written_is_noticed_when_saving(tmp_path, monkeypatch):
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
