"""The cluster itself fails under a run: its controller, a node, its user's patience."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LONG, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]


def test_one_job_without_a_controller_without_a_node_and_cancelled_gives_the_undisturbed_result(
    cluster, undisturbed, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()

    job.wait_training()
    cluster.stop("slurmctld", signal.SIGKILL)
    job.wait_training()  # nobody is there
    cluster.start_controller()
    saved = job.wait_training()
    assert job.restarts() == 0 and job.log().count(": start ") == 1 and job.again() == [], (
        "the job is undisturbed"
    )

    node = cluster.call(
        "scontrol",
        "show",
        "hostnames",
        cluster.call("squeue", "-h", "-j", job.id, "-o", "%N").strip(),
    ).split()[-1]
    kill_node(cluster, job, node)
    job.wait(lambda: job.restarts() == 1, 90, "the requeue")
    cluster.start_node(int(node[1:]))
    job.wait_training()
    assert all(step > saved for step in job.again()), "a dead node: steps after the last save"
    lost = job.again()

    cluster.call("scancel", job.id)
    job.wait(lambda: job.state() in ("GONE", "CANCELLED"), 40, "the end of the job")
    job.wait(lambda: not job.ranks(), 20, "the ranks' end")
    assert not (job.run_dir / "DONE").exists()
    time.sleep(3)
    assert job.state() in ("GONE", "CANCELLED"), "it does not come back"
    job.submit().finish()
    assert job.again() == lost, "cancelled: saved first"
    job.same(undisturbed)


def kill_node(cluster: Cluster, job: Job, node: str) -> None:
    """slurmd, its step daemons and its tasks at once, by pid."""
    steps = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if _is_stepd(process, job.id, node)
    ]
    for pid in [cluster.pid(f"slurmd-{node}"), *steps, *job.ranks(node).values()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _is_stepd(process: Path, job_id: str, node: str) -> bool:
    try:
        line = (process / "cmdline").read_text()
    except OSError:
        return False
    return line.startswith(f"slurmstepd: [{job_id}.") and node in line
