"""Jobs on the test cluster: submit as a user does, find the ranks, wait, count repeated steps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq

from launch.records import read_objects
from tests.slurm.cluster import Cluster
from tests.support.launches import ROOT, SMALL, environment, read_report

LONG = ["stages.pretext.epochs=60", "runtime.checkpoint_s=1", "runtime.log_every=1"]
"""240 small steps: long enough for four faults."""
GONE = "GONE"
"""State of a job that has left the queue."""


class SlurmJob:
    """A job of the cluster that runs in a run folder."""

    id: str

    def __init__(self, cluster: Cluster, run_dir: Path) -> None:
        self.cluster = cluster
        self.run_dir = run_dir

    def log(self) -> str:
        """The batch script's output so far."""
        path = self.run_dir / "slurm" / f"{self.id}.out"
        return path.read_text() if path.exists() else ""

    def info(self) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.cluster.call("scontrol", "show", "job", "-o", self.id).split()
        pairs = [word.partition("=") for word in words]
        return {key: value for key, _, value in pairs}

    def state(self) -> str:
        """State as squeue reports it; GONE if the job has left the queue."""
        squeue = ("squeue", "-h", "-j", self.id, "-o", "%T")
        return self.cluster.call(*squeue, check=False).strip() or GONE

    def restarts(self) -> int:
        """How often Slurm has requeued it."""
        return int(self.info()["Restarts"])

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Poll until the condition holds; fails with the job's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"waited {seconds} s for {what}; {self.state()}\n{self.log()[-4000:]}"
            )
            time.sleep(0.1)

    def end_at(self, seconds: float) -> None:
        """Move the job's time limit to `seconds` from now.

        Options give it in minutes only. slurmctld looks for jobs at their limit every 30 s.
        """
        end = datetime.now() + timedelta(seconds=seconds)
        time_text = end.strftime("%Y-%m-%dT%H:%M:%S")
        self.cluster.call("scontrol", "update", f"JobId={self.id}", f"EndTime={time_text}")


def block_all_nodes(cluster: Cluster, seconds: int) -> str:
    """Submit a job of higher priority that takes all nodes; returns its id."""
    options = ("-p", "high", "-N", "4", "--exclusive", "-o", "/dev/null")
    return cluster.call("sbatch", "--parsable", *options, "--wrap", f"sleep {seconds}").strip()


class Job(SlurmJob):
    """The quickstart in a run folder, submitted through launch/slurm.py."""

    def __init__(
        self,
        cluster: Cluster,
        run_dir: Path,
        nodes: int,
        *overrides: str,
        flags: tuple[str, ...] = (),
    ) -> None:
        super().__init__(cluster, run_dir)
        program = [sys.executable, str(ROOT / "launch" / "slurm.py"), "--nodes", str(nodes)]
        config = str(ROOT / "configs" / "quickstart.yaml")
        self.command = [*program, *flags, config, f"runtime.run_dir={run_dir}", *SMALL, *overrides]

    def submit(self) -> Self:
        """Submit; fails if the submission is refused."""
        done = self.try_submit()
        assert done.returncode == 0, done.stdout
        self.id = json.loads((self.run_dir / "slurm" / "job.json").read_text())["job_id"]
        return self

    def try_submit(self) -> subprocess.CompletedProcess[str]:
        """Submit; returns the finished command with its output."""
        return subprocess.run(
            self.command,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.run_dir.parent,
            timeout=120,
        )

    def environment(self) -> dict[str, str]:
        """Environment of the submission."""
        return environment(SLURM_CONF=str(self.cluster.config))

    def last_step(self) -> int:
        """The pretext's furthest step so far."""
        return max((row["step"] for row in step_rows(self.run_dir)), default=0)

    def last_saved_step(self) -> int:
        """The step of the pretext's newest checkpoint."""
        manifests = self.run_dir.glob("stages/pretext/*/work/checkpoints/step-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in manifests), default=0)

    def repeated_steps(self) -> list[int]:
        """Steps that were done more than once, each as often as it was repeated."""
        steps = [row["step"] for row in step_rows(self.run_dir)]
        return sorted((Counter(steps) - Counter(set(steps))).elements())

    def ranks(self, node: str | None = None) -> dict[int, int]:
        """{rank: pid} of the living ranks, on all nodes or on one."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[1:4] != [b"-m", b"dist_scan.run", str(self.run_dir).encode()]:
                    continue
                pairs = (process / "environ").read_bytes().decode().split("\0")
                variables = dict(pair.partition("=")[::2] for pair in pairs)
                if node in (None, variables["SLURMD_NODENAME"]):
                    found[int(variables["RANK"])] = int(process.name)
            except (OSError, ValueError, KeyError):  # the process ends at this moment
                continue
        return found

    def wait_training(self, steps: int = 10) -> int:
        """Wait for so many new steps and a checkpoint; returns the newest checkpoint's step.

        A fault after that may repeat the steps after the checkpoint, but none before it.
        """
        goal = self.last_step() + steps
        self.wait(
            lambda: self.last_step() >= goal and self.last_saved_step() > 0, 240, f"step {goal}"
        )
        return self.last_saved_step()

    def finish(self, seconds: float = 300) -> str:
        """Wait until the run is complete and the job has left the queue; returns its log."""
        self.wait(
            lambda: (self.run_dir / "DONE").exists() and self.state() in (GONE, "COMPLETED"),
            seconds,
            "the end",
        )
        return self.log()

    def assert_equals(self, run_dir: Path) -> None:
        """Fail unless losses, clusters and report are those of the other run, bit for bit."""
        assert not differences(self.run_dir, run_dir)


def differences(one: Path, other: Path) -> list[str]:
    """Which of losses, report and clusters differ between two runs."""
    tables = [pq.read_table(run_dir / "assignments.parquet") for run_dir in (one, other)]
    are_equal = {
        "losses": losses(one) == losses(other),
        "report": read_report(one) == read_report(other),
        "clusters": tables[0].equals(tables[1]),
    }
    return [name for name, equal in are_equal.items() if not equal]


def step_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of the pretext's metrics that belong to a step, in the order of writing."""
    rows = read_objects(run_dir / "logs" / "pretext.metrics.jsonl")
    return [row for row in rows if "loss" in row]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; a repeated step must have given the same loss bit for bit."""
    found: dict[int, float] = {}
    for row in step_rows(run_dir):
        first = found.setdefault(row["step"], row["loss"])
        assert first == row["loss"], f"step {row['step']} gave another loss"
    return found
