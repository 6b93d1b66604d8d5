"""What faults cost on a real Slurm of four nodes on this machine (tests/slurm/cluster.py): python -m benchmarks.recovery --cluster | --every-stage [--small]"""

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

from benchmarks.faulted_run import CONFIG, LOOK_S, SAVE_EVERY_S
from benchmarks.rows import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, differences, losses
from tests.support.faults import environment as fault_environment
from tests.support.launches import SMALL

EPOCHS, NODES = 50, 4
IN_PLACE_S, REQUEUED_S = 30.0, 75.0
Figures = tuple[str, dict[str, Any], dict[str, tuple[str, Any]]]
"""A row's name, its figures, their goals."""


class Submitted(Job):
    """A config on the cluster, with a rank on each node."""

    def __init__(
        self, cluster: Cluster, run_dir: Path, nodes: int, config: Path, *overrides: str
    ) -> None:
        super().__init__(cluster, run_dir, nodes)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.command = [
            sys.executable,
            str(ROOT / "launch" / "slurm.py"),
            "--nodes",
            str(nodes),
            str(config),
            f"runtime.run_dir={run_dir}",
            *overrides,
        ]

    def wait(self, until: Callable[[], Any], seconds: float, what: str) -> None:
        """Poll closely. Raises RuntimeError with the job's log."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"waited {seconds:.0f} s for {what}; {self.state()}\n{self.log()[-4000:]}"
                )
            time.sleep(LOOK_S)


def locally(run_dir: Path, processes: int, config: Path, *overrides: str) -> None:
    """The same without Slurm and undisturbed. Raises CalledProcessError."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run_dir.parent / "said.txt", "w") as said:
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "launch" / "local.py"),
                "--processes",
                str(processes),
                str(config),
                f"runtime.run_dir={run_dir}",
                *overrides,
            ],
            stdout=said,
            stderr=subprocess.STDOUT,
            check=True,
        )


def faults_of_a_job(folder: Path) -> Iterator[Figures]:
    """Three faults in one job of two nodes, one after another, from outside; then its end against a local run's."""
    config = folder / "recovery.yaml"
    config.write_text(CONFIG.format(epochs=EPOCHS, every_s=SAVE_EVERY_S))
    locally(folder / "local" / "run", 2, config)
    with running(folder / "slurm") as cluster:
        job = Submitted(cluster, folder / "nodes" / "run", 2, config).submit()
        yield fault(
            job,
            "kill -9 of rank 1, relaunched in place",
            lambda: os.kill(job.ranks()[1], signal.SIGKILL),
            IN_PLACE_S,
            None,
        )
        yield fault(
            job,
            "USR2 to rank 1, queued again",
            lambda: os.kill(job.ranks()[1], signal.SIGUSR2),
            REQUEUED_S,
            0,
        )
        yield fault(
            job,
            "scontrol requeue",
            lambda: cluster.call("scontrol", "requeue", job.id),
            REQUEUED_S,
            None,
        )
        job.finish()
        same = losses(job.run_dir) == losses(folder / "local" / "run") and weights(
            job.run_dir
        ) == weights(folder / "local" / "run")
        figures = {"restarts": job.restarts(), "steps_lost": len(job.again()), "identical": same}
        yield "after these three", figures, {"restarts": ("==", 2), "identical": ("==", True)}


def fault(
    job: Job, name: str, strike: Callable[[], Any], most_s: float, lost: int | None
) -> Figures:
    """Strike, and wait for the first step that had not been done before. lost: steps that may be done again (None: those after the last save)."""
    saved, before = job.wait_training(), Counter(job.again())
    old, struck = set(job.ranks().values()), time.monotonic()
    strike()
    job.wait(lambda: not old & set(job.ranks().values()), 60, "the ranks' end")
    left, furthest = time.monotonic() - struck, job.at()
    job.wait(lambda: job.at() > furthest, 240, "a new step")
    new_s, again = time.monotonic() - struck, list((Counter(job.again()) - before).elements())
    figures = {
        "last_exit_s": round(left, 2),
        "new_step_s": round(new_s, 2),
        "steps_lost": len(again),
        "before_the_last_save": sum(step <= saved for step in again),
    }
    return (
        name,
        figures,
        {"new_step_s": ("<", most_s), "before_the_last_save": ("==", 0)}
        | ({} if lost is None else {"steps_lost": ("==", lost)}),
    )


def weights(run_dir: Path) -> dict[str, bytes]:
    """Every published file of weights and features, byte for byte."""
    return {
        str(p.relative_to(run_dir)): p.read_bytes()
        for p in run_dir.glob("stages/*/*/*")
        if p.suffix in (".safetensors", ".npy")
    }


def every_stage(folder: Path, small: bool, only: str) -> Iterator[Figures]:
    """configs/quickstart.yaml on four nodes, against four local processes: left alone, and with a kill -9 of a random rank in every stage.
    small: 400 images and few epochs, as in the live tests. only: of the two, those whose name holds this."""
    config, chance, less = (
        ROOT / "configs" / "quickstart.yaml",
        random.Random(0),
        SMALL if small else (),
    )
    locally(folder / "local" / "run", NODES, config, *less)
    seconds = stage_seconds(folder / "local" / "run")
    with running(folder / "slurm") as cluster:
        for name, kill in (("left alone", False), ("a rank killed in every stage", True)):
            if only not in name:
                continue
            began, job = (
                time.monotonic(),
                Submitted(cluster, folder / name.replace(" ", "-") / "run", NODES, config, *less),
            )
            with armed(folder / "faults.json", kills(seconds, chance) if kill else []):
                log = job.submit().finish(1200)
            begun = Counter(
                re.findall(
                    r" (\w+): (?:starts|resumes) \(", (job.run_dir / "logs" / "run.log").read_text()
                )
            )
            figures = {
                "minutes": round((time.monotonic() - began) / 60, 1),
                "stages": len(seconds),
                "killed_in": sum(begun[stage] > 1 for stage in seconds),
                "relaunches": log.count("relaunch: "),
                "restarts": job.restarts(),
                "differences": differences(job.run_dir, folder / "local" / "run"),
            }
            goals = {
                "killed_in": ("==", len(seconds) * kill),
                "restarts": ("==", 0),
                "differences": ("==", []),
            }
            yield (
                f"quickstart{' (small)' if small else ''} on {NODES} nodes, {name}",
                figures,
                goals,
            )
            seconds = stage_seconds(
                job.run_dir
            )  # the first run of a checkout compiles too: a kill timed by it would come after the stage's end


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """How long each stage of a run took, in their order."""
    done = sorted(
        run_dir.glob("stages/*/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns
    )
    return {path.parents[1].name: json.loads(path.read_text())["seconds"] for path in done}


def kills(seconds: dict[str, float], chance: random.Random) -> list[dict[str, Any]]:
    """A kill -9 of a random rank inside each stage, at 10 to 40 % of the seconds that it took alone; of less than two: as its work begins. The start after a
    kill passes the stage that was killed first, and must bring it to its end; then it passes the next."""
    return [
        {
            "kind": "kill",
            "rank": chance.randrange(NODES),
            "at": "stage",
            "step": min(place, 1),
            "after_s": round(chance.uniform(0.1, 0.4) * taken, 3) if taken > 2 else 0,
        }
        for place, taken in enumerate(seconds.values())
    ]


@contextmanager
def armed(file: Path, faults: list[dict[str, Any]]) -> Iterator[None]:
    """What is submitted meanwhile has these faults ahead of it."""
    file.write_text(json.dumps(faults))
    variables = fault_environment(file) if faults else {}
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster that is up, and down afterwards."""
    cluster = Cluster(folder)
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()
