"""Files that a run logs to: metrics.jsonl and TensorBoard events of a stage; run.log (run.py).

No error of these files ends the work. On a full disk, lines that cannot be written are lost; this
is reported once, and later lines are written again as soon as there is space.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dist_scan.monitoring.progress import print_line
from dist_scan.storage.atomic import append_line, write_all
from dist_scan.world.world import current

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

TENSORBOARD_RETRY_S = 10.0
"""Seconds between attempts after an error; each attempt creates a file."""


class _WriteErrorReporter:
    """Reports on stderr that writes fail, once, and later that they work again."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.failures = 0

    def report_failure(self, error: OSError) -> None:
        if self.failures == 0:
            print_line(
                f"log: cannot write {self.target}: {error.strerror}; what cannot be written is "
                "lost, the work continues"
            )
        self.failures += 1

    def report_success(self) -> None:
        if self.failures > 0:
            print_line(f"log: {self.target} can be written again; {self.failures} writes failed")
            self.failures = 0


class AppendOnlyFile:
    """A file that lines are appended to, created with the first one.

    Writing never raises OSError; an error is reported on stderr, once until writing works again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO | None = None
        self.reporter = _WriteErrorReporter(str(path))

    def write(self, text: str) -> bool:
        """Append text that ends in a newline. Returns False if it, or a part of it, is lost."""
        try:
            self._append(text.encode())
        except OSError as error:
            self.reporter.report_failure(error)
            self.close()
            return False
        self.reporter.report_success()
        return True

    def _append(self, data: bytes) -> None:
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  see close()
        append_line(self.file, data)

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        file = self.file
        self.file = None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # NFS may report only now that the disk is full.
                self.reporter.report_failure(error)


class TensorBoardWriter:
    """A file of TensorBoard events, each written at once.

    PyTorch's SummaryWriter writes from a thread: on a full disk the thread dies with a traceback,
    and the error is raised at some later row.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        # A new name each time: a file that ends in a partial event is never continued.
        unique = f"{time.time():.3f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self.path = folder / f"events.out.tfevents.{unique}"
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  see close()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event.

        Raises OSError; the file then ends in a partial event and must not be continued.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def _write(self, event: Event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self).write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """Called by RecordWriter, once per record."""
        write_all(self.file, record)

    def close(self) -> None:
        """Close the file. Raises OSError, which NFS may do only now."""
        self.file.close()


class StageLog:
    """Metrics of one stage. Only rank 0 writes; on other ranks the calls do nothing."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.enabled = current().rank == 0
        self.run_dir = run_dir
        self.stage = stage
        self.path = self.run_dir / "logs" / f"{stage}.metrics.jsonl"
        self.rows = AppendOnlyFile(self.path)
        self.tensorboard_dir = self.run_dir / "tensorboard" / stage
        self.tensorboard: TensorBoardWriter | None = None
        self.reporter = _WriteErrorReporter(f"TensorBoard events in {self.tensorboard_dir}")
        self.retry_at = 0.0

    def write_row(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics by name at an optimizer step.

        If a step is written again after a restart, the later row counts.
        """
        if self.enabled:
            self._write({"step": step, **values}, values)

    def write_timing(
        self, step: int, steps: int, sections: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Write the times of the last ``steps`` steps: {section: {mean_ms, max_ms, max_rank}}."""
        if self.enabled:
            row = {"step": step, "timing": {"steps": steps, "sections": sections}}
            self._write(row, {f"time_ms/{k}": v["mean_ms"] for k, v in sections.items()})

    def _write(self, row: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        is_written = self.rows.write(json.dumps(row) + "\n")
        if is_written and time.monotonic() >= self.retry_at:
            self._write_tensorboard(row["step"], scalars)

    def _write_tensorboard(self, step: int, scalars: Mapping[str, float]) -> None:
        try:
            if self.tensorboard is None:
                self.tensorboard = TensorBoardWriter(self.tensorboard_dir)
            self.tensorboard.write_scalars(step, scalars)
        except OSError as error:
            self.reporter.report_failure(error)
            self._close_tensorboard()
            self.retry_at = time.monotonic() + TENSORBOARD_RETRY_S
        else:
            self.reporter.report_success()

    def _close_tensorboard(self) -> None:
        writer = self.tensorboard
        self.tensorboard = None
        if writer is not None:
            with suppress(OSError):  # NFS reports failed writes here; the file is not used again.
                writer.close()

    def close(self) -> None:
        """Close all files. Never raises OSError."""
        self._close_tensorboard()
        self.rows.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in the order of their steps; incomplete lines are skipped.

    Of several rows with the same step and keys the last counts.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for row in _parse_rows(path):
        keys = tuple(sorted(key for key in row if key != "step"))
        rows[row["step"], keys] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def _parse_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row
