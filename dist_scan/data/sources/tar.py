"""Images in webdataset tar shards."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_scan.config import ConfigError
from dist_scan.data.sources.base import IMAGE_ENDINGS, Sample, Source


class TarSource(Source):
    """webdataset shards: members KEY.jpg (or .png ...) with KEY.cls or KEY.json ({"label": n}) beside them."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.members = files, []
        for number, file in enumerate(files):
            try:
                with tarfile.open(file) as tar:
                    self._index(tar, number)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ConfigError(f"source '{file}' is no readable tar file: {error}") from None
        self.rows = np.arange(len(self.members))

    def _index(self, tar: tarfile.TarFile, number: int) -> None:
        images, labels, others = {}, {}, []
        for member in (m for m in tar if m.isfile()):
            key, ending = _split_key(member.name)
            if (
                f".{ending}" in IMAGE_ENDINGS and images.get(key, (member.name,))[0] == member.name
            ):  # of two with one name the later counts, as in tar
                images[key] = (member.name, member.offset_data, member.size)
            elif ending in ("cls", "json"):
                labels[key] = _label_of(
                    tar.extractfile(member).read(), f"{self.files[number]}: {member.name}"
                )
            elif f".{ending.rpartition('.')[2]}" in IMAGE_ENDINGS:
                others.append(member.name)
        if others:
            warnings.warn(
                f"source '{self.files[number]}': {len(others)} more images of samples that have one, or with dots in their names, are left out "
                f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); a sample is KEY.jpg, and KEY has no dot",
                stacklevel=2,
            )
        self.members += [(number, *images[key], labels.get(key, -1)) for key in images]

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        for row in rows:
            number, name, offset, size, label = self.members[row]
            with open(self.files[number], "rb") as f:
                f.seek(offset)
                yield Sample(f.read(size), label, name)

    def _facts(self) -> Iterator[str]:
        return (f"{name}:{size}:{label}" for _, name, _, size, label in self.members)


def _split_key(name: str) -> tuple[str, str]:
    """webdataset's: the key ends at the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}/{key}", ending.lower()


def _label_of(data: bytes, where: str) -> int:
    """The class number in KEY.cls or KEY.json; -1 when it holds none (a .json without one, or null). Raises ConfigError when it is no whole number."""
    try:
        value = json.loads(data)
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
        if value is None:
            return -1
        if int(value) == float(value):
            return int(value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise ConfigError(
        f"source '{where}': the label is {data[:40]!r}; allowed: a whole number. Write the classes as numbers, or leave these members out"
    )
