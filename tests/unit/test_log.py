"""metrics.jsonl: a torn line breaks no reader, and a step written again counts as written last."""
from __future__ import annotations

import io

import pytest

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


@pytest.mark.parametrize("live", [False, True])
def test_progress_says_its_last_line_once(live, monkeypatch):
    class Out(io.StringIO):
        def isatty(self):
            return live

    out, log = Out(), io.StringIO()
    monkeypatch.setattr(Progress, "copy_to", log)
    with Progress("neighbours", 2, "shards", stream=out) as p:
        p.advance(2)  # the first is printed at once, and is the last too
    with Progress("long", 3, stream=out) as p:
        p.advance()
        p.advance()  # too soon to be printed
    seen = "\n".join(line.rpartition("\r\x1b[K")[2] for line in out.getvalue().split("\n"))  # a live line is written over
    for text in (seen, log.getvalue()):
        assert text.count("neighbours: 2/2 shards (100 %)") == 1 == text.count("long: 2/3") and text.endswith("\n"), text


def test_progress_says_share_rate_and_time_left():
    out = io.StringIO()
    with Progress("embed", 100, "images", done=50, stream=out) as p:
        p.started -= 10
        p.advance(25, "note")
        assert "75/100 images (75 %), 2.5/s, 10s left  note" in p.line()
    assert [duration(s) for s in (42, 754, 7500, 200000)] == ["42s", "12m34s", "2h05m", "2d07h"]
