"""A failed write leaves the old file unchanged and no temporary one."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import BinaryIO, Never

import pytest

from dist_scan.storage.atomic import write_atomic, write_text


def test_a_failed_write_leaves_the_old_file_only(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> Never:
        file.write(b"new")
        raise OSError("failed")

    write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match="failed"):
        write_atomic(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_error_of_a_full_disk_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = "free some space there and start the same command again.*images"
    with pytest.raises(OSError, match=message):
        write_atomic(tmp_path / "images", fail)
