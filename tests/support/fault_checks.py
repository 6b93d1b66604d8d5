"""What tests of faults compare: shards, losses and clusters of runs."""

from __future__ import annotations

from pathlib import Path

from tests.support.faulted_run import LaunchResult


def finished_shards(folder: Path) -> dict[str, int]:
    """The files of finished shards in a folder, each with the time at which it was written."""
    return {
        file.name: file.stat().st_mtime_ns
        for file in folder.glob("*-[0-9]*.npy")
        if not file.name.startswith(".tmp")
    }


def assert_equal_runs(result: LaunchResult, expected: LaunchResult) -> None:
    """Assert that a run is done, with the losses and published weights of another, bit for bit."""
    assert result.code == 0, result.output
    assert (result.folder / "DONE").exists(), result.output
    assert result.losses() == expected.losses()
    assert result.weights() == expected.weights()


def flip_a_bit(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
