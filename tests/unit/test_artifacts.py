"""Done means: the manifest is there. Nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Never

import pytest

from dist_scan.storage.artifacts import WORK, ArtifactStore, fingerprint
from dist_scan.storage.atomic import write_atomic, write_text


def test_a_fingerprint_names_a_meaning() -> None:
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) and len(fingerprint()) == 16


def test_an_artefact_is_found_only_after_it_was_published(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.find("embed", "f") is None and not store.is_started("embed", "f")
    folder = store.folder("embed", "f")
    (folder / WORK).mkdir(parents=True)
    write_text(folder / "x.txt", "hello")
    write_text(folder / WORK / "checkpoint", "big")
    assert store.find("embed", "f") is None and store.is_started("embed", "f")
    store.publish("embed", "f", {"seconds": 1.0})
    found = store.find("embed", "f")
    assert list(found.manifest["files"]) == ["x.txt"] and not (folder / WORK).exists()


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_artefact_is_refused_by_name(tmp_path: Path, damage) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.folder("embed", "f")
    folder.mkdir(parents=True)
    write_text(folder / "x.txt", "hello")
    store.publish("embed", "f", {})
    (folder / "x.txt").write_text("hell") if damage == "shorter" else (folder / "x.txt").unlink()
    with pytest.raises(ValueError, match="x.txt"):
        store.find("embed", "f")


@pytest.mark.parametrize(
    "text",
    [
        b'{"name": "embed", "fi',
        b"",
        b"[]",
        b"7",
        b"null",
        b'{"files": 7}',
        b'{"files": {"x.txt": 7}}',
        b'{"files": {"x.txt": {}}}',
        b"{}",
        b"\xff\xfe",
    ],
)
def test_a_manifest_that_is_torn_or_foreign_is_refused_by_name_with_the_way_out(
    tmp_path: Path, text
) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.folder("embed", "f")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(
        ValueError,
        match=r"embed/f/manifest\.json is not a valid manifest .*remove the folder and start again",
    ):
        store.find("embed", "f")


def test_files_are_held_against_their_sums_and_leftovers_go(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.folder("embed", "f")
    folder.mkdir(parents=True)
    write_text(folder / "x.txt", "hello")
    (folder / ".tmp-x.txt-1234").write_text("hel")  # of a process that was killed
    store.remove_temporary_files("embed", "f")
    assert [p.name for p in folder.iterdir()] == ["x.txt"]
    found = store.publish("embed", "f", {})
    store.verify(found)
    (folder / "x.txt").write_text("hallo")
    assert store.find("embed", "f") is not None, "the size is the same"
    with pytest.raises(ValueError, match="x.txt has changed since it was written"):
        store.verify(found)


def test_the_lock_of_a_launcher_that_was_killed_is_waited_for(tmp_path: Path) -> None:
    """Its ranks hold it until they have noticed; one that lives is named at once."""
    import fcntl
    import os
    import socket
    import subprocess
    import threading
    import time

    from dist_scan.config import ConfigError
    from launch.run_lock import acquire_lock

    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid, freed in ((gone.pid, True), (os.getpid(), False)):
        lock = open(tmp_path / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"process {pid} on {socket.gethostname()}")
        lock.flush()
        if not freed:
            with pytest.raises(ConfigError, match=f"in use by process {pid}"):
                acquire_lock(tmp_path)
            continue
        threading.Timer(1.0, lock.close).start()
        began = time.monotonic()
        acquire_lock(tmp_path).close()
        assert time.monotonic() - began >= 0.9


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def fail(f) -> Never:
        f.write(b"new")
        raise OSError("full")

    with pytest.raises(OSError):
        write_atomic(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_said_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    import errno

    def fail(f) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match="free some space there and start the same command again.*images"
    ):
        write_atomic(tmp_path / "images", fail)


def test_a_stage_ends_while_its_clock_writes_to_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading
    import time

    from dist_scan.monitoring import stage_timer

    begun, written, quick = threading.Event(), threading.Event(), stage_timer.write_text

    def write(path, text) -> None:
        begun.set()
        time.sleep(0.3)
        quick(path, text)
        written.set()

    monkeypatch.setattr(stage_timer, "write_text", write)
    monkeypatch.setattr(stage_timer.StageTimer, "SAVE_EVERY_S", 0.01)
    store = ArtifactStore(tmp_path)
    folder = store.folder("heads", "a" * 16)
    clock = stage_timer.StageTimer(folder / WORK / "seconds", True)
    assert begun.wait(10)
    assert clock.stop() > 0.2 and written.is_set(), "the write was waited for"
    store.publish("heads", "a" * 16, {"kind": "train"})
    assert [f.name for f in folder.iterdir()] == ["manifest.json"]
