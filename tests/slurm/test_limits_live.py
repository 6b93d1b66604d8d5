"""A run that needs many of its time limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LONG, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# Slurm checks time limits every 30 s and gives the notice at the last check that leaves notice_s.
# With this limit that is the next check, and the check after it would end the job.
LIMIT_S = 34


def test_four_time_limits_cost_no_step(cluster: Cluster, tmp_path: Path) -> None:
    """The run has too many epochs to end within the test."""
    overrides = [*LONG, "stages.pretext.epochs=5000"]
    flags = ("--time", "5", "--notice-s", "3")
    job = Job(cluster, tmp_path / "run", 2, *overrides, flags=flags).submit()
    for limit in (1, 2, 3, 4):
        job.wait_training()
        job.end_at(LIMIT_S)
        wait_for_requeue(job, limit)
        assert job.last_saved_step() == job.last_step(), "it stopped with its last step saved"
    job.wait_training()
    cluster.call("scancel", job.id)
    job.wait(lambda: not job.ranks(), 40, "the ranks' end")
    assert job.restarts() == 4
    assert job.repeated_steps() == []
    assert "relaunch" not in job.log()


def wait_for_requeue(job: Job, number: int) -> None:
    job.wait(lambda: job.log().count("requeue: SIGUSR2") == number, 150, f"requeue {number}")
