"""Faults of FFCV.md 1, 6, 7: a build or a loader never hangs, never dies in native code, never goes on with wrong pixels."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_scan.config import ConfigError
from dist_scan.data.augment.crops import CropSpec
from dist_scan.data.beton.format import (
    FIELD,
    HEADER,
    ROW,
    InvalidBetonError,
    check_beton,
    read_names,
    sidecar,
)
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import write_beton
from dist_scan.data.sources.open import open_source
from tests.support.images import (
    build_beton,
    data_config,
    encode_image,
    make_image,
    write_image_folder,
)

pytestmark = pytest.mark.timeout(120)
VIEW = (CropSpec("center", 32),)
BESIDE = ("sums.npy", "names.parquet", "json")


@pytest.fixture(scope="module", params=["raw", "jpeg"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    return build_beton(
        write_image_folder(root / "images", 12), root / "good.beton", stored=request.param
    )


def copied(good: Path, to: Path, change) -> Path:
    """A copy of a good file, its bytes changed, with the files beside it."""
    data = bytearray(good.read_bytes())
    path = to / "copy.beton"
    changed = change(data)
    path.write_bytes(data if changed is None else changed)
    for ending in BESIDE:
        shutil.copy(sidecar(good, ending), sidecar(path, ending))
    return path


def test_bad_images_are_listed_with_the_reason_and_left_out(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", 6)
    bad = {
        "empty.jpg": b"",
        "garbage.jpg": b"x" * 99,
        "cut.jpg": encode_image(make_image(), "JPEG")[:300],
        "bomb.png": encode_image(Image.new("1", (20000, 20000))),
    }  # 50 kB that would be 1.2 GB of pixels
    for name, data in bad.items():
        (root / "class0" / name).write_bytes(data)
    (root / "class1").joinpath(os.fsdecode(b"\xff.jpg")).write_bytes(
        encode_image(make_image(), "JPEG")
    )  # a name that is no UTF-8
    path = build_beton(root, tmp_path / "x.beton", max_bad_share=0.5)
    with open(sidecar(path, "bad.csv")) as f:
        listed = {Path(row["name"]).name: row["reason"] for row in csv.DictReader(f)}
    assert set(listed) == set(bad) and all(listed.values())
    assert len(check_beton(path, verify_images=True).rows) == len(read_names(path)) == 7
    with pytest.raises(ConfigError, match="max_bad_share"):
        build_beton(root, tmp_path / "y.beton")
    assert not (tmp_path / "y.beton").exists()


def test_a_jpeg_that_turbojpeg_complains_about_is_found_at_the_build_not_in_training(
    tmp_path: Path,
) -> None:
    root = write_image_folder(tmp_path / "images", 4)
    data = encode_image(make_image(), "JPEG")
    (root / "class0" / "stray.jpg").write_bytes(
        data[:-2] + bytes(40) + data[-2:]
    )  # Pillow reads it without a word
    path = build_beton(root, tmp_path / "x.beton", stored="original")
    assert (
        sum(
            len(i)
            for i, _ in BetonLoader(path, VIEW, seed=0, batch_size=2, num_threads=1).batches(
                np.arange(5), 0
            )
        )
        == 5
    )


@pytest.mark.parametrize(
    "cut", ["none left", "header", "tables", "data", "table - 5", "table - 1 row", "longer"]
)
def test_every_truncation_is_refused_when_opened(good, tmp_path: Path, cut) -> None:
    size = good.stat().st_size
    keep = {
        "none left": 0,
        "header": 20,
        "tables": 3000,
        "data": size // 2,
        "table - 5": size - 5,
        "table - 1 row": size - 24,
        "longer": size,
    }[cut]
    path = copied(
        good, tmp_path, lambda data: data[:keep] + (b"\0" * 24 if cut == "longer" else b"")
    )
    with pytest.raises(InvalidBetonError):
        BetonLoader(path, VIEW, seed=0, batch_size=2, num_threads=1)


def test_an_unfinished_header_is_refused(good, tmp_path: Path) -> None:
    def unfinished(data) -> None:
        at = HEADER.fields["alloc_table_ptr"][1]
        data[at : at + 8] = bytes(8)

    with pytest.raises(InvalidBetonError, match="unfinished"):
        check_beton(copied(good, tmp_path, unfinished))


@pytest.mark.parametrize("field", ["label", "width", "mode"])
def test_one_flipped_bit_in_the_tables_is_refused(good, tmp_path: Path, field) -> None:
    at = (
        HEADER.itemsize
        + 3 * FIELD.itemsize
        + 5 * ROW.itemsize
        + {"mode": 0, "width": 1, "label": ROW.fields["f1"][1]}[field]
    )

    def flip(data) -> None:
        data[at] ^= 1

    with pytest.raises(InvalidBetonError):
        check_beton(copied(good, tmp_path, flip))


def test_files_of_another_build_beside_it_are_refused(good, tmp_path: Path) -> None:
    path = copied(good, tmp_path, lambda data: data)
    other = build_beton(
        write_image_folder(tmp_path / "images", 12), tmp_path / "other.beton", resolution=32
    )
    for ending in ("sums.npy", "json"):
        shutil.copy(sidecar(other, ending), sidecar(path, ending))
        with pytest.raises(InvalidBetonError):
            check_beton(path)
        shutil.copy(sidecar(good, ending), sidecar(path, ending))
    check_beton(path)
    sidecar(path, "sums.npy").unlink()
    with pytest.raises(InvalidBetonError, match="missing"):
        check_beton(path)


def test_every_rotted_sample_raises_with_its_row_and_name(good, tmp_path: Path) -> None:
    tables, rng = check_beton(good), np.random.default_rng(0)
    starts, sizes = tables.rows["f0"]["data_ptr"].tolist(), tables.sizes.tolist()

    def rot(data) -> None:
        for start, size in zip(starts, sizes):
            data[start + int(rng.integers(size))] ^= 1 << int(rng.integers(8))

    loader = BetonLoader(copied(good, tmp_path, rot), VIEW, seed=0, batch_size=4, num_threads=2)
    for row, name in enumerate(read_names(good)):
        with pytest.raises(ValueError, match=rf"image {row} \({name}\)"):
            list(loader.batches(np.array([row]), 0))
    with pytest.raises(InvalidBetonError, match="image 0 "):
        check_beton(loader.path, verify_images=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A raw and a jpeg file for one process to read: an import of ffcv costs as much as many tests."""
    root = tmp_path_factory.mktemp("both")
    source = write_image_folder(root / "images", 12)
    return [
        build_beton(source, root / f"{stored}.beton", stored=stored) for stored in ("raw", "jpeg")
    ]


def test_a_file_cut_after_it_was_opened_raises_and_does_not_kill(both, tmp_path: Path) -> None:
    paths = []
    for good in both:
        (tmp_path / good.stem).mkdir()
        paths.append(str(copied(good, tmp_path / good.stem, lambda data: data)))
    code = f"""
import os, numpy as np
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.augment.crops import CropSpec
for path in {paths!r}:
    loader = BetonLoader(path, (CropSpec('center', 32),), seed=0, batch_size=4, num_threads=2)
    os.truncate(path, 9000)
    try:
        list(loader.batches(np.arange(12), 0))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("cannot be read") == 2, (
        done.stdout + done.stderr
    )


def command(source: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "dist_scan",
        "beton",
        str(source),
        str(out),
        "--resolution",
        "200",
        *more,
    ]


def children(pid: int) -> set[int]:
    """All processes below one, by parentage."""
    found, ahead = set(), [pid]
    while ahead:
        parent = ahead.pop()
        try:
            kids = [
                int(k)
                for t in Path(f"/proc/{parent}/task").iterdir()
                for k in (t / "children").read_text().split()
            ]
        except OSError:
            kids = []
        found.update(kids)
        ahead += kids
    return found


def until(true, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory):
    """Images enough for a pool: links to a few files."""
    root = tmp_path_factory.mktemp("many")
    write_image_folder(root / "few", 8)
    few = sorted((root / "few").rglob("*.jpeg"))
    (root / "images").mkdir()
    for i in range(5000):
        os.symlink(few[i % 8], root / "images" / f"{i:05d}.jpeg")
    config = data_config(root / "images", resolution=200, max_side=1024)
    write_beton(open_source(config.train), root / "alone.beton", config, 1, show=False)
    return root / "images", (root / "alone.beton").read_bytes()


def started(many, out: Path) -> subprocess.Popen:
    build = subprocess.Popen(
        command(many, out, "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert until(lambda: len(list(sidecar(out, "parts").glob("*.npz"))) >= 2)
    return build


def test_kill_minus_nine_leaves_no_process_and_the_same_command_goes_on_to_the_same_bytes(
    many, tmp_path: Path
) -> None:
    out, (source, expected) = tmp_path / "x.beton", many
    build = started(source, out)
    below = children(build.pid)
    build.kill()
    build.communicate()
    assert not out.exists() and below
    assert until(lambda: not [p for p in below if Path(f"/proc/{p}").exists()], 20), (
        "workers outlive a killed build"
    )
    finished = len(list(sidecar(out, "parts").glob("*.npz"))) * 512
    done = subprocess.run(
        command(source, out, "--workers", "2"), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and out.read_bytes() == expected, done.stderr
    first = next(line for line in done.stderr.splitlines() if "images" in line)
    assert int(first.split(": ")[1].split("/")[0]) > finished and not sidecar(out, "parts").exists()


def test_a_killed_worker_ends_the_build_with_one_clear_line(many, tmp_path: Path) -> None:
    out, (source, _) = tmp_path / "x.beton", many
    build = started(source, out)
    leaves = [p for p in children(build.pid) if not children(p)]
    workers = [p for p in leaves if b"forkserver" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, said = build.communicate(timeout=60)
    assert build.returncode == 2 and "was killed" in said and "Traceback" not in said


def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments in (
        ["nowhere", "x.beton"],
        [str(tmp_path), "x.beton"],
        [str(tmp_path), "x.txt"],
        ["sklearn:digits", "x.beton", "--quality", "0"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dist_scan", "beton", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and "Traceback" not in done.stderr
        )


def test_the_stock_reader_reads_it(both) -> None:
    code = f"""
from ffcv.reader import Reader
for path in {[str(path) for path in both]!r}:
    reader = Reader(path)
    print(reader.num_samples, *reader.field_names, len(reader.alloc_table))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["12 image label index 12"] * 2, done.stderr
