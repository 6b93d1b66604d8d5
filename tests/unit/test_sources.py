"""Readers: order, labels, names, limits, marks, and clear refusals."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dist_scan.config import ConfigError, SplitConfig
from dist_scan.data.sources.open import open_source
from tests.support.images import encode_image, make_image, write_image_folder
from tests.support.shared_data import shared_data

JPG = encode_image(make_image(), "JPEG")


def opened(path, **kwargs):
    return open_source(SplitConfig(source=str(path), **kwargs))


def everything(source):
    return list(source.read(range(len(source))))


def table(path, labels, column="label"):
    images = pa.array([{"bytes": JPG, "path": f"{i}.jpg"} for i in range(len(labels))])
    pq.write_table(
        pa.table({"image": images, **({column: pa.array(labels)} if column else {})}),
        path,
        row_group_size=2,
    )
    return path


def test_a_folder_has_its_first_level_as_classes(tmp_path: Path) -> None:
    source = opened(write_image_folder(tmp_path, 6))
    assert source.class_names == ["class0", "class1"]
    assert [(s.label, s.name) for s in everything(source)][:2] == [
        (0, "class0/000.jpeg"),
        (0, "class0/002.jpeg"),
    ]


def test_a_folder_without_folders_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(JPG)
    source = opened(tmp_path)
    assert source.class_names is None and [(s.label, s.name) for s in everything(source)] == [
        (-1, "a.png"),
        (-1, "b.JPG"),
    ]


def test_links_are_followed_but_not_in_circles_and_dead_ones_do_not_end_the_listing(
    tmp_path: Path,
) -> None:
    write_image_folder(tmp_path / "real", 2)
    (tmp_path / "tree" / "a").mkdir(parents=True)
    os.symlink(tmp_path / "real" / "class0", tmp_path / "tree" / "linked")
    os.symlink("..", tmp_path / "tree" / "a" / "up")
    os.symlink("/nowhere/x.jpg", tmp_path / "tree" / "a" / "dead.jpg")
    assert [(s.name, bool(s.data)) for s in everything(opened(tmp_path / "tree"))] == [
        ("a/dead.jpg", False),
        ("linked/000.jpeg", True),
    ]
    os.symlink("self.png", tmp_path / "tree" / "a" / "self.png")
    os.symlink("loop", tmp_path / "tree" / "a" / "loop")
    os.symlink(
        "../b", tmp_path / "tree" / "a" / "other"
    )  # a/other -> b and b/back -> a: each would be listed without end
    (tmp_path / "tree" / "b").mkdir()
    os.symlink("../a", tmp_path / "tree" / "b" / "back")
    os.mkfifo(tmp_path / "tree" / "b" / "pipe.png")  # reading it would wait for a writer
    found = [(s.name, bool(s.data)) for s in everything(opened(tmp_path / "tree"))]
    assert len(found) == len(set(found)) < 20 and {
        ("a/self.png", False),
        ("b/pipe.png", False),
        ("linked/000.jpeg", True),
    } <= set(found)


def test_parquet_of_several_files_with_and_without_labels(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [3, None, 5])
    table(tmp_path / "b.parquet", [0, 0], column=None)
    source = opened(tmp_path)
    assert [s.label for s in everything(source)] == [3, -1, 5, -1, -1]
    assert [s.label for s in source.read([2, 3])] == [5, -1]


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_label_columns(tmp_path: Path, column) -> None:
    assert [s.label for s in everything(opened(table(tmp_path / "a.parquet", [1, 2], column)))] == [
        1,
        2,
    ]


def test_words_as_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'label' is string; allowed: integers"):
        opened(table(tmp_path / "a.parquet", ["cat", "dog"]))


def test_a_rotted_parquet_page_names_the_file(tmp_path: Path) -> None:
    data = bytearray(shared_data("cifar10-test.parquet").read_bytes())
    data[100000:100100] = bytes(100)
    (tmp_path / "rot.parquet").write_bytes(data)
    with pytest.raises(ConfigError, match="rot.parquet': row group 0 cannot be read"):
        everything(opened(tmp_path / "rot.parquet", limit=3))


def test_real_parquet() -> None:
    source = opened(shared_data("cifar10-test.parquet"), limit=40)
    samples = everything(source)
    assert len(samples) == 40 and {Image.open(io.BytesIO(s.data)).size for s in samples} == {
        (32, 32)
    }
    assert len({s.label for s in samples}) > 5


def test_tar_shards_with_cls_and_json_labels(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        for name, data in (
            ("d/1.jpg", JPG),
            ("d/1.cls", b"4"),
            ("d/2.jpg", JPG),
            ("d/2.json", b'{"label": 7}'),
            ("d/3.jpg", JPG),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [(s.name, s.label, s.data == JPG) for s in everything(opened(tmp_path / "s-*.tar"))] == [
        ("d/1.jpg", 4, True),
        ("d/2.jpg", 7, True),
        ("d/3.jpg", -1, True),
    ]


def test_the_digits_are_real_images() -> None:
    from sklearn.datasets import load_digits

    samples = everything(opened("sklearn:digits", limit=30))
    rows = np.arange(30) * 1797 // 30
    assert [s.label for s in samples] == load_digits().target[rows].tolist()
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(samples[7].data))),
        np.round(load_digits().images[rows[7]] * 255 / 16),
    )


def test_limit_is_evenly_spaced(tmp_path: Path) -> None:
    assert [
        s.name[-8:-5] for s in everything(opened(write_image_folder(tmp_path, 12), limit=4))
    ] == [
        "000",
        "006",
        "001",
        "007",
    ]


def test_the_mark_follows_the_data_not_the_place(tmp_path: Path) -> None:
    a, b = (
        opened(write_image_folder(tmp_path / "a", 4)),
        opened(write_image_folder(tmp_path / "b", 4)),
    )
    assert (
        a.fingerprint()
        == b.fingerprint()
        != opened(write_image_folder(tmp_path / "c", 5)).fingerprint()
    )
    assert a.fingerprint() != opened(tmp_path / "a", limit=2).fingerprint()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p / "no", "does not exist"),
        (lambda p: p, "has no images"),
        (
            lambda p: (p / "x.parquet").write_bytes(b"junk") and p / "x.parquet",
            "not a readable parquet",
        ),
        (lambda p: (p / "x.tar").write_bytes(b"junk") and p / "x.tar", "not a readable tar"),
        (
            lambda p: (p / "x.zip").write_bytes(b"junk") and p / "x.zip",
            "does not fit",
        ),
    ],
    ids=["missing", "empty", "parquet", "tar", "other"],
)
def test_refusals_are_clear(tmp_path: Path, make, words) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(make(tmp_path))


def tar_of(path, **members):
    """A tar of these members, in order; `__` in a name stands for a dot."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_second_images_of_a_tar_are_named_and_labels_that_are_no_numbers_refused(
    tmp_path: Path,
) -> None:
    with pytest.warns(UserWarning, match=r"3 more images.*a\.jpg, b\.seg\.png, x\.y\.png"):
        source = opened(
            tar_of(
                tmp_path / "a.tar",
                a__png=b"1",
                a__jpg=b"2",
                b__png=b"3",
                b__seg__png=b"4",
                x__y__png=b"5",
                b__cls=b"7",
            )
        )
    assert [(s.name, s.label) for s in everything(source)] == [("a.png", -1), ("b.png", 7)]
    for number, label in enumerate((b"cat", b"Infinity", b'{"label": "dog"}', b"1.5")):
        with pytest.raises(ConfigError, match="allowed: an integer"):
            opened(
                tar_of(
                    tmp_path / f"bad{number}.tar",
                    a__png=b"1",
                    **{"a__json" if b"{" in label else "a__cls": label},
                )
            )


def test_other_pictures_of_the_same_names_and_sizes_are_other_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bmp").write_bytes(b"one picture")
    before = opened(tmp_path / "a").fingerprint()
    (tmp_path / "a" / "x.bmp").write_bytes(b"two picture")
    assert opened(tmp_path / "a").fingerprint() != before


def test_sources_that_can_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        opened("x" * 5000)
    with pytest.raises(ConfigError, match="selects folders of images"):
        open_source(SplitConfig(source="sklearn:digits", classes="list.txt"))
    with pytest.raises(ConfigError, match="does not fit"):
        open_source(SplitConfig(source="sklearn:digits", format="tar"))
