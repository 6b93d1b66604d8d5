"""The timer of a stage saves its seconds in the background."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from dist_scan.monitoring import stage_timer
from dist_scan.monitoring.stage_timer import StageTimer
from dist_scan.storage.artifacts import WORK, ArtifactStore


def test_stopping_waits_for_a_slow_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the write would bring back the work folder that publishing has removed."""
    began = threading.Event()
    finished = threading.Event()
    write_text = stage_timer.write_text

    def write_slowly(path: Path, text: str) -> None:
        began.set()
        time.sleep(0.3)
        write_text(path, text)
        finished.set()

    monkeypatch.setattr(stage_timer, "write_text", write_slowly)
    monkeypatch.setattr(StageTimer, "SAVE_EVERY_S", 0.01)
    store = ArtifactStore(tmp_path)
    folder = store.folder("heads", "a" * 16)
    timer = StageTimer(folder / WORK / "seconds", enabled=True)
    assert began.wait(10)
    assert timer.stop() > 0.2
    assert finished.is_set()
    store.publish("heads", "a" * 16, {"kind": "train"})
    assert [file.name for file in folder.iterdir()] == ["manifest.json"]
