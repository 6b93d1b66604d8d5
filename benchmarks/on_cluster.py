"""What faults cost on the test cluster, a Slurm of four nodes (tests/slurm/cluster.py).

python -m benchmarks.recovery --cluster | --every-stage [--small]
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faulted_run import CONFIG, POLL_S, SAVE_EVERY_S, Goals
from benchmarks.rows import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, differences, losses
from tests.support.faults import environment
from tests.support.launches import SMALL

EPOCHS = 50
NODES = 4
MAX_IN_PLACE_S = 30.0
MAX_REQUEUED_S = 75.0
MIN_STAGE_S = 2.0
"""A kill in a shorter stage happens when the stage begins its work."""
Result = tuple[str, dict[str, Any], Goals]
"""Name of a row, figures, goals."""


class ConfigJob(Job):
    """A config on the cluster, with one rank per node."""

    def __init__(
        self, cluster: Cluster, run_dir: Path, nodes: int, config: Path, *overrides: str
    ) -> None:
        super().__init__(cluster, run_dir, nodes)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, str(ROOT / "launch" / "slurm.py"), "--nodes", str(nodes)]
        self.command = [*program, str(config), f"runtime.run_dir={run_dir}", *overrides]

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Poll every POLL_S. Raises RuntimeError with the job's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.log()[-4000:]
                raise RuntimeError(f"waited {seconds:.0f} s for {what}; {self.state()}\n{log}")
            time.sleep(POLL_S)


def run_locally(run_dir: Path, processes: int, config: Path, *overrides: str) -> None:
    """The same run without Slurm and without faults. Raises CalledProcessError."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes", str(processes)]
    command += [str(config), f"runtime.run_dir={run_dir}", *overrides]
    with open(run_dir.parent / "output.txt", "w") as output:
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)


def faults_of_a_job(folder: Path) -> Iterator[Result]:
    """Three faults from outside in one job of two nodes; then its result against a local run's."""
    config = folder / "recovery.yaml"
    config.write_text(CONFIG.format(epochs=EPOCHS, every_s=SAVE_EVERY_S))
    local_dir = folder / "local" / "run"
    run_locally(local_dir, 2, config)
    with running_cluster(folder / "slurm") as cluster:
        job = ConfigJob(cluster, folder / "nodes" / "run", 2, config).submit()
        yield measure_fault(
            job,
            "kill -9 of rank 1, relaunched in place",
            lambda: os.kill(job.ranks()[1], signal.SIGKILL),
            {"new_step_s": ("<", MAX_IN_PLACE_S)},
        )
        yield measure_fault(
            job,
            "USR2 to rank 1, queued again",
            lambda: os.kill(job.ranks()[1], signal.SIGUSR2),
            {"new_step_s": ("<", MAX_REQUEUED_S), "steps_lost": ("==", 0)},
        )
        yield measure_fault(
            job,
            "scontrol requeue",
            lambda: cluster.call("scontrol", "requeue", job.id),
            {"new_step_s": ("<", MAX_REQUEUED_S)},
        )
        job.finish()
        same_losses = losses(job.run_dir) == losses(local_dir)
        same_files = published_files(job.run_dir) == published_files(local_dir)
        figures = {
            "restarts": job.restarts(),
            "steps_lost": len(job.repeated_steps()),
            "identical": same_losses and same_files,
        }
        yield "after these three", figures, {"restarts": ("==", 2), "identical": ("==", True)}


def measure_fault(job: Job, name: str, cause: Callable[[], Any], goals: Goals) -> Result:
    """Cause a fault, and wait for the first step that had not been done before it."""
    saved_step = job.wait_training()
    repeated_before = Counter(job.repeated_steps())
    old_ranks = set(job.ranks().values())
    begin = time.monotonic()
    cause()
    job.wait(lambda: not old_ranks & set(job.ranks().values()), 60, "the ranks' end")
    exit_s = time.monotonic() - begin
    furthest = job.last_step()
    job.wait(lambda: job.last_step() > furthest, 240, "a new step")
    new_step_s = time.monotonic() - begin
    lost = list((Counter(job.repeated_steps()) - repeated_before).elements())
    figures = {
        "last_exit_s": round(exit_s, 2),
        "new_step_s": round(new_step_s, 2),
        "steps_lost": len(lost),
        "before_the_last_save": sum(step <= saved_step for step in lost),
    }
    return name, figures, {**goals, "before_the_last_save": ("==", 0)}


def published_files(run_dir: Path) -> dict[str, bytes]:
    """Every published file of weights and features, byte for byte."""
    paths = [p for p in run_dir.glob("stages/*/*/*") if p.suffix in (".safetensors", ".npy")]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def every_stage(folder: Path, small: bool, only: str) -> Iterator[Result]:
    """configs/quickstart.yaml on four nodes against four local processes.

    Undisturbed, and with a kill -9 of a random rank in every stage. small: 400 images and few
    epochs, as in the tests. only: of the two, those whose name contains this.
    """
    config = ROOT / "configs" / "quickstart.yaml"
    overrides = SMALL if small else []
    local_dir = folder / "local" / "run"
    run_locally(local_dir, NODES, config, *overrides)
    seconds = stage_seconds(local_dir)
    rng = random.Random(0)
    with running_cluster(folder / "slurm") as cluster:
        for name, with_kills in (("left alone", False), ("a rank killed in every stage", True)):
            if only not in name:
                continue
            begin = time.monotonic()
            run_dir = folder / name.replace(" ", "-") / "run"
            job = ConfigJob(cluster, run_dir, NODES, config, *overrides)
            with armed(folder / "faults.json", stage_kills(seconds, rng) if with_kills else []):
                log = job.submit().finish(1200)
            starts = stage_starts(job.run_dir)
            figures = {
                "minutes": round((time.monotonic() - begin) / 60, 1),
                "stages": len(seconds),
                "killed_in": sum(starts[stage] > 1 for stage in seconds),
                "relaunches": log.count("relaunch: "),
                "restarts": job.restarts(),
                "differences": differences(job.run_dir, local_dir),
            }
            goals = {
                "killed_in": ("==", len(seconds) if with_kills else 0),
                "restarts": ("==", 0),
                "differences": ("==", []),
            }
            size = " (small)" if small else ""
            yield f"quickstart{size} on {NODES} nodes, {name}", figures, goals
            # The first run of a checkout compiles too: a kill timed by it would come too late.
            seconds = stage_seconds(job.run_dir)


def stage_starts(run_dir: Path) -> Counter[str]:
    """How often each stage was started or resumed."""
    log = (run_dir / "logs" / "run.log").read_text()
    return Counter(re.findall(r" (\w+): (?:starts|resumes) \(", log))


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """Duration of each stage of a run, in their order."""
    manifests = sorted(
        run_dir.glob("stages/*/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns
    )
    return {path.parents[1].name: json.loads(path.read_text())["seconds"] for path in manifests}


def stage_kills(seconds: dict[str, float], rng: random.Random) -> list[dict[str, Any]]:
    """A kill -9 of a random rank in each stage, at 10 to 40 % of the stage's duration.

    In a stage that is short, as its work begins. The start after a kill enters first the stage that
    was killed, and must finish it; then it enters the next.
    """
    kills = []
    for number, stage_s in enumerate(seconds.values()):
        kill = {
            "kind": "kill",
            "rank": rng.randrange(NODES),
            "at": "stage",
            "step": min(number, 1),
        }
        if stage_s > MIN_STAGE_S:
            kill["after_s"] = round(rng.uniform(0.1, 0.4) * stage_s, 3)
        kills.append(kill)
    return kills


@contextmanager
def armed(path: Path, faults: list[dict[str, Any]]) -> Iterator[None]:
    """Arm these faults in jobs that are submitted inside the block."""
    path.write_text(json.dumps(faults))
    variables = environment(path) if faults else {}
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that runs inside the block."""
    cluster = Cluster(folder)
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()
