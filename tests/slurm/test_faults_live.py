"""More of the fault catalogue (RELIABILITY.md) on the real Slurm: rows 2, 6, 11, 12, 18 and 19."""
from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.launches import run
from tests.slurm.jobs import LONG, Job
from tests.slurm.test_live import same, undisturbed  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def killed(job: Job, rank: int, number: int = signal.SIGKILL) -> None:
    """Signal one rank, whenever it lives."""
    job.wait(lambda: rank in job.ranks(), 60, f"rank {rank}")
    os.kill(job.ranks()[rank], number)


def lines(job: Job) -> str:
    path = job.run_dir / "logs" / "run.log"
    return path.read_text() if path.exists() else ""


def losses(run_dir) -> list[tuple[int, float]]:
    """(step, loss) of every row, in the order they were written."""
    rows = [json.loads(line) for line in (run_dir / "logs" / "pretext.metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_rank_0_killed_and_the_newest_checkpoint_flipped(cluster, undisturbed, tmp_path):  # noqa: F811
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    job.wait_training()
    saved = next(job.run_dir.glob("stages/pretext/*/work")) / "checkpoints"
    job.wait(lambda: len(list(saved.glob("step-*/manifest.json"))) >= 2, 60, "two checkpoints")
    ranks = job.ranks()
    for pid in ranks.values():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)  # nothing is being written now
    newest = max(saved.glob("step-*"))
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (newest / "state.pt").write_bytes(data)
    os.kill(ranks[0], signal.SIGKILL)
    os.kill(ranks[1], signal.SIGCONT)
    log = job.finish()
    assert log.count(": start ") == 2 and f"{newest} is bad (state.pt does not match its sha256)" in lines(job)
    for line in (job.run_dir / "logs" / "pretext.metrics.jsonl").read_text().splitlines():
        json.loads(line)  # no torn line
    again: dict[int, float] = {}
    for step, loss in losses(job.run_dir):
        assert again.setdefault(step, loss) == loss, "a step trained twice gives the same loss, bit for bit"
    same(job, undisturbed)


def test_a_notice_during_start_up_is_honoured_and_a_done_run_does_nothing(cluster, undisturbed, tmp_path):  # noqa: F811
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    killed(job, 1, signal.SIGUSR2)  # it imports still
    job.finish()
    assert "requeue: SIGUSR2" in job.log() and job.restarts() == 1
    same(job, undisturbed)
    before = lines(job).count("skipped")
    job.submit().finish()
    assert lines(job).count("skipped") > before + 10 and lines(job).rsplit("skipped", 1)[1].count("starts") == 0
    same(job, undisturbed)


def test_a_kill_in_every_kind_of_stage(cluster, undisturbed, tmp_path):  # noqa: F811
    job = Job(cluster, tmp_path / "run", 2, *LONG).submit()
    for number, stage in enumerate(("features", "kmeans_features", "neighbours", "heads", "selflabelling", "evaluate")):
        job.wait(lambda: f" {stage}: starts" in lines(job), 180, stage)
        killed(job, number % 2)
        job.wait(lambda: job.log().count(": start ") == number + 2, 60, "the relaunch")
    job.finish()
    assert job.restarts() == 0 and job.log().count("relaunch: ") == 6
    same(job, undisturbed)


def test_four_nodes_then_two_then_three_are_one_run(cluster, tmp_path):
    """The same images at each step on any number of ranks: in fp64 nothing hides a difference."""
    exact = ["stages.pretext.epochs=30", "stages.pretext.precision=fp64", "runtime.checkpoint_s=2", "runtime.log_every=1"]
    for nodes, rows in ((4, 22), (2, 50)):
        job = Job(cluster, tmp_path / "run", nodes, *exact).submit()
        job.wait_training(rows)
        cluster.call("scancel", job.id)
        job.wait(lambda: job.state() == "GONE", 40, "the end of the job")
    job = Job(cluster, tmp_path / "run", 3, *exact).submit()
    job.finish()
    assert "3 ranks" in job.log()
    one = run(tmp_path / "one", *exact)
    assert one.returncode == 0, one.stdout
    expected, got = dict(losses(tmp_path / "one")), losses(job.run_dir)
    assert len(got) == len(expected) == 120, "no step was lost, none trained twice"
    assert all(abs(expected[step] - loss) < 1e-5 for step, loss in got)
