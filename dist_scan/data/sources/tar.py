"""Images in webdataset tar shards."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_scan.config.base import ConfigError
from dist_scan.data.sources.base import IMAGE_ENDINGS, Sample, Source
from dist_scan.storage.atomic import error_reason

LABEL_ENDINGS = ("cls", "json")


class _Member(NamedTuple):
    """Where an image is stored."""

    file: int
    name: str
    offset: int
    size: int


class TarSource(Source):
    """webdataset shards: members KEY.jpg (or .png ...) with an optional label beside them.

    The label is the number in KEY.cls, or `label` or `cls` in the JSON object KEY.json.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.members: list[_Member] = []
        self.labels: list[int] = []
        for number, file in enumerate(files):
            try:
                with tarfile.open(file) as tar:
                    self._add_members(tar, number)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ConfigError(
                    f"source '{file}' is not a readable tar file: {error_reason(error)}"
                ) from None
        self.rows = np.arange(len(self.members))

    def _add_members(self, tar: tarfile.TarFile, number: int) -> None:
        """Add the images and labels of one shard."""
        images: dict[str, _Member] = {}
        labels: dict[str, int] = {}
        ignored = []
        for member in tar:
            if not member.isfile():
                continue
            key, ending = _split_key(member.name)
            if ending in LABEL_ENDINGS:
                label = tar.extractfile(member)
                assert label is not None, "None is returned only for what is not a file"
                labels[key] = _parse_label(label.read(), f"{self.files[number]}: {member.name}")
            elif f".{ending.rpartition('.')[2]}" in IMAGE_ENDINGS:
                # Of two members with the same name the later one counts, as in tar.
                is_new = key not in images or images[key].name == member.name
                if is_new and "." not in ending:
                    images[key] = _Member(number, member.name, member.offset_data, member.size)
                else:
                    ignored.append(member.name)
        if ignored:
            more = ", ..." if len(ignored) > 3 else ""
            warnings.warn(
                f"source '{self.files[number]}': {len(ignored)} images are ignored "
                f"({', '.join(ignored[:3])}{more}): second images of a sample, or names with a "
                "dot in KEY; a sample is one image KEY.jpg, and KEY has no dot",
                stacklevel=2,
            )
        self.members += images.values()
        self.labels += [labels.get(key, -1) for key in images]

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        for row in rows:
            member = self.members[row]
            with open(self.files[member.file], "rb") as f:
                f.seek(member.offset)
                yield Sample(f.read(member.size), self.labels[row], member.name)

    def _description(self) -> Iterator[str]:
        members = zip(self.members, self.labels)
        return (f"{member.name}:{member.size}:{label}" for member, label in members)


def _split_key(name: str) -> tuple[str, str]:
    """(key, ending) of a member; the key ends at the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}/{key}", ending.lower()


def _parse_label(data: bytes, name: str) -> int:
    """Class number in KEY.cls or KEY.json; -1 if it is null, or the JSON object has none.

    Raises ConfigError if it is not an integer.
    """
    try:
        value = json.loads(data)
        if isinstance(value, dict):
            value = value.get("label", value.get("cls"))
        if value is None:
            return -1
        if int(value) == float(value):
            return int(value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise ConfigError(
        f"source '{name}': the label is {data[:40]!r}; allowed: an integer. "
        "Number the classes, or remove these members"
    )
