"""benchmarks/startup.py with a launcher that only starts: what is counted, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rows import ROOT
from benchmarks.startup import Checkout, checkouts, end_process, family_cpu_s

USE_CPU = "import time\nwhile time.process_time() < 0.4: pass\n"
CHILD = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {USE_CPU!r}])
exec({USE_CPU!r})
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
LAUNCHER = """
import pathlib, sys, time
word = [word for word in sys.argv if word.startswith("runtime.run_dir=")][0]
run_dir = pathlib.Path(word.partition("=")[2])
{first}
(run_dir / "logs").mkdir(parents=True)
(run_dir / "logs" / "pretext.metrics.jsonl").write_text("{{}}")
time.sleep(60)
"""
IGNORES_TERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
time.sleep(60)
"""


def test_cpu_time_of_all_processes_of_a_start_is_counted() -> None:
    """The process itself, a living child, and a grandchild that has ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert family_cpu_s(process.pid) >= 0.7
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def write_checkout(folder: Path, first_line: str) -> Checkout:
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "local.py").write_text(LAUNCHER.format(first=first_line))
    return Checkout(folder, folder / "work")


def test_a_start_lasts_until_its_first_step_and_is_then_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    checkout = write_checkout(tmp_path / "good", "time.sleep(0.5)")
    assert 0.5 <= checkout.first_step("c.yaml", 1, cold=False).wall_s < 20
    assert time.monotonic() - begin < 30
    checkout = write_checkout(tmp_path / "bad", "sys.exit('no such setting')")
    with pytest.raises(RuntimeError, match="no step: .*no such setting"):
        checkout.first_step("c.yaml", 1, cold=True)


def test_the_earlier_commit_has_a_worktree_while_it_is_measured() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout: there are no earlier commits")
    with checkouts("HEAD") as versions:
        root = versions["before"].root
        assert list(versions) == ["now", "before"]
        assert (root / "launch" / "local.py").is_file()
    assert not root.exists()


def test_a_launcher_that_ignores_term_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", IGNORES_TERM], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    wait = process.wait
    monkeypatch.setattr(process, "wait", lambda limit=None: wait(0.5 if limit else None))
    end_process(process)
    assert process.returncode == -9
