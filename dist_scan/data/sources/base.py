"""Where images come from: image folders, parquet in the Hugging Face layout, tar shards, scikit-learn's digits.

A source knows how many images it has before any is read, gives any rows in order, and is small enough to send to a worker.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import io
import json
import os
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from dist_scan.config import ConfigError, StrictModel

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LOOKED_AT = 16  # images whose bytes are part of the data's fingerprint
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SplitConfig(StrictModel):
    """One set of images."""

    source: str = Field(min_length=1)
    """An image folder, parquet file/folder/glob (image: {bytes, path}, optional label), tar shards, or sklearn:digits."""
    format: Literal["auto", "folder", "parquet", "tar", "digits"] = "auto"
    limit: int | None = Field(default=None, ge=1)
    """Take only so many images, evenly spaced over the source (a trial run)."""
    classes: str | None = None
    """A text file whose lines begin with class folder names: only these, in this order (ImageNet subsets)."""


class DataConfig(StrictModel):
    """The images of a run and how they are stored."""

    train: SplitConfig
    val: SplitConfig | None = None
    size: int = Field(default=224, ge=8)
    """Side in pixels of what the network sees."""
    stored: Literal["raw", "jpeg", "original"] = "jpeg"
    """raw: pixels; jpeg: re-encoded at `resolution`; original: JPEG bytes passed through where they already are RGB JPEG."""
    resolution: int = Field(default=256, ge=8)
    """Shorter side in pixels of what is stored (bilinear; smaller images are enlarged, as Resize does)."""
    max_side: int = Field(default=1024, ge=8)
    """Cap on the longer side of what is stored."""
    quality: int = Field(default=90, ge=1, le=100)
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Above this share of unreadable images the build refuses."""


class Sample(NamedTuple):
    """One image as it comes: its file's bytes, its label (-1 unknown), its name."""

    data: bytes
    label: int
    name: str


class Source(ABC):
    """`len(source)` images in a fixed order."""

    class_names: list[str] | None = None
    rows: np.ndarray
    """The underlying row of each image, after `limit`."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Sequence[int]) -> Iterator[Sample]:
        """The images at these places (ascending), in order."""
        return self._read([int(self.rows[i]) for i in index])

    @abstractmethod
    def _read(self, rows: list[int]) -> Iterator[Sample]: ...

    @abstractmethod
    def _facts(self) -> Iterator[str]:
        """What tells this data from other data, cheaply: names and sizes."""

    def fingerprint(self) -> str:
        """16 hex digits over the names and sizes of what is read, and the bytes of a few images: other pictures may have the same sizes."""
        digest = hashlib.sha256()
        for sample in self.read(
            np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)).tolist()
            if len(self)
            else []
        ):
            digest.update(sample.data)
        for fact in self._facts():
            digest.update(fact.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


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


class DigitsSource(Source):
    """The 1,797 handwritten digits (8 x 8) that scikit-learn carries: real images that need no download."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("sklearn")
        if spec is None:
            raise ConfigError(
                "source 'sklearn:digits': scikit-learn is not installed; pip install scikit-learn, or give images of your own"
            )
        # Its file, not load_digits: importing scikit-learn takes every start of a run two seconds.
        table = np.loadtxt(
            Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=","
        )
        self.images, self.labels = (
            np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8),
            table[:, -1].astype(int),
        )
        self.class_names, self.rows = [str(d) for d in range(10)], np.arange(len(table))

    def _read(self, rows: list[int]) -> Iterator[Sample]:
        from PIL import Image

        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(self.images[row]).save(buffer, "PNG")
            yield Sample(buffer.getvalue(), int(self.labels[row]), f"digit-{row:04d}.png")

    def _facts(self) -> Iterator[str]:
        yield "sklearn:digits:1797"


def open_source(split: SplitConfig) -> Source:
    """The source a split asks for. Raises ConfigError when it is missing, empty or of another format."""
    if split.source == "sklearn:digits" or split.format == "digits":
        if split.format not in ("auto", "digits") or split.source != "sklearn:digits":
            raise ConfigError(
                f"source '{split.source}': format '{split.format}' does not fit it; allowed: format auto, or source sklearn:digits with format digits"
            )
        source: Source = DigitsSource()
    else:
        source = _open_files(split)
    if split.classes is not None and not isinstance(source, FolderSource):
        raise ConfigError(
            f"source '{split.source}': classes '{split.classes}' chooses among folders of images, and this is none; remove it"
        )
    if len(source) == 0:
        raise ConfigError(
            f"source '{split.source}' holds no images; allowed endings: {', '.join(IMAGE_ENDINGS)}"
        )
    if split.limit is not None and split.limit < len(source):
        source.rows = source.rows[np.arange(split.limit) * len(source.rows) // split.limit]
    return source


def _open_files(split: SplitConfig) -> Source:
    files = (
        [Path(split.source)]
        if os.path.exists(split.source)
        else sorted(Path(p) for p in glob.glob(split.source))
    )
    if not files:
        raise ConfigError(
            f"source '{split.source}' does not exist; give an image folder, parquet files, tar shards (a glob is allowed), "
            "or sklearn:digits, as in data.train.source=PATH"
        )
    if len(files) == 1 and files[0].is_dir():
        inside = [(kind, sorted(files[0].glob(f"*.{kind}"))) for kind in ("parquet", "tar")]
        kind, files = next(
            ((k, f) for k, f in inside if f and split.format in ("auto", k)), ("folder", files)
        )
    else:
        kind = {".parquet": "parquet", ".tar": "tar"}.get(files[0].suffix, "?")
    if kind == "?" or split.format not in ("auto", kind):
        raise ConfigError(
            f"source '{split.source}': format '{split.format}' does not fit what is there; allowed: a folder of images, "
            "*.parquet, *.tar, or sklearn:digits"
        )
    if kind == "folder":
        return FolderSource(files[0], _class_list(split.classes))
    if kind == "tar":
        return TarSource(files)
    from dist_scan.data.sources.parquet import (
        ParquetSource,  # only who reads parquet waits for pyarrow
    )

    return ParquetSource(files)


def _class_list(path: str | None) -> list[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise ConfigError(
            f"classes: the file '{path}' does not exist; give a text file with a class folder's name on each line"
        )
    return [line.split()[0] for line in Path(path).read_text().splitlines() if line.strip()]
