"""Handing a batch script to Slurm: one job a run folder, through submitit, what Slurm says told in one line."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import watch

SUBMITTING = "slurm/submitting"  # locked while a submission looks, writes and submits


def place(run, text: str) -> str:
    """Write RUN/config.yaml, hand the script to Slurm, write RUN/slurm/job.json; returns the job's id. Raises ConfigError, also for a
    run folder that a job, a local run or another submission holds."""
    from dist_scan.config import ConfigError, dump
    from dist_scan.storage.atomic import write_json, write_text
    from launch.local import take_lease

    look_for_slurm()
    run_dir = run.run_dir.resolve()
    job_id = None
    try:
        (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
        with take_lease(
            run_dir, SUBMITTING, "is being submitted by"
        ):  # not the run's own lock: the job may start before this ends
            refuse_second(run_dir)
            placed = run.model_copy(
                update={"runtime": run.runtime.model_copy(update={"run_dir": str(run_dir)})}
            )  # wherever the job is started from
            write_text(run_dir / "config.yaml", dump(placed))
            job_id = send(run_dir, text)
            write_json(
                run_dir / "slurm" / "job.json",
                {
                    "job_id": job_id,
                    "run_dir": str(run_dir),
                    "name": run.name,
                    "nodes": run.slurm.nodes,
                    "world_size": run.slurm.world_size,
                    "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
                },
            )
    except OSError as error:
        went = (
            f"job {job_id} was submitted, but status and cancel will not know it: stop it with scancel {job_id}"
            if job_id
            else "nothing was submitted"
        )
        raise ConfigError(
            f"runtime.run_dir: cannot write '{error.filename or run_dir}' ({error.strerror}); {went}; give another folder with runtime.run_dir=PATH"
        ) from None
    return job_id


def check(run_dir: Path, text: str, setup: Sequence[str]) -> None:
    """What can be known of a submission beforehand, for a dry run too. Raises ConfigError for a run folder that cannot be, a script that is no shell."""
    check_folder(run_dir.resolve())
    check_shell(text, setup)


def check_folder(run_dir: Path) -> None:
    """Raises ConfigError where Slurm would misread the folder's name, or it cannot be made or written. Nothing is left behind."""
    from dist_scan.config import ConfigError

    if bad := re.search(r"[\x00-\x1f\x7f\\%]", str(run_dir)):
        raise ConfigError(
            f"runtime.run_dir: {str(run_dir)!r} has a {bad[0]!r} in its name, which Slurm reads as something else; give another with runtime.run_dir=PATH"
        )
    there = run_dir
    try:
        there = next(p for p in (run_dir, *run_dir.parents) if p.exists())
        Path(tempfile.mkdtemp(prefix=".tmp-", dir=there)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"runtime.run_dir: cannot write in '{run_dir}' ({error.strerror}: {there}); give another with runtime.run_dir=PATH"
        ) from None


def check_shell(text: str, setup: Sequence[str]) -> None:
    """Raises ConfigError naming the setup line with which the script is no shell; a warning of bash's (a heredoc without an end) counts too."""
    from dist_scan.config import ConfigError

    if said := shell_says("\n".join(setup)):
        at = min(
            [len(setup), *map(int, re.findall(r"line (\d+)", said))]
        )  # where it began, of where it began and where it was missed
        raise ConfigError(
            f"slurm.setup: bash cannot read line {at}, '{setup[at - 1]}': {said}; each construct must be closed within the setup lines"
        )
    if said := shell_says(text):
        raise ConfigError(f"the batch script is no shell that bash can read: {said}")


def shell_says(text: str) -> str:
    """What `bash -n` has against a script, in one line; '' when nothing, or where there is no bash here."""
    if shutil.which("bash") is None:
        return ""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    return " ".join(done.stderr.split()) or "exit code " * bool(done.returncode)


def look_for_slurm() -> None:
    """Raises ConfigError where there is no sbatch."""
    from dist_scan.config import ConfigError

    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch was not found: this machine is no Slurm login node. Run here with: python launch/local.py CONFIG, "
            "or try a Slurm at home: python tests/slurm/cluster.py up"
        )


def refuse_second(run_dir: Path) -> None:
    """Raises ConfigError naming the job or the process that holds the run folder."""
    from dist_scan.config import ConfigError

    try:
        job = watch.live_job(run_dir)
    except watch.NoAnswer as error:
        raise ConfigError(
            f"{error}; a job may hold '{run_dir}', so nothing was submitted"
        ) from None
    if job is not None:
        raise ConfigError(
            f"the run folder '{run_dir}' belongs to job {job['job_id']}, which is {job['state'].lower()}; "
            f"wait for it, cancel it (scancel {job['job_id']}), or give this run another name with name=OTHER"
        )
    if (run_dir / "lock").exists():
        from launch.local import take_lease

        take_lease(run_dir).close()


def send(run_dir: Path, text: str) -> str:
    """Submit through submitit; returns the job's id. Raises ConfigError with what sbatch said."""
    import submitit

    from dist_scan.config import ConfigError

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
    raise RuntimeError(
        f"started through submitit's pickle; start it with launch/slurm.py ({run_dir})"
    )
