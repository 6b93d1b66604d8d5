"""The batch script on the test cluster, with ranks that only react to signals.

Shows what the script does for a run if the ranks cannot. The ranks' program takes the place of
dist_scan/run.py; the script, recovery.py, Slurm and the signals are real.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Self

import pytest

from dist_scan.config import SlurmConfig
from launch.sbatch_script import BatchJob, build_script
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SlurmJob, block_all_nodes
from tests.support.launches import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
# The beginning of the ranks' program: the first start of a rank runs the lines that follow, a later
# one is done at once.
RANK = """
import json, os, signal, sys, time
from pathlib import Path

run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
received, notices = [], (signal.SIGUSR2, signal.SIGTERM)

def install_handlers():  # as dist_scan.run does
    for number in notices:
        signal.signal(number, lambda number, frame: received.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, notices)

def wait_for_signal():
    while not received:
        time.sleep(0.05)
    stop = {"signal": int(min(received))}  # USR2 before TERM
    (run / "STOPPED").write_text(json.dumps(stop))
    sys.exit(0)

starts = len(list(run.glob(f"start-*-{rank}")))  # its own: another rank may be a moment ahead
name = starts if rank == 0 else time.time()
(run / f"start-{name}-{rank}").write_text(json.dumps({**os.environ, "PID": os.getpid()}))
if starts > 0 and rank == 0:
    (run / "DONE").write_text("now")
if starts > 0 or (run / "DONE").exists():
    sys.exit(0)
"""
WAIT = "install_handlers(); wait_for_signal()"


class ToyJob(SlurmJob):
    """A job of the real batch script whose ranks run a few lines."""

    def __init__(
        self, cluster: Cluster, folder: Path, program: str, nodes: int = 2, **options: Any
    ) -> None:
        super().__init__(cluster, folder / "a run")
        checkout = folder / "code"
        package = checkout / "dist_scan"
        package.mkdir(parents=True)
        (checkout / "launch").symlink_to(ROOT / "launch")
        (package / "__init__.py").write_text("")
        (package / "run.py").write_text(RANK + program)
        (self.run_dir / "slurm").mkdir(parents=True)
        settings = SlurmConfig(nodes=nodes, **options)
        self.script = build_script(BatchJob(settings, self.run_dir, "toy", 3, checkout=checkout))

    def submit(self) -> Self:
        """Submit the script with sbatch."""
        path = self.run_dir / "slurm" / "script.sh"
        path.write_text(self.script)
        self.id = self.cluster.call("sbatch", "--parsable", str(path)).strip()
        return self

    def rank_environments(self) -> list[dict[str, Any]]:
        """Environment variables of every start of a rank, with its PID."""
        return [json.loads(path.read_text()) for path in self.run_dir.glob("start-*")]

    def wait_ranks(self) -> None:
        """Wait until both ranks have started and installed their handlers."""
        self.wait(lambda: len(list(self.run_dir.glob("start-*"))) >= 2, 60, "the ranks")
        time.sleep(0.3)

    def signal_ranks(self, number: int) -> None:
        """Send a signal to the ranks' processes."""
        for variables in self.rank_environments():
            os.kill(variables["PID"], number)

    def finish(self, seconds: float = 90) -> str:
        """Wait until the job has ended; returns its final state."""
        self.wait(lambda: self.info()["JobState"] in FINAL_STATES, seconds, "the job's end")
        return self.info()["JobState"]

    def assert_requeued_and_done(self, seconds: float = 90) -> None:
        """Fail unless the job is requeued once and the run is then complete."""
        assert self.finish(seconds) == "COMPLETED", self.log()
        assert self.restarts() == 1, self.log()
        assert (self.run_dir / "DONE").exists(), self.log()


def test_a_preemption_with_only_term_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """Without --signal Slurm sends TERM at the start of the grace time, as scancel does."""
    job = ToyJob(cluster, tmp_path, WAIT, partition="low")
    job.script = job.script.replace("#SBATCH --signal=USR2@120\n", "")
    assert "--signal" not in job.script
    job.submit().wait_ranks()
    block_all_nodes(cluster, seconds=1)
    job.assert_requeued_and_done()
    assert "requeue: SIGTERM" in job.log()


def test_a_time_limit_that_the_ranks_ignore_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """Stuck ranks: the script requeues the job when Slurm ends it."""
    job = ToyJob(cluster, tmp_path, "time.sleep(600)", time="5", notice_s=5).submit()
    job.wait_ranks()
    job.end_at(2)
    job.assert_requeued_and_done(180)
    assert "requeue: Slurm ends the job before the ranks have stopped" in job.log()


@pytest.mark.parametrize("old_env", [False, True])
def test_a_notice_before_the_handlers_are_installed_is_kept(
    cluster: Cluster, tmp_path: Path, old_env: bool
) -> None:
    """While a rank imports, env keeps the signals blocked; an old env, a line of Python."""
    setup = ("env() { return 125; }",) if old_env else ()
    job = ToyJob(cluster, tmp_path, f"time.sleep(3); {WAIT}", setup=setup)
    job.submit().wait_ranks()
    cluster.call("scancel", "--signal=USR2", job.id)
    job.assert_requeued_and_done()
    assert "requeue: SIGUSR2" in job.log()
    assert job.log().count(": start 0") == 2


def test_the_requeue_waits_for_a_controller_that_is_down(cluster: Cluster, tmp_path: Path) -> None:
    job = ToyJob(cluster, tmp_path, WAIT).submit()
    job.wait_ranks()
    cluster.stop("slurmctld")  # a clean stop: after a kill it would not know a job this new
    job.signal_ranks(signal.SIGUSR2)
    job.wait(lambda: "requeue: SIGUSR2" in job.log(), 60, "the requeue")
    time.sleep(4)
    cluster.start_controller()
    job.assert_requeued_and_done(240)


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = ToyJob(cluster, tmp_path, WAIT).submit()
    job.wait_ranks()
    cluster.call("scancel", job.id)
    assert job.finish() == "CANCELLED"
    time.sleep(2)
    assert job.restarts() == 0
    assert not (job.run_dir / "DONE").exists()
    assert "requeue" not in job.log()
    assert "relaunch" not in job.log()


def test_term_to_the_ranks_alone_does_not_end_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Sent to one rank about an older step of the same number, while the job continues."""
    job = ToyJob(cluster, tmp_path, WAIT).submit()
    job.wait_ranks()
    job.signal_ranks(signal.SIGTERM)
    assert job.finish() == "COMPLETED", job.log()
    assert job.restarts() == 0
    assert (job.run_dir / "DONE").exists(), job.log()
    assert "relaunch: SIGTERM" in job.log()
    assert "Slurm has not ended this job" in job.log()


def test_a_run_folder_in_use_ends_the_job_and_names_the_holder(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = ToyJob(cluster, tmp_path, WAIT)
    with open(job.run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("process 123 on elsewhere", file=lock, flush=True)
        assert job.submit().finish() == "FAILED"
    assert "in use by process 123 on elsewhere; this job ends" in job.log()
    assert job.rank_environments() == []


def test_the_job_waits_for_the_lock_of_its_own_dead_node(cluster: Cluster, tmp_path: Path) -> None:
    """A file server frees a dead node's lock late: the requeued job must not end because of it."""
    job = ToyJob(cluster, tmp_path, "(run / 'DONE').write_text('now')", nodes=1)
    with open(job.run_dir / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own_lock = 'echo -n "job $SLURM_JOB_ID on gone" >"$RUN/lock"\nexec 9>>'
        job.script = job.script.replace("exec 9>>", own_lock)
        job.submit()
        message = "earlier start of this job still holds"
        job.wait(lambda: message in job.log(), 60, "the message")
        time.sleep(1)
        assert job.rank_environments() == []
    assert job.finish() == "COMPLETED"
    assert "done: " in job.log()


def test_every_rank_gets_its_cores_and_its_place(cluster: Cluster, tmp_path: Path) -> None:
    program = """
import subprocess
if rank == 0:
    step = os.environ["SLURM_JOB_ID"] + ".0"
    command = ["scontrol", "show", "step", "-o", step]
    (run / "step").write_text(subprocess.run(command, capture_output=True, text=True).stdout)
    (run / "DONE").write_text("now")
"""
    job = ToyJob(cluster, tmp_path, program, processes_per_node=2, cpus_per_task=2)
    job.submit().finish()
    # 2 nodes x 2 ranks x 2 cores; srun would take 4 cores by default.
    assert "CPUs=8 " in (job.run_dir / "step").read_text()
    threads = os.environ.get("OMP_NUM_THREADS", "2")  # a value set at submission is kept
    ranks = sorted(job.rank_environments(), key=lambda variables: int(variables["RANK"]))
    for rank, variables in enumerate(ranks):
        assert variables["RANK"] == str(rank)
        assert variables["LOCAL_RANK"] == str(rank % 2)
        assert variables["LOCAL_WORLD_SIZE"] == "2"
        assert variables["WORLD_SIZE"] == "4"
        assert variables["MASTER_ADDR"] == "127.0.0.1"
        assert variables["OMP_NUM_THREADS"] == threads
    assert len(ranks) == 4
    assert len({variables["MASTER_PORT"] for variables in ranks}) == 1
