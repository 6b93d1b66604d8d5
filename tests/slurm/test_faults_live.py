"""Rows 2 to 5, 8, 11, 12 and 20 of RELIABILITY.md's catalogue on the real Slurm: faults armed in the ranks of a tiny run."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.slurm.jobs import losses
from tests.slurm.tiny import Tiny, local, results
from tests.support.faulted_run import LONG, PRETEXT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# a training whose epochs begin with a look at all images, between the pretext and the rest
STAGES = (
    PRETEXT
    + """
  clusters: {kind: train, images: train, network: {name: resnet_small, width: 4}, method: {kind: deepcluster, num_clusters: 6, whiten_dim: 6},
             recipes: [digits], optimizer: {kind: sgd, lr: 0.05}, epochs: 1, global_batch: 24}"""
    + LONG
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two processes."""
    return local(tmp_path_factory.mktemp("whole"), processes=2, stages=STAGES)


def test_one_job_through_a_taken_port_and_eleven_faults_gives_the_undisturbed_result(
    cluster, whole, tmp_path: Path
) -> None:
    leave = {
        "kind": "signal",
        "signal": "SIGTERM",
    }  # Slurm lets the job run on: relaunched in place
    faults = (
        {"kind": "exception", "rank": 1, "step": 5},
        {
            "kind": "kill",
            "rank": 0,
            "at": "manifest",
            "step": 2,
        },  # in a save, its manifest not yet written
        {"kind": "full", "rank": 0, "at": "write", "step": 1},  # training goes on
        {"kind": "read_only", "rank": 0, "at": "prepare", "step": 3},
        {**leave, "rank": 1, "at": "shard", "step": 3},  # in begin_epoch
        {
            "kind": "kill",
            "rank": 1,
            "at": "shard",
            "step": 5,
        },  # four were left of begin_epoch: the second of the embed stage
        {"kind": "signal", "rank": 0, "at": "shard"},
        {**leave, "rank": 0, "at": "iteration", "step": 1},
        {"kind": "kill", "rank": 1, "at": "iteration"},
        {**leave, "rank": 1, "at": "shard"},  # in the neighbour search
        {"kind": "signal", "rank": 1, "at": "done"},
    )  # too late to matter
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        job = Tiny(
            cluster,
            tmp_path / "nodes",
            2,
            faults=faults,
            stages=STAGES,
            taken_port=taken.getsockname()[1],
        ).submit()
        log = job.finish(500)
    assert job.fired() == [(fault["kind"], fault.get("at", "step")) for fault in faults], log
    assert (
        job.restarts() == 1 and log.count("requeue: SIGUSR2") == 1 and log.count("relaunch: ") == 8
    ), log
    assert (
        log.count("relaunch: the rendezvous port was taken; trying another") == 1
        and log.count("relaunch: SIGTERM") == 3
    )
    assert "relaunch: rank 1: InjectedError" in log and log.rstrip().endswith(
        "done: the run is complete"
    )
    assert (job.run_dir / "logs" / "run.log").read_text().count("could not save") == 2
    assert job.shards_twice() == [] and {name.split("/")[1] for name, _ in job.seen} == {
        "clusters",
        "features",
        "neighbours",
    }
    assert results(job.run_dir) == results(whole) and losses(job.run_dir) == losses(whole)


def test_a_stopped_rank_and_a_stuck_loader_are_noticed_and_the_job_goes_on(
    cluster, whole, tmp_path: Path
) -> None:
    """Row 4: the watchdog of the rank that waits; srun wakes and ends the other, which leaves its stacks as well."""
    faults = (
        {"kind": "stop", "rank": 1, "step": 6},
        {"kind": "hang", "rank": 1, "at": "batch", "step": 12},
    )
    job = Tiny(
        cluster,
        tmp_path / "nodes",
        2,
        "runtime.step_limit_s=8",
        "runtime.section_limit_s=60",
        faults=faults,
        stages=STAGES,
    ).submit()
    log = job.finish(300)
    assert (
        [kind for kind, _ in job.fired()] == ["stop", "hang"]
        and job.restarts() == 0
        and log.count("relaunch: ") == 2
    ), log
    stacks = [(job.run_dir / "logs" / f"stacks-rank0000{rank}.txt").read_text() for rank in (0, 1)]
    assert (
        stacks[0].count("pretext: no progress for") == 2
        and "all_reduce" in stacks[0]
        and "limit: 8 s" in stacks[0]
    )
    assert "was stopped" in stacks[1] and "loader.py" in stacks[1]
    remembered = [
        json.loads(line)
        for line in (job.run_dir / "logs" / "faults.jsonl").read_text().splitlines()
    ]
    assert [("Stuck" in fault["fault"], fault["advanced"]) for fault in remembered] == [
        (True, True)
    ] * 2
    assert results(job.run_dir) == results(whole) and losses(job.run_dir) == losses(whole)
