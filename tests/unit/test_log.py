"""metrics.jsonl: a torn line breaks no reader, a step written again counts as written last, and a full disk costs rows and nothing else."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Never

import pytest

from dist_scan.monitoring import log as module
from dist_scan.monitoring.log import JsonLinesFile, StageLog, TensorBoardWriter, read_rows
from dist_scan.monitoring.progress import Progress, format_duration, print_line


def test_torn_lines_and_repeated_steps(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("live", [False, True])
def test_progress_says_its_last_line_once(live, monkeypatch: pytest.MonkeyPatch) -> None:
    class Out(io.StringIO):
        def isatty(self):
            return live

    out, log = Out(), io.StringIO()
    monkeypatch.setattr(Progress, "log_file", log)
    with Progress("neighbours", 2, "shards", stream=out) as p:
        p.advance(2)  # the first is printed at once, and is the last too
    with Progress("long", 3, stream=out) as p:
        p.advance()
        p.advance()  # too soon to be printed
    seen = "\n".join(
        line.rpartition("\r\x1b[K")[2] for line in out.getvalue().split("\n")
    )  # a live line is written over
    for text in (seen, log.getvalue()):
        assert text.count("neighbours: 2/2 shards (100 %)") == 1 == text.count(
            "long: 2/3"
        ) and text.endswith("\n"), text


def test_progress_says_share_rate_and_time_left() -> None:
    out = io.StringIO()
    with Progress("embed", 100, "images", done=50, stream=out) as p:
        p.started -= 10
        p.advance(25, "note")
        assert "75/100 images (75 %), 2.5/s, 10s left  note" in p.line()
    assert [format_duration(s) for s in (42, 754, 7500, 200000)] == [
        "42s",
        "12m34s",
        "2h05m",
        "2d07h",
    ]


class Disk:
    """Opens files that take so many bytes more; then they raise ENOSPC, as those of a full disk do: a part is written first."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path, mode, buffering=-1):
        disk = self

        class File(io.FileIO):
            def write(self, data):
                if not disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                taken = data[: disk.room]
                disk.room -= len(taken)
                return super().write(taken)

        return File(path, mode.replace("b", ""))


def test_a_full_disk_costs_rows_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk, log = Disk(10**9), StageLog(tmp_path, "a")
    monkeypatch.setattr(module, "open", disk.open, raising=False)
    monkeypatch.setattr(module, "TENSORBOARD_RETRY_S", 0.0)
    log.write_row(1, {"loss": 3.0})
    disk.room = 9  # half a row
    for step in (2, 3, 4):
        log.write_row(step, {"loss": 2.0})
    disk.room = 10**9
    log.write_row(5, {"loss": 1.0})
    disk.room = len('{"step": 6, "loss": 0.5}\n') + 9  # the row, and a part of the event
    log.write_row(6, {"loss": 0.5})
    disk.room = 10**9
    log.write_row(7, {"loss": 0.25})
    log.close()
    assert [r["step"] for r in read_rows(log.path)] == [1, 5, 6, 7], (
        "the torn row took no other with it"
    )
    said = capfd.readouterr().err
    assert (
        said.count("metrics.jsonl: No space left on device; what cannot be written is lost")
        == 1
        == said.count("metrics.jsonl can be written again; 3 writes failed")
    ), said
    assert (
        said.count("cannot write TensorBoard events")
        == 1
        == said.count("tensorboard/a can be written again")
        and "Traceback" not in said
    ), said
    assert events(log.tensorboard_dir) == {1: 3.0, 5: 1.0, 7: 0.25}


def events(folder) -> dict[int, float]:
    """The losses by step, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            found |= {
                event.step: value.tensor.float_val[0]
                for value in event.summary.value
                if value.tag == "loss"
            }
    return found


def test_a_log_that_can_never_be_made_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    log = StageLog(tmp_path, "a")
    log.write_row(1, {"loss": 3.0})
    log.write_row(2, {"loss": 3.0})
    log.close()
    assert not JsonLinesFile(tmp_path / "logs" / "run.log").write("hello\n")
    assert capfd.readouterr().err.count("a.metrics.jsonl: File exists") == 1


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    board = TensorBoardWriter(tmp_path / "board")
    for step in (1, 2):
        board.write_scalars(step, {"loss": step / 4, "acc": 1})
    board.close()
    assert events(tmp_path / "board") == {1: 0.25, 2: 0.5}


def test_a_terminal_that_cannot_be_written_ends_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text) -> Never:
            raise OSError(errno.ENOSPC, "No space left on device")

    print_line("hello", Full())
    with Progress("embed", 2, stream=Full()) as p:
        p.advance(2)
