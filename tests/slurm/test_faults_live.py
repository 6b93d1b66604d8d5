"""Rows 2, 3, 5, 6, 8, 11, 12, 18 and 19 of RELIABILITY.md's catalogue on the real Slurm: faults armed in the ranks of a tiny run."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.armed import LONG, PRETEXT, TINY
from tests.launches import LOCAL, ROOT, environment
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
EVERY_STEP = "runtime.checkpoint_s=1e-9"


def config(folder: Path) -> Path:
    """A run of 20 steps, six shards, k-means and neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(stages=PRETEXT + LONG, folder=folder / "run"))
    return path


def local(folder: Path, *overrides: str, processes: int) -> Path:
    """The undisturbed run on this machine: its folder."""
    done = subprocess.run([*LOCAL, str(config(folder)), "--processes", str(processes), EVERY_STEP, *overrides], env=environment(), cwd=folder,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    return folder / "run"


class Tiny(Job):
    """The same run on the cluster, with faults armed for its ranks."""

    def __init__(self, cluster: Cluster, folder: Path, nodes: int, *overrides: str, faults: tuple[dict, ...] = ()):
        super().__init__(cluster, folder / "run", nodes)
        self.faults_path = folder / "fault.json"
        self.command = [sys.executable, str(ROOT / "launch" / "slurm.py"), "--nodes", str(nodes), str(config(folder)), EVERY_STEP, *overrides]
        self.faults_path.unlink(missing_ok=True)
        if faults:
            self.faults_path.write_text(json.dumps(faults))

    def try_submit(self) -> subprocess.CompletedProcess:
        env = environment() | {"SLURM_CONF": str(self.cluster.conf), "DIST_SCAN_FAULT": str(self.faults_path)}
        return subprocess.run(self.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.run_dir.parent, timeout=120)

    def stopped(self) -> None:
        """Submit, and wait until its ranks have left as the fault tells them."""
        self.submit().wait(lambda: "stopped: SIGTERM" in self.log() and self.state() in ("GONE", "COMPLETED"), 120, "the stop")

    def fired(self) -> list[str]:
        """The places whose fault has fired, in order."""
        return [json.loads(line)["at"] for line in Path(f"{self.faults_path}.fired").read_text().splitlines()]


def results(run_dir: Path) -> dict[str, bytes]:
    """Weights, features, clusters and neighbours, byte for byte, by stage and name."""
    found = {}
    for stage in ("pretext", "features", "kmeans", "neighbours"):
        folder, = run_dir.glob(f"stages/{stage}/*")
        found |= {f"{stage}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.suffix in (".npy", ".safetensors")}
    assert len({name.split("/")[0] for name in found}) == 4, sorted(found)
    return found


def rows(run_dir: Path) -> list[dict]:
    """Rows of the pretext's metrics that belong to a step."""
    every = map(json.loads, (run_dir / "logs" / "pretext.metrics.jsonl").read_text().splitlines())
    return [row for row in every if "loss" in row]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; a step that was trained twice must have given the same, bit for bit."""
    found: dict[int, float] = {}
    for row in rows(run_dir):
        assert found.setdefault(row["step"], row["loss"]) == row["loss"], f"step {row['step']} gave another loss"
    return found


def test_one_job_through_seven_faults_gives_the_undisturbed_result(cluster, tmp_path):
    faults = ({"kind": "exception", "rank": 1, "step": 5},
              {"kind": "kill", "rank": 0, "at": "manifest", "step": 2},    # in a save, its manifest not yet written
              {"kind": "full", "rank": 0, "at": "write", "step": 1},       # training goes on
              {"kind": "kill", "rank": 1, "at": "shard", "step": 1},
              {"kind": "signal", "rank": 0, "at": "shard"},
              {"kind": "kill", "rank": 1, "at": "iteration"},
              {"kind": "signal", "rank": 1, "at": "done"})                 # too late to matter
    job = Tiny(cluster, tmp_path / "nodes", 2, faults=faults).submit()
    whole = local(tmp_path / "whole", processes=2)
    log = job.finish(400)
    assert job.fired() == ["step", "manifest", "write", "shard", "shard", "iteration", "done"], log
    assert job.restarts() == 1 and log.count("requeue: SIGUSR2") == 1 and log.count("relaunch: ") == 4, log
    assert "relaunch: rank 1: InjectedError" in log and log.rstrip().endswith("done: the run is done")
    assert "could not save" in (job.run_dir / "logs" / "run.log").read_text()
    assert results(job.run_dir) == results(whole) and losses(job.run_dir) == losses(whole)


def test_four_nodes_then_two_then_three_are_one_run_and_a_flipped_bit_costs_a_step(cluster, tmp_path):
    """The same images at each step on any number of ranks: in fp64 nothing hides a difference. A TERM to a rank stops the job where none may be relaunched."""
    exact, once = "stages.pretext.precision=fp64", "runtime.relaunches=0"
    leave = {"kind": "signal", "signal": "SIGTERM", "rank": 0}
    Tiny(cluster, tmp_path / "nodes", 4, exact, once, faults=({**leave, "step": 6},)).stopped()
    flipped = flip(tmp_path / "nodes" / "run")
    Tiny(cluster, tmp_path / "nodes", 2, exact, once, faults=({**leave, "step": 13},)).stopped()
    job = Tiny(cluster, tmp_path / "nodes", 3, exact).submit()
    assert "3 ranks" in job.finish()
    assert f"{flipped} is bad (state.pt does not match its sha256)" in (job.run_dir / "logs" / "run.log").read_text()
    trained = rows(job.run_dir)
    expected = losses(local(tmp_path / "one", exact, processes=1))
    assert len(trained) == 21 and {row["step"] for row in trained} == set(expected), "one step was trained twice, none was left out"
    assert all(abs(expected[row["step"]] - row["loss"]) < 1e-5 for row in trained)
    before = (job.run_dir / "logs" / "run.log").read_text()
    again = Tiny(cluster, tmp_path / "nodes", 4, exact).submit()
    again.finish()
    added = (job.run_dir / "logs" / "run.log").read_text().removeprefix(before)
    assert added.count("done before") == 5 and "starts" not in added, added


def flip(run_dir: Path) -> Path:
    """One bit of the newest checkpoint; its folder."""
    newest = max(run_dir.glob("stages/pretext/*/work/checkpoints/step-*"))
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (newest / "state.pt").write_bytes(data)
    return newest
