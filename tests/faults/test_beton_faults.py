"""Faults in building and reading a .beton.

Neither may hang, die in native code, or continue with wrong pixels.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    read_image_table,
    read_names,
    sidecar,
)
from dist_scan.data.beton.loader import BetonLoader
from dist_scan.data.beton.write import CHUNK, write_beton
from dist_scan.data.sources.open import open_source
from tests.support.images import (
    build_beton,
    data_config,
    encode_image,
    make_image,
    write_image_folder,
)

pytestmark = pytest.mark.timeout(120)
SIDECARS = ("sums.npy", "names.parquet", "json")
JPG = encode_image(make_image(), "JPEG")


def make_loader(path: Path, num_threads: int = 1) -> BetonLoader:
    view = CropSpec("center", 32)
    return BetonLoader(path, (view,), seed=0, batch_size=4, num_threads=num_threads)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module", params=["raw", "jpeg"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .beton of 12 images without a fault."""
    root = tmp_path_factory.mktemp(request.param)
    images = write_image_folder(root / "images", 12)
    return build_beton(images, root / "good.beton", stored=request.param)


def changed_copy(
    good: Path, folder: Path, change: Callable[[bytearray], bytes | bytearray | None]
) -> Path:
    """A copy of a file and its sidecars; `change` edits its bytes, or returns others."""
    path = folder / "copy.beton"
    data = bytearray(good.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)
    for ending in SIDECARS:
        shutil.copy(sidecar(good, ending), sidecar(path, ending))
    return path


# --- unreadable images -----------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_listed_with_the_reason(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", 6)
    unreadable = {
        "empty.jpg": b"",
        "garbage.jpg": b"x" * 99,
        "truncated.jpg": JPG[:300],
        # 50 kB that would be 1.2 GB of pixels
        "bomb.png": encode_image(Image.new("1", (20000, 20000))),
    }
    for name, data in unreadable.items():
        (root / "class0" / name).write_bytes(data)
    name_that_is_not_utf8 = os.fsdecode(b"\xff.jpg")
    (root / "class1" / name_that_is_not_utf8).write_bytes(JPG)
    path = build_beton(root, tmp_path / "x.beton", max_bad_share=0.5)
    with open(sidecar(path, "bad.csv")) as file:
        listed = {Path(row["name"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(listed) == set(unreadable)
    assert all(listed.values())
    assert len(read_image_table(path, verify_images=True)) == len(read_names(path)) == 7
    with pytest.raises(ConfigError, match="max_bad_share"):
        build_beton(root, tmp_path / "y.beton")
    assert not (tmp_path / "y.beton").exists()


def test_a_jpeg_with_a_turbojpeg_warning_is_encoded_again_at_the_build(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", 4)
    # Pillow reads stray bytes before the end marker without a warning.
    (root / "class0" / "stray.jpg").write_bytes(JPG[:-2] + bytes(40) + JPG[-2:])
    path = build_beton(root, tmp_path / "x.beton", stored="original")
    assert sum(len(rows) for rows, _ in make_loader(path).batches(np.arange(5), 0)) == 5


# --- damaged files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left",
    ["nothing", "header", "tables", "data", "table - 5 bytes", "table - 1 row", "1 row more"],
)
def test_every_truncation_is_refused_when_opened(good: Path, tmp_path: Path, left: str) -> None:
    size = good.stat().st_size
    sizes = {
        "nothing": 0,
        "header": 20,
        "tables": 3000,
        "data": size // 2,
        "table - 5 bytes": size - 5,
        "table - 1 row": size - 24,
        "1 row more": size,
    }
    more = bytes(24) if left == "1 row more" else b""
    path = changed_copy(good, tmp_path, lambda data: data[: sizes[left]] + more)
    with pytest.raises(InvalidBetonError):
        make_loader(path)


def test_an_unfinished_header_is_refused(good: Path, tmp_path: Path) -> None:
    def clear_table_pointer(data: bytearray) -> None:
        start = HEADER.fields["alloc_table_ptr"][1]
        data[start : start + 8] = bytes(8)

    with pytest.raises(InvalidBetonError, match="unfinished"):
        read_image_table(changed_copy(good, tmp_path, clear_table_pointer))


@pytest.mark.parametrize(
    "offset",
    [0, 1, ROW.fields["f1"][1]],
    ids=["mode", "width", "label"],
)
def test_one_flipped_bit_in_the_tables_is_refused(good: Path, tmp_path: Path, offset: int) -> None:
    def flip(data: bytearray) -> None:
        data[HEADER.itemsize + 3 * FIELD.itemsize + 5 * ROW.itemsize + offset] ^= 1

    with pytest.raises(InvalidBetonError):
        read_image_table(changed_copy(good, tmp_path, flip))


def test_sidecars_of_another_build_are_refused(good: Path, tmp_path: Path) -> None:
    path = changed_copy(good, tmp_path, lambda data: None)
    other = build_beton(
        write_image_folder(tmp_path / "images", 12), tmp_path / "other.beton", resolution=32
    )
    for ending in ("sums.npy", "json"):
        shutil.copy(sidecar(other, ending), sidecar(path, ending))
        with pytest.raises(InvalidBetonError):
            read_image_table(path)
        shutil.copy(sidecar(good, ending), sidecar(path, ending))
    read_image_table(path)
    sidecar(path, "sums.npy").unlink()
    with pytest.raises(InvalidBetonError, match="missing"):
        read_image_table(path)


def test_every_damaged_image_raises_with_its_row_and_name(good: Path, tmp_path: Path) -> None:
    images = read_image_table(good)
    rng = np.random.default_rng(0)

    def flip_a_bit_of_each(data: bytearray) -> None:
        for start, size in images[["start", "size"]].tolist():
            data[start + int(rng.integers(size))] ^= 1 << int(rng.integers(8))

    loader = make_loader(changed_copy(good, tmp_path, flip_a_bit_of_each), num_threads=2)
    for row, name in enumerate(read_names(good)):
        with pytest.raises(ValueError, match=rf"image {row} \({name}\)"):
            list(loader.batches(np.array([row]), 0))
    with pytest.raises(InvalidBetonError, match="image 0 "):
        read_image_table(loader.path, verify_images=True)


@pytest.fixture(scope="module")
def raw_and_jpeg(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files for one process to read: importing ffcv costs as much as many tests."""
    root = tmp_path_factory.mktemp("both")
    source = write_image_folder(root / "images", 12)
    return [
        build_beton(source, root / f"{stored}.beton", stored=stored) for stored in ("raw", "jpeg")
    ]


def test_a_file_truncated_after_opening_raises_and_does_not_kill(
    raw_and_jpeg: list[Path], tmp_path: Path
) -> None:
    paths = []
    for good in raw_and_jpeg:
        (tmp_path / good.stem).mkdir()
        paths.append(str(changed_copy(good, tmp_path / good.stem, lambda data: None)))
    done = run_python(f"""
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
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be read") == 2


def test_ffcvs_own_reader_reads_the_files(raw_and_jpeg: list[Path]) -> None:
    done = run_python(f"""
from ffcv.reader import Reader
for path in {[str(path) for path in raw_and_jpeg]!r}:
    reader = Reader(path)
    print(reader.num_samples, *reader.field_names, len(reader.alloc_table))
""")
    assert done.stdout.splitlines() == ["12 image label index 12"] * 2, done.stderr


# --- killed builds ---------------------------------------------------------------------------


def beton_command(source: Path, out: Path) -> list[str]:
    """Build a .beton with two worker processes."""
    paths = [str(source), str(out)]
    options = ["--resolution", "200", "--workers", "2"]
    return [sys.executable, "-m", "dist_scan", "beton", *paths, *options]


def children(pid: int) -> list[int]:
    """Child processes of a process; none if it has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on."""
    found: set[int] = set()
    to_visit = [pid]
    while to_visit:
        of_one = children(to_visit.pop())
        found.update(of_one)
        to_visit += of_one
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Poll until the condition is true; its last value."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def finished_chunks(out: Path) -> int:
    return len(list(sidecar(out, "parts").glob("*.npz")))


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """(a folder with enough images for worker processes, the .beton that one process builds)."""
    root = tmp_path_factory.mktemp("many")
    write_image_folder(root / "few", 8)
    files = sorted((root / "few").rglob("*.jpeg"))
    images = root / "images"
    images.mkdir()
    for i in range(5000):
        os.symlink(files[i % 8], images / f"{i:05d}.jpeg")
    config = data_config(images, resolution=200, max_side=1024)
    out = root / "alone.beton"
    write_beton(open_source(config.train), out, config, workers=1, show_progress=False)
    return images, out.read_bytes()


def start_build(source: Path, out: Path) -> subprocess.Popen[str]:
    """A build in progress, with at least two finished chunks."""
    build = subprocess.Popen(
        beton_command(source, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert wait_until(lambda: finished_chunks(out) >= 2)
    return build


def test_a_killed_build_leaves_no_process_and_resumes_to_the_same_bytes(
    many_images: tuple[Path, bytes], tmp_path: Path
) -> None:
    source, expected = many_images
    out = tmp_path / "x.beton"
    build = start_build(source, out)
    workers = descendants(build.pid)
    build.kill()
    build.communicate()
    assert workers
    assert not out.exists()

    def have_ended() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in workers)

    assert wait_until(have_ended, 20), "workers outlive a killed build"

    num_finished = finished_chunks(out) * CHUNK
    done = subprocess.run(beton_command(source, out), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == expected
    first_progress = next(line for line in done.stderr.splitlines() if "images" in line)
    assert int(first_progress.split(": ")[1].split("/")[0]) > num_finished
    assert not sidecar(out, "parts").exists()


def test_a_killed_worker_ends_the_build_with_one_clear_line(
    many_images: tuple[Path, bytes], tmp_path: Path
) -> None:
    build = start_build(many_images[0], tmp_path / "x.beton")
    leaves = [pid for pid in descendants(build.pid) if not children(pid)]
    workers = [pid for pid in leaves if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = build.communicate(timeout=60)
    assert build.returncode == 2
    assert "was killed" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere", "x.beton"],
        [".", "x.beton"],
        [".", "x.txt"],
        ["sklearn:digits", "x.beton", "--quality", "0"],
    ],
    ids=["no such folder", "no images", "not a .beton", "quality"],
)
def test_invalid_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_scan", "beton", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "option, message",
    [
        (("--stored", "webp"), "invalid choice: 'webp' (choose from 'raw', 'jpeg', 'original')"),
        (("--limit", "0"), "error: --limit: 0; allowed: 1 or more"),
    ],
)
def test_an_invalid_option_of_the_command_is_named_as_it_was_given(
    option: tuple[str, str], message: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "dist_scan", "beton", "sklearn:digits"]
    done = subprocess.run(
        [*command, str(tmp_path / "x.beton"), *option], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
