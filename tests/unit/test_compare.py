"""The compare command: planning and checking its runs, and running several at a time."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_scan.compare import local_runs
from dist_scan.compare.config import read_comparison
from dist_scan.compare.local_runs import LocalRuns
from dist_scan.compare.runs import Runs, plan_runs, shared_data
from dist_scan.config import ConfigError
from dist_scan.world.processes import available_cores
from tests.support.launches import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
COMPARISON = f"""
seeds: [0, 4]
members:
  a: {{config: {QUICKSTART}}}
  b: {{config: {QUICKSTART}, overrides: ["stages.pretext.epochs=3"]}}
rows: {{pixels: a.kmeans_pixels, heads: b.scan}}
baseline: pixels
"""


def planned(folder: Path, text: str) -> Runs:
    """The runs of a comparison, checked to use the same data."""
    path = folder / "comparison.yaml"
    path.write_text(text)
    out = folder / "out"
    runs = plan_runs(read_comparison(path), folder, out)
    shared_data(runs)
    return runs


def test_every_member_and_seed_has_a_folder(tmp_path: Path) -> None:
    runs = planned(tmp_path, COMPARISON)
    assert [(key, run.seed, run.run_dir.name) for key, run in runs.items()] == [
        (("a", 0), 0, "a-seed0"),
        (("b", 0), 0, "b-seed0"),
        (("a", 4), 4, "a-seed4"),
        (("b", 4), 4, "b-seed4"),
    ]
    assert runs["b", 4].stages["pretext"].epochs == 3
    assert len({run.runtime.cache_dir for run in runs.values()}) == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "baseline: pixels",
            "baseline: pixel",
            "baseline: 'pixel' is not a row; allowed: pixels, heads",
        ),
        ("b.scan", "c.scan", "does not begin with a member; allowed: a.SUBJECT, b.SUBJECT"),
        ("b.scan", "b.scam", "'scam' is not a subject of b; allowed: b.kmeans_pixels"),
        ("seeds: [0, 4]", "seeds: [4, 4]", "allowed: different numbers"),
        ("seeds:", "seed:", "seed"),
        ("stages.pretext.epochs=3", "data.train.limit=1000", "do not cluster the same images"),
        ("stages.pretext.epochs=3", "stages.pretext.epoch=3", "did you mean 'epochs'"),
        (str(QUICKSTART), "nowhere.yaml", "does not exist"),
    ],
)
def test_invalid_comparisons_are_refused_before_any_work(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        planned(tmp_path, COMPARISON.replace(before, after))


LAUNCHER = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]).parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / "began").write_text(json.dumps([time.monotonic(), os.environ["OMP_NUM_THREADS"]]))
print("output of", folder.name)
if folder.name == "a":
    time.sleep(0.3)
    (folder.parent / "data").write_text(json.dumps(time.monotonic()))
time.sleep({"fails": 0.05, "long": 30}.get(folder.name, 1.5))
(folder / "ended").write_text(json.dumps(time.monotonic()))
sys.exit(3 if folder.name == "fails" else 0)
"""
RunAll = Callable[..., tuple[int, int]]


@pytest.fixture
def run_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunAll:
    """Run members of these names by a launcher that sleeps.

    Returns the exit code and the number of runs that succeeded.
    """
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.setattr(local_runs, "LOCAL", tmp_path / "launcher.py")
    monkeypatch.setattr(local_runs, "dump", lambda run: "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(*names: str) -> tuple[int, int]:
        finished: list[int] = []
        runs: dict[str, Any] = {name: SimpleNamespace(run_dir=tmp_path / name) for name in names}
        local = LocalRuns(processes=1, at_once=2, shared_data=[tmp_path / "data"])
        return local.run_all(runs, lambda: finished.append(1)), len(finished)

    return run


def began(folder: Path) -> float:
    """When the launcher of a run began."""
    return json.loads((folder / "began").read_text())[0]


def ended(folder: Path) -> float:
    """When the launcher of a run ended."""
    return json.loads((folder / "ended").read_text())


def test_two_runs_share_the_cores_once_the_first_has_built_the_data(
    run_all: RunAll, tmp_path: Path
) -> None:
    assert run_all("a", "b", "c", "d") == (0, 4)
    a, b, c, d = (tmp_path / name for name in "abcd")
    data_built = json.loads((tmp_path / "data").read_text())
    assert data_built < began(b) < ended(a)
    assert began(c) > min(ended(a), ended(b)), "three runs at a time"
    assert began(d) > min(ended(b), ended(c)), "three runs at a time"
    threads = json.loads((b / "began").read_text())[1]
    assert threads == str(max(1, available_cores() // 2))
    assert (b / "output.txt").read_text() == "output of b\n"


def test_two_runs_start_at_once_if_the_data_exists(run_all: RunAll, tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    assert run_all("e", "f") == (0, 2)
    assert began(tmp_path / "f") < ended(tmp_path / "e")


def test_the_first_run_that_succeeds_has_built_the_data(run_all: RunAll, tmp_path: Path) -> None:
    assert run_all("g", "h", "i") == (0, 3)
    g, h, i = (tmp_path / name for name in "ghi")
    assert ended(g) < began(h)
    assert began(i) < ended(h)


def test_a_failed_run_stops_the_others_and_no_more_start(
    run_all: RunAll, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    (tmp_path / "data").touch()
    assert run_all("long", "fails", "never") == (3, 0)
    assert time.monotonic() - start < 15
    assert not (tmp_path / "long" / "ended").exists()
    assert not (tmp_path / "never").exists()
    assert "fails: ended with exit code 3; the same command resumes it" in capfd.readouterr().err


def test_a_signal_is_forwarded_to_every_run(run_all: RunAll, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        while not all((tmp_path / name / "began").exists() for name in ("long", "a")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    (tmp_path / "data").touch()
    code, _ = run_all("long", "a", "never")
    assert code == 128 + signal.SIGTERM
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "long" / "ended").exists()
    assert signal.getsignal(signal.SIGTERM) is before
