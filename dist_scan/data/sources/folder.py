"""Images in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_scan.config import ConfigError
from dist_scan.data.sources.base import IMAGE_ENDINGS, Sample, Source


class FolderSource(Source):
    """Image files at any depth, sorted by path. The first level of folders names the classes (sorted); no folders, no labels."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        self.root = root
        found = sorted(_image_files(root))
        tops = sorted({name.split("/", 1)[0] for name, _ in found if "/" in name})
        if classes is not None:
            missing = [c for c in classes if c not in tops]
            if missing:
                raise ConfigError(
                    f"source '{root}': no folder for class '{missing[0]}' ({len(missing)} of {len(classes)} are missing)"
                )
            tops, wanted = classes, set(classes)
            found = [(name, size) for name, size in found if name.split("/", 1)[0] in wanted]
        if tops and any("/" not in name for name, _ in found):
            tops = []  # images beside folders: the folders name no classes
        self.class_names = tops or None
        number = {name: i for i, name in enumerate(tops)}
        self.files = found
        self.labels = [number.get(name.split("/", 1)[0], -1) if tops else -1 for name, _ in found]
        self.rows = np.arange(len(found))

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        for row in rows:
            name, size = self.files[row]
            try:
                data = (self.root / name).read_bytes() if size >= 0 else b""
            except OSError:
                data = b""  # vanished or unreadable: listed as bad, not fatal
            yield Sample(data, self.labels[row], name)

    def _facts(self) -> Iterator[str]:
        return (f"{name}:{size}" for name, size in self.files)


def _image_files(
    root: Path, below: str = "", inside: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """(path below root, size) of every image file; links are followed, except to a folder they lie in (`inside`: the real folders on the
    way here). A dead link, a link to itself and what is no file (a pipe would be waited for) have size -1: they are listed as
    unreadable later, and end nothing here."""
    inside = (*inside, os.path.realpath(root / below))
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # entry.is_dir raises at a link to itself
                target = os.path.realpath(entry.path)
                if not entry.is_symlink() or not any(
                    os.path.commonpath([folder, target]) == target for folder in inside
                ):
                    yield from _image_files(root, name, inside)
            elif entry.name.lower().endswith(IMAGE_ENDINGS):
                yield name, os.path.getsize(entry.path) if os.path.isfile(entry.path) else -1
