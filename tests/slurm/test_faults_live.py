"""Faults armed in the ranks of a tiny run on the test cluster."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import losses
from tests.slurm.tiny import LocalRun, TinyJob, published_files
from tests.support.faulted_run import LONG, PRETEXT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# A training that embeds all images before each epoch, between the pretext and the rest.
STAGES = (
    PRETEXT
    + """
  clusters: {kind: train, images: train, network: {name: resnet_small, width: 4},
             method: {kind: deepcluster, num_clusters: 6, whiten_dim: 6}, recipes: [digits],
             optimizer: {kind: sgd, lr: 0.05}, epochs: 1, global_batch: 24}"""
    + LONG
)
STOP = {"kind": "signal", "signal": "SIGTERM"}
"""Slurm does not end the job, so its ranks are relaunched in place."""
FAULTS = (
    {"kind": "exception", "rank": 1, "step": 5},
    # In a save, before its manifest is written.
    {"kind": "kill", "rank": 0, "at": "manifest", "step": 2},
    # Saves that fail; training continues.
    {"kind": "full", "rank": 0, "at": "write", "step": 1},
    {"kind": "read_only", "rank": 0, "at": "prepare", "step": 3},
    # In begin_epoch; four of its shards are left, so the next fault is at the second of `embed`.
    {**STOP, "rank": 1, "at": "shard", "step": 3},
    {"kind": "kill", "rank": 1, "at": "shard", "step": 5},
    {"kind": "signal", "rank": 0, "at": "shard"},
    # In k-means.
    {**STOP, "rank": 0, "at": "iteration", "step": 1},
    {"kind": "kill", "rank": 1, "at": "iteration"},
    # In the neighbour search.
    {**STOP, "rank": 1, "at": "shard"},
    # After the end, too late to matter.
    {"kind": "signal", "rank": 1, "at": "done"},
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LocalRun:
    """The run of two local processes without faults, in the background."""
    return LocalRun(tmp_path_factory.mktemp("undisturbed"), processes=2, stages=STAGES)


def assert_equals(job: TinyJob, run_dir: Path) -> None:
    assert published_files(job.run_dir) == published_files(run_dir)
    assert losses(job.run_dir) == losses(run_dir)


def test_a_taken_port_and_eleven_faults_do_not_change_the_result(
    cluster: Cluster, undisturbed: LocalRun, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        job = TinyJob(
            cluster,
            tmp_path / "nodes",
            2,
            armed_faults=FAULTS,
            stages=STAGES,
            taken_port=port,
        )
        log = job.submit().finish(500)
    assert job.fired() == [(fault["kind"], fault.get("at", "step")) for fault in FAULTS], log
    assert job.restarts() == 1, log
    assert log.count("requeue: SIGUSR2") == 1, log
    assert log.count("relaunch: ") == 8, log
    assert log.count("relaunch: the rendezvous port was taken; trying another") == 1
    assert log.count("relaunch: SIGTERM") == 3
    assert "relaunch: rank 1: InjectedError" in log
    assert log.rstrip().endswith("done: the run is complete")
    assert (job.run_dir / "logs" / "run.log").read_text().count("could not save") == 2

    assert job.repeated_shards() == []
    stages = {name.split("/")[1] for name, _ in job.finished_shards}
    assert stages == {"clusters", "features", "neighbours"}
    assert_equals(job, undisturbed.finish())


def test_the_watchdog_ends_a_stopped_rank_and_a_stuck_loader(
    cluster: Cluster, undisturbed: LocalRun, tmp_path: Path
) -> None:
    """The watchdog of the rank that waits ends it; srun ends the other, which leaves its stacks."""
    undisturbed_dir = undisturbed.finish()  # before the start: the limits below are short
    faults = (
        {"kind": "stop", "rank": 1, "step": 6},
        {"kind": "hang", "rank": 1, "at": "batch", "step": 12},
    )
    limits = ("runtime.step_limit_s=8", "runtime.section_limit_s=60")
    job = TinyJob(
        cluster, tmp_path / "nodes", 2, *limits, armed_faults=faults, stages=STAGES
    ).submit()
    log = job.finish(300)
    assert [kind for kind, _ in job.fired()] == ["stop", "hang"], log
    assert job.restarts() == 0, log
    assert log.count("relaunch: ") == 2, log

    logs = job.run_dir / "logs"
    waiting, faulty = ((logs / f"stacks-rank0000{rank}.txt").read_text() for rank in (0, 1))
    assert waiting.count("pretext: no progress for") == 2
    assert "all_reduce" in waiting
    assert "limit: 8 s" in waiting
    assert "was suspended" in faulty
    assert "loader.py" in faulty
    logged = [json.loads(line) for line in (logs / "faults.jsonl").read_text().splitlines()]
    assert ["Stuck" in fault["fault"] for fault in logged] == [True, True]
    assert [fault["advanced"] for fault in logged] == [True, True]
    assert_equals(job, undisturbed_dir)
