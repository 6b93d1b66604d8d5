"""What a stage leaves to read: metrics.jsonl (truth), TensorBoard events (for looking), run.log. None of it may end the work.

On a full disk what cannot be written is lost, said once, and tried again: rows that come later stand on lines of their own.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_scan.monitoring.progress import tell
from dist_scan.storage.atomic import append_line, write_all
from dist_scan.world.world import current

BOARD_AGAIN_S = 10.0  # every try leaves a file


class JsonLinesFile:
    """Lines at the end of a file, made when the first is written. Writing never raises OSError: it is said on stderr, once until it works again."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.lost = Path(path), None, 0

    def write(self, text: str) -> bool:
        """Append text that ends in a newline, flushed. False when it (or its end) is lost."""
        try:
            self._append(text.encode())
        except OSError as error:
            self.close()
            if not self.lost:
                tell(
                    f"log: cannot write {self.path}: {error.strerror}; its lines are lost until it can be written again (make room there), the work goes on"
                )
            self.lost += 1
            return False
        if self.lost:
            tell(f"log: {self.path} can be written again; {self.lost} lines were lost")
            self.lost = 0
        return True

    def _append(self, data: bytes) -> None:
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b", buffering=0)
        append_line(self.file, data)

    def close(self) -> None:
        """Close; the next write opens it again."""
        file, self.file = self.file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # NFS tells only now that the disk is full: the lines were lost with it
                self.lost += 1


class TensorBoardWriter:
    """A file of TensorBoard events, each written at once.

    torch's SummaryWriter writes from a thread; on a full disk that dies with a traceback and the error comes at some later row.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        self.path = (
            folder
            / f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        )  # never one with half an event
        self.file = open(self.path, "ab", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event. Raises OSError; then the file ends in half an event, and another must be begun."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(
            value=[
                Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()
            ]
        )
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self).write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """For RecordWriter: a record is one call."""
        write_all(self.file, record)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class StageLog:
    """Rows of one stage. Only rank 0 writes; the others' calls do nothing. Lines are flushed whole, one write each."""

    def __init__(self, run_dir: Path, stage: str, enabled: bool | None = None) -> None:
        self.enabled = current().rank == 0 if enabled is None else enabled
        self.run_dir, self.stage = Path(run_dir), stage
        self.path, self.board_dir = (
            self.run_dir / "logs" / f"{stage}.metrics.jsonl",
            self.run_dir / "tensorboard" / stage,
        )
        self.lines, self.board, self.board_failed, self.board_again = (
            JsonLinesFile(self.path),
            None,
            False,
            0.0,
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """One row: numbers by name at an optimizer step. A step written twice (after a restart) counts as written last."""
        if self.enabled:
            self._write({"step": step, **values}, values, step)

    def timing(self, step: int, facts: Mapping[str, Any]) -> None:
        """A row of section times: {steps, sections: {name: {mean_ms, max_ms, max_rank}}}, under a key of its own."""
        if self.enabled:
            self._write(
                {"step": step, "timing": facts},
                {f"time_ms/{name}": s["mean_ms"] for name, s in facts["sections"].items()},
                step,
            )

    def _write(self, row: Mapping[str, Any], scalars: Mapping[str, float], step: int) -> None:
        if self.lines.write(json.dumps(row) + "\n") and time.monotonic() >= self.board_again:
            self._show(scalars, step)

    def _show(self, scalars: Mapping[str, float], step: int) -> None:
        try:
            if self.board is None:
                self.board = TensorBoardWriter(self.board_dir)
            self.board.scalars(step, scalars)
        except OSError as error:
            self._drop_board()
            self.board_again = time.monotonic() + BOARD_AGAIN_S
            if not self.board_failed:
                tell(
                    f"log: cannot write TensorBoard events in {self.board_dir}: {error.strerror}; they are left out until there is room, the work goes on"
                )
            self.board_failed = True
            return
        if self.board_failed:
            self.board_failed = False
            tell(f"log: TensorBoard events in {self.board_dir} are written again")

    def _drop_board(self) -> None:
        board, self.board = self.board, None
        if board is not None:
            try:
                board.close()
            except OSError:  # of NFS; nothing is written to this file any more
                pass

    def close(self) -> None:
        """Close what is open; never raises OSError."""
        self._drop_board()
        self.lines.close()


def read_rows(path: Path) -> list[dict]:
    """Rows by step, the last of each step and kind of row, torn lines left out."""
    rows: dict[tuple, dict] = {}
    for row in _parsed(path):
        rows[(row["step"], tuple(sorted(k for k in row if k != "step")))] = row
    return sorted(rows.values(), key=lambda r: r["step"])


def _parsed(path: Path) -> Iterator[dict]:
    if not Path(path).exists():
        return
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row
