"""Runs on the test cluster: submit as a user does, find ranks, wait for what should happen."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.launches import ROOT, SMALL, environment
from tests.slurm.cluster import Cluster

LONG = ["stages.pretext.epochs=20", "runtime.checkpoint_s=1"]  # 80 small steps: long enough to be disturbed


class Job:
    """One run folder submitted to the cluster."""

    def __init__(self, cluster: Cluster, run_dir: Path, nodes: int, *overrides: str, flags: tuple[str, ...] = ()):
        self.cluster, self.run_dir = cluster, run_dir
        self.command = [sys.executable, str(ROOT / "launch" / "slurm.py"), "--nodes", str(nodes), *flags, str(ROOT / "configs" / "quickstart.yaml"),
                        f"runtime.run_dir={run_dir}", *SMALL, *overrides]

    def submit(self) -> "Job":
        """Submit; fails the test when it is refused."""
        done = self.try_submit()
        assert done.returncode == 0, done.stdout
        self.id = json.loads((self.run_dir / "slurm" / "job.json").read_text())["job_id"]
        return self

    def try_submit(self) -> subprocess.CompletedProcess:
        """Submit; the finished command with its output."""
        env = environment() | {"SLURM_CONF": str(self.cluster.conf)}
        return subprocess.run(self.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.run_dir.parent, timeout=120)

    def log(self) -> str:
        """The batch script's output so far."""
        path = self.run_dir / "slurm" / f"{self.id}.out"
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        """Rows of the pretext's metrics so far: one a step for the first 20, then one in ten."""
        path = self.run_dir / "logs" / "pretext.metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def state(self) -> str:
        """squeue's word for it; GONE when it has left the queue."""
        return self.cluster.call("squeue", "-h", "-j", self.id, "-o", "%T", check=False).strip() or "GONE"

    def ranks(self, node: str | None = None) -> dict[int, int]:
        """{rank: pid} of the live ranks, on one node if named."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"dist_scan.run", str(self.run_dir).encode()]:
                    env = dict(pair.partition("=")[::2] for pair in (process / "environ").read_bytes().decode().split("\0"))
                    if node is None or env["SLURMD_NODENAME"] == node:
                        found[int(env["RANK"])] = int(process.name)
            except (OSError, ValueError, KeyError):
                continue
        return found

    def wait(self, until, seconds: float, what: str) -> None:
        """Poll until it is so; fails with the job's log."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}; {self.state()}\n{self.log()[-4000:]}"
            time.sleep(0.2)

    def wait_training(self, rows: int = 12) -> None:
        """Wait until the pretext has a checkpoint and so many metric rows."""
        saved = self.run_dir / "stages"
        self.wait(lambda: self.steps() >= rows and any(saved.glob("pretext/*/work/checkpoints/*/manifest.json")), 240, "training")

    def finish(self, seconds: float = 300) -> str:
        """Wait until the job has left the queue and the run is done; returns its log."""
        self.wait(lambda: (self.run_dir / "DONE").exists() and self.state() in ("GONE", "COMPLETED"), seconds, "the end")
        return self.log()

    def restarts(self) -> int:
        """How often Slurm has queued it again."""
        text = self.cluster.call("scontrol", "show", "job", self.id)
        return int(text.split("Restarts=")[1].split()[0])
