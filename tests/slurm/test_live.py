"""launch/slurm.py on a real Slurm of four nodes: the same result as local processes, whatever is done to the job from outside."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.slurm.jobs import LONG, Job
from tests.support.launches import run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]


def test_four_nodes_equal_four_local_processes_bit_for_bit(cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path / "nodes", 4).submit()
    again = job.try_submit()
    assert (
        again.returncode == 2
        and f"belongs to job {job.id}" in again.stdout
        and "Traceback" not in again.stdout
    )
    local = run(tmp_path / "local", processes=4)
    assert local.returncode == 0, local.stdout
    log = job.finish()
    assert "4 ranks" in log and "done: the run is complete" in log and job.restarts() == 0
    job.same(tmp_path / "local")


def test_one_job_killed_told_preempted_and_queued_again_gives_the_undisturbed_result(
    cluster, undisturbed, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "run", 2, *LONG, flags=("--partition", "low")).submit()

    saved = job.wait_training()
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.wait(lambda: job.log().count(": start ") == 2, 60, "the relaunch in place")
    saved_then = job.wait_training()
    assert (
        all(step > saved for step in job.again())
        and "relaunch: " in job.log()
        and job.restarts() == 0
    )
    lost = job.again()

    os.kill(job.ranks()[1], signal.SIGUSR2)
    job.wait(lambda: "requeue: SIGUSR2" in job.log(), 30, "the save")
    job.wait_training()
    assert job.restarts() == 1 and job.again() == lost and job.saved() > saved_then, (
        "a notice to one rank: queued once, no step lost"
    )

    cluster.call(
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N",
        "4",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 1",
    )
    job.wait(lambda: job.log().count("requeue: SIGUSR2") == 2, 60, "the preemption")
    saved = job.wait_training()
    assert job.restarts() == 2 and job.again() == lost, (
        "a real higher-priority partition: no step lost"
    )

    cluster.call("scontrol", "requeue", job.id)
    log = job.finish()
    assert job.restarts() == 3 and log.count("relaunch: ") == 1
    assert all(step > saved for step in (Counter(job.again()) - Counter(lost)).elements()), (
        "queued again without a notice: steps after the last save"
    )
    job.same(undisturbed)


def test_a_mistake_ends_the_job_and_is_named(cluster, tmp_path: Path) -> None:
    """The images vanish between the submission and the start."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(400):
        Image.new("RGB", (32, 32), (i % 255, 3 * i % 255, 7 * i % 255)).save(images / f"{i}.png")
    blocker = cluster.call(
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N",
        "4",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 60",
    ).strip()
    job = Job(cluster, tmp_path / "run", 1, f"data.train.source={images}").submit()
    shutil.rmtree(images)
    cluster.call("scancel", blocker)
    job.wait(lambda: job.state() in ("GONE", "FAILED"), 60, "the end")
    assert (
        "fatal_error: " in job.log()
        and str(images) in job.log()
        and job.log().count(": start ") == 1
    )
