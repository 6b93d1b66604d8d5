"""Handing a batch script to Slurm: one job a run folder, through submitit, what Slurm says told in one line."""
from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from launch import watch


def place(run, text: str) -> str:
    """Write RUN/config.yaml, hand the script to Slurm, write RUN/slurm/job.json; returns the job's id. Raises ConfigError, also for a
    run folder that a job or a local run holds."""
    from dist_scan.artefacts import write_json, write_text
    from dist_scan.config import dump

    look_for_slurm()
    run_dir = run.run_dir.resolve()
    refuse_second(run_dir)
    (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    placed = run.model_copy(update={"runtime": run.runtime.model_copy(update={"run_dir": str(run_dir)})})  # wherever the job is started from
    write_text(run_dir / "config.yaml", dump(placed))
    job_id = send(run_dir, text)
    write_json(run_dir / "slurm" / "job.json", {"job_id": job_id, "name": run.name, "nodes": run.slurm.nodes, "world_size": run.slurm.world_size,
                                                "submitted": time.strftime("%Y-%m-%dT%H:%M:%S")})
    return job_id


def look_for_slurm() -> None:
    """Raises ConfigError where there is no sbatch."""
    from dist_scan.settings import ConfigError

    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch was not found: this machine is no Slurm login node. Run here with: python launch/local.py CONFIG, "
                          "or try a Slurm at home: python tests/slurm/cluster.py up")


def refuse_second(run_dir: Path) -> None:
    """Raises ConfigError naming the job or the process that holds the run folder."""
    from dist_scan.settings import ConfigError

    try:
        job = watch.live_job(run_dir)
    except watch.NoAnswer as error:
        raise ConfigError(f"{error}; a job may hold '{run_dir}', so nothing was submitted") from None
    if job is not None:
        raise ConfigError(f"the run folder '{run_dir}' belongs to job {job['job_id']}, which is {job['state'].lower()}; "
                          f"wait for it, cancel it (scancel {job['job_id']}), or give this run another name with name=OTHER")
    if (run_dir / "lock").exists():
        from launch.local import take_lease

        take_lease(run_dir).close()


def send(run_dir: Path, text: str) -> str:
    """Submit through submitit; returns the job's id. Raises ConfigError with what sbatch said."""
    import submitit
    from dist_scan.settings import ConfigError

    class Executor(submitit.SlurmExecutor):
        """submitit's submission with our own batch text: its signal handler, its pickled call and its requeueing are not used."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

    try:
        return Executor(folder=run_dir / "slurm").submit(_never, str(run_dir)).job_id
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"Slurm refused the job: {error}") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"Slurm refused the job: {error.stderr or error}") from None


def _never(run_dir: str) -> None:
    """What submitit pickles: the run folder's path and nothing else. The batch text starts the run, this is never called."""
    raise RuntimeError(f"started through submitit's pickle; start it with launch/slurm.py ({run_dir})")
