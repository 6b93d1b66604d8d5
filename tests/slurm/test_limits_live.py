"""RELIABILITY.md's row 10: a run that needs many of its time limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.jobs import LONG, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_four_time_limits_cost_no_step(cluster, tmp_path: Path) -> None:
    """A minute each; Slurm sends the notice up to half a minute early. The run itself has no end here."""
    job = Job(
        cluster,
        tmp_path / "run",
        2,
        *LONG,
        "stages.pretext.epochs=5000",
        flags=("--time", "1", "--notice-s", "3"),
    ).submit()
    came = [0]
    for time in (1, 2, 3, 4):
        job.wait(lambda: job.log().count("requeue: SIGUSR2") == time, 150, f"notice {time}")
        came.append(job.at())
        assert job.saved() == job.at(), "it left with its last step saved"
    assert len(set(came)) > 2, (
        f"{came}: a busy machine may need a minute for a start, but not for all of them"
    )
    job.wait(lambda: job.at() > came[-1], 150, "more steps after the last limit")
    cluster.call("scancel", job.id)
    job.wait(lambda: not job.ranks(), 40, "the ranks' end")
    assert job.restarts() == 4 and job.again() == [] and "relaunch" not in job.log()
