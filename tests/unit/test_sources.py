"""Sources of images: order, labels, names, limits, fingerprints and error messages."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dist_scan.config import ConfigError, SplitConfig
from dist_scan.data.sources.base import Sample, Source
from dist_scan.data.sources.open import open_source
from tests.support.images import encode_image, make_image, write_image_folder
from tests.support.shared_data import shared_data

JPG = encode_image(make_image(), "JPEG")


def open_path(path: Path | str, **settings: Any) -> Source:
    return open_source(SplitConfig(source=str(path), **settings))


def read_all(source: Source) -> list[Sample]:
    return list(source.read(range(len(source))))


def labels_and_names(source: Source) -> list[tuple[int, str]]:
    return [(sample.label, sample.name) for sample in read_all(source)]


def write_parquet(path: Path, labels: list[Any], column: str | None = "label") -> Path:
    """A parquet file of images with these labels, two in a row group."""
    images = [{"bytes": JPG, "path": f"{i}.jpg"} for i in range(len(labels))]
    columns = {"image": pa.array(images)}
    if column:
        columns[column] = pa.array(labels)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar file of these members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_folders_of_the_first_level_are_the_classes(tmp_path: Path) -> None:
    source = open_path(write_image_folder(tmp_path, 6))
    assert source.class_names == ["class0", "class1"]
    assert labels_and_names(source)[:2] == [(0, "class0/000.jpeg"), (0, "class0/002.jpeg")]


def test_a_folder_without_folders_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(JPG)
    source = open_path(tmp_path)
    assert source.class_names is None
    assert labels_and_names(source) == [(-1, "a.png"), (-1, "b.JPG")]


def test_links_are_followed_and_dead_ones_are_listed_without_data(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "real", 2)
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    os.symlink(tmp_path / "real" / "class0", tree / "linked")
    os.symlink("..", tree / "a" / "up")
    os.symlink("/nowhere/x.jpg", tree / "a" / "dead.jpg")
    found = [(sample.name, bool(sample.data)) for sample in read_all(open_path(tree))]
    assert found == [("a/dead.jpg", False), ("linked/000.jpeg", True)]


def test_links_in_a_cycle_and_pipes_do_not_block_the_listing(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "real", 2)
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    (tree / "b").mkdir()
    os.symlink(tmp_path / "real" / "class0", tree / "linked")
    os.symlink("self.png", tree / "a" / "self.png")
    os.symlink("loop", tree / "a" / "loop")
    # a/other -> b and b/back -> a: each would be listed for ever.
    os.symlink("../b", tree / "a" / "other")
    os.symlink("../a", tree / "b" / "back")
    os.mkfifo(tree / "b" / "pipe.png")  # reading it would wait for a writer
    found = [(sample.name, bool(sample.data)) for sample in read_all(open_path(tree))]
    assert len(found) == len(set(found)) < 20
    expected = {("a/self.png", False), ("b/pipe.png", False), ("linked/000.jpeg", True)}
    assert expected <= set(found)


def test_parquet_files_with_and_without_labels_are_read_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [3, None, 5])
    write_parquet(tmp_path / "b.parquet", [0, 0], column=None)
    source = open_path(tmp_path)
    assert [sample.label for sample in read_all(source)] == [3, -1, 5, -1, -1]
    assert [sample.label for sample in source.read([2, 3])] == [5, -1]


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_names_of_label_columns(tmp_path: Path, column: str) -> None:
    source = open_path(write_parquet(tmp_path / "a.parquet", [1, 2], column))
    assert [sample.label for sample in read_all(source)] == [1, 2]


def test_labels_of_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'label' is string; allowed: integers"):
        open_path(write_parquet(tmp_path / "a.parquet", ["cat", "dog"]))


def test_error_of_a_damaged_parquet_page_names_the_file(tmp_path: Path) -> None:
    data = bytearray(shared_data("cifar10-test.parquet").read_bytes())
    data[100000:100100] = bytes(100)
    path = write_bytes(tmp_path / "damaged.parquet", data)
    with pytest.raises(ConfigError, match="damaged.parquet': row group 0 cannot be read"):
        read_all(open_path(path, limit=3))


def test_parquet_of_cifar10() -> None:
    samples = read_all(open_path(shared_data("cifar10-test.parquet"), limit=40))
    assert len(samples) == 40
    sizes = {Image.open(io.BytesIO(sample.data)).size for sample in samples}
    assert sizes == {(32, 32)}
    assert len({sample.label for sample in samples}) > 5


def test_tar_shards_with_labels_in_cls_and_json(tmp_path: Path) -> None:
    members = {
        "d/1.jpg": JPG,
        "d/1.cls": b"4",
        "d/2.jpg": JPG,
        "d/2.json": b'{"label": 7}',
        "d/3.jpg": JPG,
    }
    write_tar(tmp_path / "s-0.tar", members)
    source = open_path(tmp_path / "s-*.tar")
    assert labels_and_names(source) == [(4, "d/1.jpg"), (7, "d/2.jpg"), (-1, "d/3.jpg")]
    assert all(sample.data == JPG for sample in read_all(source))


def test_further_images_of_a_tar_sample_are_ignored_with_a_warning(tmp_path: Path) -> None:
    members = {
        "a.png": b"1",
        "a.jpg": b"2",
        "b.png": b"3",
        "b.seg.png": b"4",
        "x.y.png": b"5",
        "b.cls": b"7",
    }
    with pytest.warns(UserWarning, match=r"3 images are ignored.*a\.jpg, b\.seg\.png, x\.y\.png"):
        source = open_path(write_tar(tmp_path / "a.tar", members))
    assert labels_and_names(source) == [(-1, "a.png"), (7, "b.png")]


@pytest.mark.parametrize(
    "name, label",
    [("a.cls", b"cat"), ("a.cls", b"Infinity"), ("a.json", b'{"label": "dog"}'), ("a.cls", b"1.5")],
)
def test_tar_labels_that_are_not_integers_are_refused(
    tmp_path: Path, name: str, label: bytes
) -> None:
    with pytest.raises(ConfigError, match="allowed: an integer"):
        open_path(write_tar(tmp_path / "a.tar", {"a.png": b"1", name: label}))


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    samples = read_all(open_path("sklearn:digits", limit=30))
    rows = np.arange(30) * 1797 // 30
    assert [sample.label for sample in samples] == load_digits().target[rows].tolist()
    pixels = np.asarray(Image.open(io.BytesIO(samples[7].data)))
    assert np.array_equal(pixels, np.round(load_digits().images[rows[7]] * 255 / 16))


def test_a_limit_takes_images_evenly_spaced(tmp_path: Path) -> None:
    samples = read_all(open_path(write_image_folder(tmp_path, 12), limit=4))
    assert [sample.name[-8:-5] for sample in samples] == ["000", "006", "001", "007"]


def test_fingerprint_depends_on_the_data_and_not_on_its_path(tmp_path: Path) -> None:
    fingerprint = open_path(write_image_folder(tmp_path / "a", 4)).fingerprint()
    assert open_path(write_image_folder(tmp_path / "b", 4)).fingerprint() == fingerprint
    assert open_path(write_image_folder(tmp_path / "c", 5)).fingerprint() != fingerprint
    assert open_path(tmp_path / "a", limit=2).fingerprint() != fingerprint


def test_fingerprint_differs_for_other_images_of_the_same_names_and_sizes(tmp_path: Path) -> None:
    file = tmp_path / "x.bmp"
    file.write_bytes(b"one picture")
    before = open_path(tmp_path).fingerprint()
    file.write_bytes(b"two picture")
    assert open_path(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder / "no", "does not exist"),
        (lambda folder: "x" * 5000, "does not exist"),
        (lambda folder: folder, "has no images"),
        (
            lambda folder: write_bytes(folder / "x.parquet", b"junk"),
            "not a readable parquet",
        ),
        (lambda folder: write_bytes(folder / "x.tar", b"junk"), "not a readable tar"),
        (lambda folder: write_bytes(folder / "x.zip", b"junk"), "'.zip' is not the ending"),
    ],
    ids=["missing", "long name", "empty", "parquet", "tar", "other"],
)
def test_sources_that_cannot_be_opened_are_explained(
    tmp_path: Path, make: Callable[[Path], Path | str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_path(make(tmp_path))


def test_settings_that_do_not_fit_the_source_are_refused() -> None:
    with pytest.raises(ConfigError, match="selects folders of images"):
        open_path("sklearn:digits", classes="list.txt")
    with pytest.raises(ConfigError, match="its format is 'digits'"):
        open_path("sklearn:digits", format="tar")
