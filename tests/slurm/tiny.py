"""A tiny run with faults armed in its ranks, on the test cluster and on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job
from tests.support.faulted_run import LONG, PRETEXT, TINY
from tests.support.faults import environment as faults_environment
from tests.support.launches import LOCAL, ROOT, environment

EVERY_STEP = "runtime.checkpoint_s=1e-9"
STAGES = PRETEXT + LONG
# The batch script's first look for a port finds one that somebody takes at that moment; all else is launch/slurm.py.
TAKEN = (
    "import sys; from launch import slurm; real = slurm.script; slurm.script = lambda job: real(job).replace("
    "'$(recovery port)', '$([ $num_steps = 0 ] && echo {port} || recovery port)'); sys.exit(slurm.main())"
)


def config(folder: Path, stages: str) -> Path:
    """A run of 20 steps, six shards, k-means and neighbours, in folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(stages=stages, folder=folder / "run"))
    return path


def local(folder: Path, *overrides: str, processes: int, stages: str = STAGES) -> Path:
    """The undisturbed run on this machine: its folder."""
    done = subprocess.run(
        [
            *LOCAL,
            str(config(folder, stages)),
            "--processes",
            str(processes),
            EVERY_STEP,
            *overrides,
        ],
        env=environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return folder / "run"


class Tiny(Job):
    """The same run on the cluster, with faults armed for its ranks."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        nodes: int,
        *overrides: str,
        faults: tuple[dict, ...] = (),
        stages: str = STAGES,
        taken_port: int | None = None,
    ) -> None:
        super().__init__(cluster, folder / "run", nodes)
        self.faults_path = folder / "fault.json"
        start = (
            [str(ROOT / "launch" / "slurm.py")]
            if taken_port is None
            else ["-c", TAKEN.format(port=taken_port)]
        )
        self.command = [
            sys.executable,
            *start,
            "--nodes",
            str(nodes),
            str(config(folder, stages)),
            EVERY_STEP,
            *overrides,
        ]
        self.seen: set[tuple[str, int]] = set()
        self.faults_path.unlink(missing_ok=True)
        if faults:
            self.faults_path.write_text(json.dumps(faults))

    def try_submit(self) -> subprocess.CompletedProcess:
        env = environment(PYTHONPATH=str(ROOT), SLURM_CONF=str(self.cluster.conf))
        env |= faults_environment(self.faults_path)
        return subprocess.run(
            self.command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.run_dir.parent,
            timeout=120,
        )

    def wait(self, until, seconds: float, what: str) -> None:
        """As a job waits; meanwhile every shard that is finished is remembered with the moment of its writing."""
        super().wait(lambda: self.look() or until(), seconds, what)

    def look(self) -> None:
        """Remember what is finished."""
        for pattern in (
            "features/*/*-[0-9]*.npy",
            "neighbours/*/*-[0-9]*.npy",
            "clusters/*/work/embed/*-[0-9]*.npy",
        ):
            for path in self.run_dir.glob(f"stages/{pattern}"):
                try:
                    self.seen.add((str(path.relative_to(self.run_dir)), path.stat().st_mtime_ns))
                except OSError:  # moved at this moment
                    continue

    def shards_twice(self) -> list[str]:
        """Finished shards that were made again."""
        names = [name for name, _ in self.seen]
        return sorted({name for name in names if names.count(name) > 1})

    def stopped(self) -> None:
        """Submit, and wait until its ranks have left as the fault tells them."""
        self.submit().wait(
            lambda: "stopped: SIGTERM" in self.log() and self.state() in ("GONE", "COMPLETED"),
            120,
            "the stop",
        )

    def fired(self) -> list[tuple[str, str]]:
        """The faults that have fired, in order: what and where."""
        rows = map(json.loads, Path(f"{self.faults_path}.fired").read_text().splitlines())
        return [(row["kind"], row["at"]) for row in rows]


def results(run_dir: Path) -> dict[str, bytes]:
    """Weights, features, clusters and neighbours, byte for byte, by stage and name."""
    found = {}
    for folder in run_dir.glob("stages/*/*"):
        found |= {
            f"{folder.parent.name}/{p.relative_to(folder)}": p.read_bytes()
            for p in folder.rglob("*")
            if p.suffix in (".npy", ".safetensors")
        }
    assert {"pretext", "features", "kmeans", "neighbours"} <= {
        name.split("/")[0] for name in found
    }, sorted(found)
    return found
