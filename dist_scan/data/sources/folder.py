"""Images in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_scan.config.base import ConfigError
from dist_scan.data.sources.base import IMAGE_ENDINGS, Sample, Source


class FolderSource(Source):
    """Image files at any depth of a folder, sorted by path.

    The folders of the first level are the classes (sorted, or in the order of `classes`, which
    selects among them). Without folders, or with images beside them, there are no labels.
    """

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        self.root = root
        self.files = sorted(_image_files(root))
        """(path below root, size in bytes) of each image."""
        folders = sorted({_top(name) for name, _ in self.files if "/" in name})
        if classes is not None:
            folders = self._select(classes, folders)
        # If images lie beside the folders, the folders are not classes
        if any("/" not in name for name, _ in self.files):
            folders = []
        self.class_names = folders or None
        numbers = {folder: number for number, folder in enumerate(folders)}
        self.labels = [numbers.get(_top(name), -1) for name, _ in self.files]
        self.rows = np.arange(len(self.files))

    def _select(self, classes: list[str], folders: list[str]) -> list[str]:
        """Keep only the images of these classes. Raises ConfigError if one has no folder."""
        missing = [name for name in classes if name not in folders]
        if missing:
            raise ConfigError(
                f"source '{self.root}': no folder for class '{missing[0]}' "
                f"({len(missing)} of {len(classes)} are missing); "
                "correct the list of classes, or the folder"
            )
        wanted = set(classes)
        self.files = [(name, size) for name, size in self.files if _top(name) in wanted]
        return classes

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        for row in rows:
            name, size = self.files[row]
            try:
                data = (self.root / name).read_bytes() if size >= 0 else b""
            except OSError:
                data = b""  # it has vanished: listed as unreadable, not fatal
            yield Sample(data, self.labels[row], name)

    def _description(self) -> Iterator[str]:
        return (f"{name}:{size}" for name, size in self.files)


def _top(name: str) -> str:
    """First component of a path."""
    return name.split("/", 1)[0]


def _image_files(
    root: Path, below: str = "", ancestors: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """(path below root, size) of every image file under root / below.

    Links are followed, except to one of `ancestors`, the real paths of the folders on the way. Size
    -1 is given to a dead link and to what is not a file (reading a pipe would block): the build
    lists them as unreadable.
    """
    ancestors = (*ancestors, os.path.realpath(root / below))
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{below}/{entry.name}" if below else entry.name
            if os.path.isdir(entry.path):  # entry.is_dir raises for a link to itself
                if not _closes_a_cycle(entry, ancestors):
                    yield from _image_files(root, name, ancestors)
            elif entry.name.lower().endswith(IMAGE_ENDINGS):
                size = os.path.getsize(entry.path) if os.path.isfile(entry.path) else -1
                yield name, size


def _closes_a_cycle(entry: os.DirEntry[str], ancestors: tuple[str, ...]) -> bool:
    """True for a link to a folder that one of the ancestors is, or lies in."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return any(os.path.commonpath([folder, target]) == target for folder in ancestors)
