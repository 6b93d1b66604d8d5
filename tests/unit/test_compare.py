"""The comparison: its arithmetic, its words, its page, and what it refuses before any work."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_scan.compare import local_runs
from dist_scan.compare.config import read_comparison
from dist_scan.compare.local_runs import LocalRuns
from dist_scan.compare.runs import check_same_data, plan_runs
from dist_scan.config import ConfigError
from tests.support.launches import ROOT

QUICK = ROOT / "configs" / "quickstart.yaml"


def comparison(tmp_path: Path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_comparison(path), path


WHOLE = f"""
seeds: [0, 4]
members:
  a: {{config: {QUICK}}}
  b: {{config: {QUICK}, overrides: ["stages.pretext.epochs=3"]}}
rows: {{pixels: a.kmeans_pixels, heads: b.scan}}
baseline: pixels
"""


def test_it_plans_a_folder_for_each_member_and_seed(tmp_path: Path) -> None:
    found, path = comparison(tmp_path, WHOLE)
    runs = plan_runs(found, path.parent, tmp_path / "out")
    assert [(key, run.seed, run.run_dir.name) for key, run in runs.items()] == [
        ((m, s), s, f"{m}-seed{s}") for s in (0, 4) for m in "ab"
    ]
    assert (
        runs["b", 4].stages["pretext"].epochs == 3
        and len({run.runtime.cache_dir for run in runs.values()}) == 1
    )
    check_same_data(runs, tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "baseline: pixels",
            "baseline: pixel",
            "baseline: 'pixel' is not a row; allowed: pixels, heads",
        ),
        ("b.scan", "c.scan", "names no member; allowed: a.SUBJECT, b.SUBJECT"),
        ("b.scan", "b.scam", "'scam' is not a subject of b; allowed: b.kmeans_pixels"),
        ("seeds: [0, 4]", "seeds: [4, 4]", "allowed: different numbers"),
        ("seeds:", "seed:", "seed"),
        ("stages.pretext.epochs=3", "data.train.limit=1000", "do not cluster the same images"),
        ("stages.pretext.epochs=3", "stages.pretext.epoch=3", "did you mean 'epochs'"),
        (str(QUICK), "nowhere.yaml", "does not exist"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path: Path, before, after, message) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        found, path = comparison(tmp_path, WHOLE.replace(before, after))
        check_same_data(plan_runs(found, path.parent, tmp_path / "out"), tmp_path)


LAUNCHER = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]).parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / "began").write_text(json.dumps([time.monotonic(), os.environ["OMP_NUM_THREADS"]]))
print("said by", folder.name)
if folder.name == "a":
    time.sleep(0.3)
    (folder.parent / "data").write_text(json.dumps(time.monotonic()))
time.sleep(0.05 if folder.name == "fails" else 30 if folder.name == "long" else 1.5)
(folder / "ended").write_text(json.dumps(time.monotonic()))
sys.exit(folder.name == "fails" and 3)
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs of these names by a launcher that sleeps; returns the exit code and how often a run's end was told."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.setattr(local_runs, "LOCAL", tmp_path / "launcher.py")
    monkeypatch.setattr(local_runs, "dump", lambda run: "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def go(*names: str, at_once: int):
        told, runs = [], {name: SimpleNamespace(run_dir=tmp_path / name) for name in names}
        return LocalRuns(1, at_once, [tmp_path / "data"]).run_all(
            runs, lambda: told.append(1)
        ), len(told)

    return go


def span(folder) -> tuple[float, float]:
    return json.loads((folder / "began").read_text())[0], json.loads((folder / "ended").read_text())


def test_runs_share_the_cores_and_the_first_builds_the_data_alone(started, tmp_path: Path) -> None:
    assert started("a", "b", "c", "d", at_once=2) == (0, 4)
    a, b, c, d = (span(tmp_path / name) for name in "abcd")
    assert json.loads((tmp_path / "data").read_text()) < b[0] < a[1], (
        "a alone until the data is there, then b beside it"
    )
    assert c[0] > min(a[1], b[1]) and d[0] > min(b[1], c[1]), "never three"
    threads = json.loads((tmp_path / "b" / "began").read_text())[1]
    assert (
        threads == str(max(1, len(os.sched_getaffinity(0)) // 2))
        and (tmp_path / "b" / "output.txt").read_text() == "said by b\n"
    )
    assert (
        started("e", "f", at_once=2) == (0, 2) and span(tmp_path / "f")[0] < span(tmp_path / "e")[1]
    )
    (tmp_path / "data").unlink()
    assert started("g", "h", "i", at_once=2) == (0, 3), (
        "nobody says that the data is built: the first that ends well has built it"
    )
    assert (
        span(tmp_path / "g")[1] < span(tmp_path / "h")[0]
        and span(tmp_path / "i")[0] < span(tmp_path / "h")[1]
    )


def test_a_run_that_fails_ends_the_others_and_nothing_is_started_after_it(
    started, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    (tmp_path / "data").touch()
    assert started("long", "fails", "never", at_once=2) == (3, 0)
    assert (
        time.monotonic() - began < 15
        and not (tmp_path / "long" / "ended").exists()
        and not (tmp_path / "never").exists()
    )
    assert "fails: ended with 3; the same command resumes it" in capfd.readouterr().err


def test_a_notice_reaches_every_run(started, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        while not all((tmp_path / name / "began").exists() for name in ("long", "a")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    (tmp_path / "data").touch()
    assert started("long", "a", "never", at_once=2)[0] == 128 + signal.SIGTERM
    assert (
        not (tmp_path / "never").exists()
        and not (tmp_path / "long" / "ended").exists()
        and signal.getsignal(signal.SIGTERM) is before
    )
