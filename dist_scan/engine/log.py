"""What a stage leaves to read: metrics.jsonl (truth), TensorBoard events (for looking), one progress line."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_scan.world.world import current


class Log:
    """Rows of one stage. Only rank 0 writes; the others' calls do nothing. Lines are flushed whole, one write each."""

    def __init__(self, run_dir: Path, stage: str, enabled: bool | None = None):
        self.enabled = current().rank == 0 if enabled is None else enabled
        self.run_dir, self.stage, self.file, self.board = Path(run_dir), stage, None, None
        if not self.enabled:
            return
        folder = Path(run_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stage}.metrics.jsonl"
        _end_torn_line(self.path)
        self.file = open(self.path, "ab", buffering=0)
        self.board_dir = Path(run_dir) / "tensorboard" / stage

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """One row: numbers by name at an optimizer step. A step written twice (after a restart) counts as written last."""
        if not self.enabled:
            return
        self._write({"step": step, **values}, values, step)

    def timing(self, step: int, facts: Mapping[str, Any]) -> None:
        """A row of section times: {steps, sections: {name: {mean_ms, max_ms, max_rank}}}, under a key of its own."""
        if self.enabled:
            self._write({"step": step, "timing": facts}, {f"time_ms/{name}": s["mean_ms"] for name, s in facts["sections"].items()}, step)

    def _write(self, row: Mapping[str, Any], scalars: Mapping[str, float], step: int) -> None:
        self.file.write((json.dumps(row) + "\n").encode())
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # 1 s of imports, wanted only by who trains
            self.board = SummaryWriter(str(self.board_dir))
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self.board is not None:
            self.board.close()
        if self.file is not None:
            self.file.close()


def _end_torn_line(path: Path) -> None:
    """A killed writer may have left half a line: end it, so that the next row stands on its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as f:
            f.write(b"\n")


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
