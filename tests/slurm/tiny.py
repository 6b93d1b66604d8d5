"""A tiny run with faults armed in its ranks, on the test cluster; and the same without, locally."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import GONE, Job
from tests.support import faults
from tests.support.faulted_run import LONG, PRETEXT, TINY
from tests.support.launches import LOCAL, ROOT, RunningLauncher, environment

EVERY_STEP = "runtime.checkpoint_s=1e-9"
STAGES = PRETEXT + LONG
# launch/slurm.py, except that the batch script's first choice of a port is one that is in use.
SUBMIT_WITH_PORT = """
import sys
from launch import slurm
original = slurm.build_script
replacement = "$([ $num_steps = 0 ] && echo {port} || recovery port)"
slurm.build_script = lambda job: original(job).replace("$(recovery port)", replacement)
sys.exit(slurm.main())
"""


def write_config(folder: Path, stages: str) -> Path:
    """A run of 20 steps, six shards, k-means and neighbours, in folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(stages=stages, folder=folder / "run"))
    return path


class LocalRun:
    """The undisturbed run on this machine; starts at once, in the background."""

    def __init__(self, folder: Path, *overrides: str, processes: int, stages: str = STAGES) -> None:
        self.run_dir = folder / "run"
        words = [*LOCAL, str(write_config(folder, stages)), "--processes", str(processes)]
        self.launcher = RunningLauncher([*words, EVERY_STEP, *overrides], folder)

    def finish(self) -> Path:
        """Wait for its end; returns its run folder."""
        done = self.launcher.wait()
        assert done.returncode == 0, done.stdout
        return self.run_dir


class TinyJob(Job):
    """The same run on the cluster, with faults armed for its ranks."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        nodes: int,
        *overrides: str,
        armed_faults: tuple[dict[str, Any], ...] = (),
        stages: str = STAGES,
        taken_port: int | None = None,
    ) -> None:
        super().__init__(cluster, folder / "run", nodes)
        program = [str(ROOT / "launch" / "slurm.py")]
        if taken_port is not None:
            program = ["-c", SUBMIT_WITH_PORT.format(port=taken_port)]
        self.command = [sys.executable, *program, "--nodes", str(nodes)]
        self.command += [str(write_config(folder, stages)), EVERY_STEP, *overrides]
        self.finished_shards: set[tuple[str, int]] = set()
        """(path, modification time in ns) of every finished shard that was seen."""
        self.faults_path = folder / "fault.json"
        self.faults_path.unlink(missing_ok=True)
        if armed_faults:
            self.faults_path.write_text(json.dumps(armed_faults))

    def environment(self) -> dict[str, str]:
        """Environment of the submission, with the faults."""
        variables = faults.environment(self.faults_path)
        return environment(PYTHONPATH=str(ROOT), SLURM_CONF=str(self.cluster.config), **variables)

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait as a job does, and record every shard as it is finished."""

        def record_and_check() -> Any:
            self._record_shards()
            return condition()

        super().wait(record_and_check, seconds, what)

    def _record_shards(self) -> None:
        for pattern in (
            "features/*/*-[0-9]*.npy",
            "neighbours/*/*-[0-9]*.npy",
            "clusters/*/work/embed/*-[0-9]*.npy",
        ):
            for path in self.run_dir.glob(f"stages/{pattern}"):
                try:
                    shard = (str(path.relative_to(self.run_dir)), path.stat().st_mtime_ns)
                except OSError:  # renamed at this moment
                    continue
                self.finished_shards.add(shard)

    def repeated_shards(self) -> list[str]:
        """Finished shards that were computed again."""
        names = [name for name, _ in self.finished_shards]
        return sorted({name for name in names if names.count(name) > 1})

    def submit_until_stopped(self) -> None:
        """Submit, and wait until the ranks have stopped because of an armed SIGTERM."""
        self.submit().wait(
            lambda: "stopped: SIGTERM" in self.log() and self.state() in (GONE, "COMPLETED"),
            120,
            "the stop",
        )

    def fired(self) -> list[tuple[str, str]]:
        """(kind, place) of the faults that have happened, in order."""
        lines = Path(f"{self.faults_path}.fired").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["kind"], row["at"]) for row in rows]


def published_files(run_dir: Path) -> dict[str, bytes]:
    """Weights, features, clusters and neighbours, byte for byte, by stage and name."""
    files = {}
    for path in run_dir.glob("stages/*/*/**/*"):
        if path.suffix in (".npy", ".safetensors"):
            stage, _, *name = path.relative_to(run_dir / "stages").parts
            files["/".join([stage, *name])] = path.read_bytes()
    stages = {name.split("/")[0] for name in files}
    assert {"pretext", "features", "kmeans", "neighbours"} <= stages, sorted(files)
    return files
