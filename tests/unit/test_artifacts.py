"""A stage's folder is an artifact once it holds a manifest, whose sizes and sums are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_scan.storage.artifacts import WORK, Artifact, ArtifactStore, fingerprint
from dist_scan.storage.atomic import write_text


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def publish_text(store: ArtifactStore, text: str = "hello") -> Artifact:
    """Publish an artifact with one file, x.txt."""
    folder = store.folder("embed", "f")
    folder.mkdir(parents=True)
    write_text(folder / "x.txt", text)
    return store.publish("embed", "f", {"seconds": 1.0})


def test_equal_configurations_have_equal_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint()) == 16


def test_an_artifact_is_found_only_after_it_was_published(store: ArtifactStore) -> None:
    assert store.find("embed", "f") is None
    assert not store.is_started("embed", "f")
    folder = store.folder("embed", "f")
    (folder / WORK).mkdir(parents=True)
    write_text(folder / "x.txt", "hello")
    write_text(folder / WORK / "checkpoint", "large")
    assert store.find("embed", "f") is None
    assert store.is_started("embed", "f")
    store.publish("embed", "f", {"seconds": 1.0})
    found = store.find("embed", "f")
    assert found is not None and list(found.manifest["files"]) == ["x.txt"]
    assert not (folder / WORK).exists()


@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_a_damaged_file_is_named(store: ArtifactStore, damage: str) -> None:
    path = publish_text(store).path / "x.txt"
    if damage == "shorter":
        path.write_text("hell")
    else:
        path.unlink()
    with pytest.raises(ValueError, match="x.txt"):
        store.find("embed", "f")


@pytest.mark.parametrize(
    "content",
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
def test_an_invalid_manifest_is_named_with_a_remedy(store: ArtifactStore, content: bytes) -> None:
    folder = store.folder("embed", "f")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(content)
    message = r"embed/f: manifest\.json is not a valid manifest .*remove the folder and start again"
    with pytest.raises(ValueError, match=message):
        store.find("embed", "f")


def test_a_changed_file_of_the_same_size_is_found_by_its_sum(store: ArtifactStore) -> None:
    artifact = publish_text(store, "hello")
    store.verify(artifact)
    (artifact.path / "x.txt").write_text("hallo")
    assert store.find("embed", "f") is not None
    with pytest.raises(ValueError, match="x.txt has changed since it was written"):
        store.verify(artifact)


def test_temporary_files_of_a_killed_process_are_removed(store: ArtifactStore) -> None:
    folder = store.folder("embed", "f")
    folder.mkdir(parents=True)
    write_text(folder / "x.txt", "hello")
    (folder / ".tmp-x.txt-1234").write_text("hel")
    store.remove_temporary_files("embed", "f")
    assert [path.name for path in folder.iterdir()] == ["x.txt"]
