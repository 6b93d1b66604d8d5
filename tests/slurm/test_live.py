"""launch/slurm.py on the test cluster: the same result as local processes, also after faults."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import UndisturbedRun
from tests.slurm.jobs import GONE, LONG, Job, block_all_nodes
from tests.support.launches import run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]


def test_four_nodes_equal_four_local_processes_bit_for_bit(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "nodes", 4).submit()
    second = job.try_submit()
    assert second.returncode == 2
    assert f"belongs to job {job.id}" in second.stdout
    assert "Traceback" not in second.stdout

    local = run(tmp_path / "local", processes=4)
    assert local.returncode == 0, local.stdout
    log = job.finish()
    assert "4 ranks" in log
    assert "done: the run is complete" in log
    assert job.restarts() == 0
    job.assert_equals(tmp_path / "local")


def test_a_killed_signalled_preempted_and_requeued_job_equals_the_undisturbed_run(
    cluster: Cluster, undisturbed: UndisturbedRun, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "run", 2, *LONG, flags=("--partition", "low")).submit()

    # A killed rank: relaunched in place; steps after the last save are repeated.
    saved = job.wait_training()
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.wait(lambda: job.log().count(": start ") == 2, 60, "the relaunch in place")
    saved_by_relaunch = job.wait_training()
    assert all(step > saved for step in job.repeated_steps())
    assert "relaunch: " in job.log()
    assert job.restarts() == 0
    lost = job.repeated_steps()

    # A notice to one rank: requeued once, no step is lost.
    os.kill(job.ranks()[1], signal.SIGUSR2)
    job.wait(lambda: "requeue: SIGUSR2" in job.log(), 30, "the save")
    job.wait_training()
    assert job.restarts() == 1
    assert job.repeated_steps() == lost
    assert job.last_saved_step() > saved_by_relaunch

    # A preemption by a partition of higher priority: no step is lost.
    block_all_nodes(cluster, seconds=1)
    job.wait(lambda: job.log().count("requeue: SIGUSR2") == 2, 60, "the preemption")
    saved = job.wait_training()
    assert job.restarts() == 2
    assert job.repeated_steps() == lost

    # A requeue without a notice: steps after the last save are repeated.
    cluster.call("scontrol", "requeue", job.id)
    log = job.finish()
    assert job.restarts() == 3
    assert log.count("relaunch: ") == 1
    lost_by_requeue = (Counter(job.repeated_steps()) - Counter(lost)).elements()
    assert all(step > saved for step in lost_by_requeue)
    job.assert_equals(undisturbed.finish())


def test_a_fatal_error_ends_the_job_and_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """The images vanish between the submission and the start."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(400):
        colour = (i % 255, 3 * i % 255, 7 * i % 255)
        Image.new("RGB", (32, 32), colour).save(images / f"{i}.png")
    blocking_job = block_all_nodes(cluster, seconds=60)
    job = Job(cluster, tmp_path / "run", 1, f"data.train.source={images}").submit()
    shutil.rmtree(images)
    cluster.call("scancel", blocking_job)
    job.wait(lambda: job.state() in (GONE, "FAILED"), 60, "the end")
    assert "fatal_error: " in job.log()
    assert str(images) in job.log()
    assert job.log().count(": start ") == 1
