"""launch/slurm.py on a real Slurm of four nodes: the same result as local processes, whatever happens to the job."""
from __future__ import annotations

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest

from tests.launches import report, run
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LONG, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two local processes, nothing happens to them."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder, *LONG, processes=2)
    assert done.returncode == 0, done.stdout
    return folder


def same(job: Job, folder) -> None:
    assert report(job.run_dir) == report(folder)
    assert pq.read_table(job.run_dir / "assignments.parquet").equals(pq.read_table(folder / "assignments.parquet"))


def lost_steps(job: Job) -> int:
    """Steps that were trained more than once."""
    rows = map(json.loads, (job.run_dir / "logs" / "pretext.metrics.jsonl").read_text().splitlines())
    steps = [row["step"] for row in rows if "loss" in row]  # others hold section times
    return len(steps) - len(set(steps))


def test_four_nodes_equal_four_local_processes_bit_for_bit(cluster, tmp_path):
    job = Job(cluster, tmp_path / "nodes", 4).submit()
    again = job.try_submit()
    assert again.returncode == 2 and f"belongs to job {job.id}" in again.stdout and "Traceback" not in again.stdout
    log = job.finish()
    assert "4 ranks" in log and "done: the run is done" in log and job.restarts() == 0
    local = run(tmp_path / "local", processes=4)
    assert local.returncode == 0, local.stdout
    same(job, tmp_path / "local")


def test_a_killed_rank_is_relaunched_in_place(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    os.kill(job.ranks()[1], signal.SIGKILL)
    log = job.finish()
    assert log.count(": start ") == 2 and "relaunch: " in log and job.restarts() == 0
    same(job, undisturbed)


def test_a_notice_to_one_rank_requeues_once_and_loses_nothing(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    os.kill(job.ranks()[1], signal.SIGUSR2)
    job.wait(lambda: "requeue: SIGUSR2" in job.log(), 30, "the save")
    job.finish()
    assert job.restarts() == 1 and lost_steps(job) == 0
    same(job, undisturbed)


def test_a_higher_partition_preempts_and_the_run_comes_back(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG, flags=("--partition", "low")).submit()
    job.wait_training()
    other = cluster.call("sbatch", "--parsable", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5").strip()
    job.finish()
    assert other and job.restarts() == 1 and lost_steps(job) == 0
    same(job, undisturbed)


def test_at_the_time_limit_it_saves_and_comes_back(cluster, tmp_path):
    """Slurm sends the notice up to half a minute early: of two minutes a start has one or more. The run itself has no end here."""
    job = Job(cluster, tmp_path / "run", 2, *LONG, "stages.pretext.epochs=5000", flags=("--time", "2", "--notice-s", "30")).submit()
    job.wait_training()
    job.wait(lambda: "requeue: SIGUSR2" in job.log(), 180, "the notice")
    before = job.steps()
    job.wait(lambda: job.steps() > before, 180, "more steps after the limit")
    cluster.call("scancel", job.id)
    job.wait(lambda: not job.ranks(), 40, "the ranks' end")
    assert job.restarts() == 1 and lost_steps(job) == 0 and "relaunch" not in job.log()


def test_scancel_saves_and_does_not_come_back(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    cluster.call("scancel", job.id)
    job.wait(lambda: job.state() in ("GONE", "CANCELLED"), 40, "the end of the job")
    job.wait(lambda: not job.ranks(), 20, "the ranks' end")
    assert not (job.run_dir / "DONE").exists()
    time.sleep(3)
    assert job.state() in ("GONE", "CANCELLED")
    job.submit()
    job.finish()
    assert lost_steps(job) == 0
    same(job, undisturbed)


def test_a_node_dies_and_returns(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    node = cluster.call("squeue", "-h", "-j", job.id, "-o", "%N").strip()
    last = cluster.call("scontrol", "show", "hostnames", node).split()[-1]
    kill_node(cluster, job, last)
    job.wait(lambda: job.restarts() == 1, 90, "the requeue")
    cluster.start_node(int(last[1:]))
    job.finish()
    same(job, undisturbed)


def kill_node(cluster: Cluster, job: Job, node: str) -> None:
    """slurmd, its step daemons and its tasks at once, by pid."""
    daemon = cluster.pid(f"slurmd-{node}")
    steps = [int(p.split("/")[2]) for p in map(str, __import__("pathlib").Path("/proc").glob("[0-9]*")) if _is_stepd(p, job.id, node)]
    for pid in [daemon, *steps, *job.ranks(node).values()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _is_stepd(process: str, job_id: str, node: str) -> bool:
    try:
        with open(f"{process}/cmdline") as f:
            line = f.read()
    except OSError:
        return False
    return line.startswith(f"slurmstepd: [{job_id}.") and node in line


def test_the_controller_dies_and_returns(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    cluster.stop("slurmctld", signal.SIGKILL)
    time.sleep(3)
    cluster.start_controller()
    job.finish()
    assert job.restarts() == 0 and job.log().count(": start ") == 1
    same(job, undisturbed)


def test_scontrol_requeue_resumes(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    cluster.call("scontrol", "requeue", job.id)
    job.finish()
    assert job.restarts() == 1
    same(job, undisturbed)


def test_a_mistake_ends_the_job_and_is_named(cluster, tmp_path):
    """The images vanish between the submission and the start."""
    import shutil

    images = tmp_path / "images"
    images.mkdir()
    from PIL import Image

    for i in range(400):
        Image.new("RGB", (32, 32), (i % 255, 3 * i % 255, 7 * i % 255)).save(images / f"{i}.png")
    blocker = cluster.call("sbatch", "--parsable", "-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60").strip()
    job = Job(cluster, tmp_path / "run", 1, f"data.train.source={images}").submit()
    shutil.rmtree(images)
    cluster.call("scancel", blocker)
    job.wait(lambda: job.state() in ("GONE", "FAILED"), 60, "the end")
    assert "mistake: " in job.log() and str(images) in job.log() and job.log().count(": start ") == 1
