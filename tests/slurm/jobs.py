"""Runs on the test cluster: submit as a user does, find ranks, wait for what should happen, count what was done again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from tests.slurm.cluster import Cluster
from tests.support.launches import ROOT, SMALL, environment, read_report

LONG = [
    "stages.pretext.epochs=60",
    "runtime.checkpoint_s=1",
    "runtime.log_every=1",
]  # 240 small steps: long enough to be disturbed four times


class Job:
    """One run folder submitted to the cluster."""

    def __init__(
        self,
        cluster: Cluster,
        run_dir: Path,
        nodes: int,
        *overrides: str,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.command = [
            sys.executable,
            str(ROOT / "launch" / "slurm.py"),
            "--nodes",
            str(nodes),
            *flags,
            str(ROOT / "configs" / "quickstart.yaml"),
            f"runtime.run_dir={run_dir}",
            *SMALL,
            *overrides,
        ]

    def submit(self) -> Job:
        """Submit; fails the test when it is refused."""
        done = self.try_submit()
        assert done.returncode == 0, done.stdout
        self.id = json.loads((self.run_dir / "slurm" / "job.json").read_text())["job_id"]
        return self

    def try_submit(self) -> subprocess.CompletedProcess:
        """Submit; the finished command with its output."""
        env = environment() | {"SLURM_CONF": str(self.cluster.conf)}
        return subprocess.run(
            self.command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.run_dir.parent,
            timeout=120,
        )

    def log(self) -> str:
        """The batch script's output so far."""
        path = self.run_dir / "slurm" / f"{self.id}.out"
        return path.read_text() if path.exists() else ""

    def at(self) -> int:
        """The pretext's furthest step so far."""
        return max((row["step"] for row in rows(self.run_dir)), default=0)

    def saved(self) -> int:
        """The step of the pretext's newest checkpoint."""
        found = self.run_dir.glob("stages/pretext/*/work/checkpoints/step-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)

    def again(self) -> list[int]:
        """The steps that were trained more than once, each as often as it was one time too many."""
        steps = [row["step"] for row in rows(self.run_dir)]
        return sorted((Counter(steps) - Counter(set(steps))).elements())

    def state(self) -> str:
        """squeue's word for it; GONE when it has left the queue."""
        return (
            self.cluster.call("squeue", "-h", "-j", self.id, "-o", "%T", check=False).strip()
            or "GONE"
        )

    def ranks(self, node: str | None = None) -> dict[int, int]:
        """{rank: pid} of the live ranks, on one node if named."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"dist_scan.run", str(self.run_dir).encode()]:
                    env = dict(
                        pair.partition("=")[::2]
                        for pair in (process / "environ").read_bytes().decode().split("\0")
                    )
                    if node is None or env["SLURMD_NODENAME"] == node:
                        found[int(env["RANK"])] = int(process.name)
            except (OSError, ValueError, KeyError):
                continue
        return found

    def wait(self, until, seconds: float, what: str) -> None:
        """Poll until it is so; fails with the job's log."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, (
                f"waited {seconds} s for {what}; {self.state()}\n{self.log()[-4000:]}"
            )
            time.sleep(0.2)

    def wait_training(self, steps: int = 10) -> int:
        """Wait until the pretext is so many steps further than it ever was, and has a checkpoint. The newest checkpoint's step: what comes
        after it may be done again, nothing before."""
        goal = self.at() + steps
        self.wait(lambda: self.at() >= goal and self.saved() > 0, 240, f"step {goal}")
        return self.saved()

    def finish(self, seconds: float = 300) -> str:
        """Wait until the job has left the queue and the run is done; returns its log."""
        self.wait(
            lambda: (self.run_dir / "DONE").exists() and self.state() in ("GONE", "COMPLETED"),
            seconds,
            "the end",
        )
        return self.log()

    def restarts(self) -> int:
        """How often Slurm has queued it again."""
        text = self.cluster.call("scontrol", "show", "job", self.id)
        return int(text.split("Restarts=")[1].split()[0])

    def same(self, folder: Path) -> None:
        """Fails unless the run's losses, clusters and report are those of an undisturbed one, bit for bit."""
        assert not differences(self.run_dir, folder)


def differences(one: Path, other: Path) -> list[str]:
    """Which of losses, report and clusters two runs do not share to the last bit."""
    tables = [pq.read_table(run / "assignments.parquet") for run in (one, other)]
    same = {
        "losses": losses(one) == losses(other),
        "report": read_report(one) == read_report(other),
        "clusters": tables[0].equals(tables[1]),
    }
    return [what for what, equal in same.items() if not equal]


def rows(run_dir: Path) -> list[dict]:
    """Rows of the pretext's metrics that belong to a step, in the order of writing; torn ones left out."""
    found = []
    path = run_dir / "logs" / "pretext.metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in found if "loss" in row]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; a step that was trained twice must have given the same, bit for bit."""
    found: dict[int, float] = {}
    for row in rows(run_dir):
        assert found.setdefault(row["step"], row["loss"]) == row["loss"], (
            f"step {row['step']} gave another loss"
        )
    return found
