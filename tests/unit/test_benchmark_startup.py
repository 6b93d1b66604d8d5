"""benchmarks/startup.py with a launcher that does nothing but start: what is counted, when a start counts as done, that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rows import ROOT
from benchmarks.startup import Checkout, checkouts, end, family_s

BURN = "import time\nwhile time.process_time() < 0.4: pass\n"
LAUNCHER = """import pathlib, subprocess, sys, time
run_dir = pathlib.Path([w for w in sys.argv if w.startswith("runtime.run_dir=")][0].partition("=")[2])
{first}
(run_dir / "logs").mkdir(parents=True)
(run_dir / "logs" / "pretext.metrics.jsonl").write_text("{{}}")
time.sleep(60)
"""


def test_all_processes_of_a_start_are_counted() -> None:
    """The one that was started, a child that lives, and one that has ended."""
    child = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {BURN!r}]); exec({BURN!r}); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        assert family_s(process.pid) >= 0.7
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def checkout(folder, first: str) -> Checkout:
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "local.py").write_text(LAUNCHER.format(first=first))
    return Checkout(folder, folder / "work")


def test_a_start_lasts_until_its_first_step_and_is_ended_then(tmp_path: Path) -> None:
    began = time.monotonic()
    took = checkout(tmp_path / "good", "time.sleep(0.5)").first_step("c.yaml", 1, cold=False)
    assert 0.5 <= took.wall_s < 20 and time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match="no step: .*no such setting"):
        checkout(tmp_path / "bad", "sys.exit('no such setting')").first_step("c.yaml", 1, cold=True)


def test_the_earlier_commit_has_a_worktree_of_its_own_while_it_is_measured() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: there are no earlier commits")
    with checkouts("HEAD") as versions:
        place = versions["before"].root
        assert list(versions) == ["now", "before"] and (place / "launch" / "local.py").is_file()
    assert not place.exists()


def test_a_launcher_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    deaf.stdout.readline()
    waits = deaf.wait
    monkeypatch.setattr(deaf, "wait", lambda limit=None: waits(0.5 if limit else None))
    end(deaf)
    assert deaf.returncode == -9
