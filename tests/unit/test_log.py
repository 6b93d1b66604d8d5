"""Logs and progress lines: incomplete lines are skipped, and a full disk costs rows only."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any, Never

import pytest

from dist_scan.monitoring import log as log_module
from dist_scan.monitoring.log import AppendOnlyFile, StageLog, TensorBoardWriter, read_rows
from dist_scan.monitoring.progress import Progress, format_duration, print_line


class Disk:
    """Opens files whose writes raise ENOSPC once ``space`` bytes are written, as a full disk does.

    The last write before the error may write a part of its data.
    """

    def __init__(self, space: int) -> None:
        self.space = space

    def open(self, path: Path, mode: str, buffering: int = -1) -> io.FileIO:
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if not disk.space:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = data[: disk.space]
                disk.space -= len(written)
                return super().write(written)

        return File(path, mode.replace("b", ""))


class FullStream(io.StringIO):
    """A text stream on a full disk."""

    def write(self, text: str) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device")


def losses_in_tensorboard(folder: Path) -> dict[int, float]:
    """Loss by step, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    losses = {}
    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "loss":
                    losses[event.step] = value.tensor.float_val[0]
    return losses


def test_incomplete_lines_are_skipped_and_the_last_row_of_a_step_counts(tmp_path: Path) -> None:
    log = StageLog(tmp_path, "a")
    log.write_row(1, {"loss": 3.0})
    log.write_row(2, {"loss": 2.0})
    log.close()
    path = tmp_path / "logs" / "a.metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    log = StageLog(tmp_path, "a")
    log.write_row(2, {"loss": 1.5})
    log.close()
    assert read_rows(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]
    assert list((tmp_path / "tensorboard" / "a").iterdir())


def test_a_full_disk_costs_rows_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(space=10**9)
    log = StageLog(tmp_path, "a")
    monkeypatch.setattr(log_module, "open", disk.open, raising=False)
    monkeypatch.setattr(log_module, "TENSORBOARD_RETRY_S", 0.0)
    log.write_row(1, {"loss": 3.0})
    disk.space = 9  # a part of a row
    for step in (2, 3, 4):
        log.write_row(step, {"loss": 2.0})
    disk.space = 10**9
    log.write_row(5, {"loss": 1.0})
    disk.space = len('{"step": 6, "loss": 0.5}\n') + 9  # the row, and a part of the event
    log.write_row(6, {"loss": 0.5})
    disk.space = 10**9
    log.write_row(7, {"loss": 0.25})
    log.close()
    assert [row["step"] for row in read_rows(log.path)] == [1, 5, 6, 7]
    assert losses_in_tensorboard(log.tensorboard_dir) == {1: 3.0, 5: 1.0, 7: 0.25}
    messages = capfd.readouterr().err
    for text in (
        "metrics.jsonl: No space left on device; what cannot be written is lost",
        "metrics.jsonl can be written again; 3 writes failed",
        "cannot write TensorBoard events",
        "tensorboard/a can be written again",
    ):
        assert messages.count(text) == 1, messages
    assert "Traceback" not in messages


def test_a_log_that_can_never_be_created_does_not_end_the_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file instead of a folder")
    log = StageLog(tmp_path, "a")
    log.write_row(1, {"loss": 3.0})
    log.write_row(2, {"loss": 3.0})
    log.close()
    assert not AppendOnlyFile(tmp_path / "logs" / "run.log").write("hello\n")
    assert capfd.readouterr().err.count("a.metrics.jsonl: File exists") == 1


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2):
        writer.write_scalars(step, {"loss": step / 4, "acc": 1})
    writer.close()
    assert losses_in_tensorboard(tmp_path) == {1: 0.25, 2: 0.5}


def test_a_stream_that_cannot_be_written_does_not_end_the_work() -> None:
    print_line("hello", FullStream())
    with Progress("embed", 2, stream=FullStream()) as progress:
        progress.advance(2)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_prints_its_last_line_once(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    stream = Stream()
    log_file = io.StringIO()
    monkeypatch.setattr(Progress, "log_file", log_file)
    with Progress("neighbours", 2, "shards", stream=stream) as progress:
        progress.advance(2)  # printed at once, and the last line too
    with Progress("long", 3, stream=stream) as progress:
        progress.advance()
        progress.advance()  # too early to be printed
    # On a terminal each update overwrites the line before it.
    lines = [line.rpartition("\r\x1b[K")[2] for line in stream.getvalue().split("\n")]
    for text in ("\n".join(lines), log_file.getvalue()):
        assert text.count("neighbours: 2/2 shards (100 %)") == 1, text
        assert text.count("long: 2/3") == 1, text
        assert text.endswith("\n")


def test_progress_shows_percentage_rate_and_time_left() -> None:
    with Progress("embed", 100, "images", done=50, stream=io.StringIO()) as progress:
        progress.started -= 10
        progress.advance(25, "note")
        assert "75/100 images (75 %), 2.5/s, 10s left  note" in progress.line()


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42s"), (754, "12m34s"), (7500, "2h05m"), (200000, "2d07h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
