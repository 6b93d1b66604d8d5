"""Faults of the cluster during a run: its controller, a node; and a cancelled job."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import UndisturbedRun
from tests.slurm.jobs import GONE, LONG, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]


def test_a_job_that_loses_controller_and_node_and_is_cancelled_equals_the_undisturbed_run(
    cluster: Cluster, undisturbed: UndisturbedRun, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()

    # A controller that dies and returns does not affect the job.
    job.wait_training()
    cluster.stop("slurmctld", signal.SIGKILL)
    job.wait_training()
    cluster.start_controller()
    saved = job.wait_training()
    assert job.restarts() == 0
    assert job.log().count(": start ") == 1
    assert job.repeated_steps() == []

    # A node that dies: requeued; steps after the last save are repeated.
    nodes = cluster.call("squeue", "-h", "-j", job.id, "-o", "%N").strip()
    node = cluster.call("scontrol", "show", "hostnames", nodes).split()[-1]
    kill_node(cluster, job, node)
    job.wait(lambda: job.restarts() == 1, 90, "the requeue")
    cluster.start_node(int(node[1:]))
    job.wait_training()
    assert all(step > saved for step in job.repeated_steps())
    lost = job.repeated_steps()

    # scancel: the job saves, ends, and is not requeued.
    cluster.call("scancel", job.id)
    job.wait(lambda: job.state() in (GONE, "CANCELLED"), 40, "the end of the job")
    job.wait(lambda: not job.ranks(), 20, "the ranks' end")
    assert not (job.run_dir / "DONE").exists()
    time.sleep(3)
    assert job.state() in (GONE, "CANCELLED")

    job.submit().finish()
    assert job.repeated_steps() == lost, "the cancelled job had saved"
    job.assert_equals(undisturbed.finish())


def kill_node(cluster: Cluster, job: Job, node: str) -> None:
    """Kill a node's slurmd, step daemons and tasks at once."""
    step_daemons = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if is_step_daemon(process, job.id, node)
    ]
    daemon = cluster.pid(f"slurmd-{node}")
    assert daemon is not None
    for pid in (daemon, *step_daemons, *job.ranks(node).values()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_step_daemon(process: Path, job_id: str, node: str) -> bool:
    try:
        command = (process / "cmdline").read_text()
    except OSError:
        return False
    return command.startswith(f"slurmstepd: [{job_id}.") and node in command
