"""metrics.jsonl: a torn line breaks no reader, and a step written again counts as written last."""
from __future__ import annotations

import io

from dist_scan.engine.log import Log, read_rows
from dist_scan.progress import Progress, duration


def test_torn_lines_and_repeated_steps(tmp_path):
    log = Log(tmp_path, "a", enabled=True)
    log.row(1, {"loss": 3.0})
    log.row(2, {"loss": 2.0})
    log.close()
    path = tmp_path / "logs" / "a.metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    log = Log(tmp_path, "a", enabled=True)
    log.row(2, {"loss": 1.5})
    log.close()
    assert read_rows(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]
    assert list((tmp_path / "tensorboard" / "a").iterdir())


def test_progress_says_share_rate_and_time_left():
    out = io.StringIO()
    with Progress("embed", 100, "images", done=50, stream=out) as p:
        p.started -= 10
        p.advance(25, "note")
        assert "75/100 images (75 %), 2.5/s, 10s left  note" in p.line()
    assert [duration(s) for s in (42, 754, 7500, 200000)] == ["42s", "12m34s", "2h05m", "2d07h"]
