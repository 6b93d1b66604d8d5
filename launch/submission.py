"""Submission of a batch script through submitit, one job per run folder, and checks before it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dist_scan.config import ConfigError, RunConfig, dump
from dist_scan.storage.atomic import write_json, write_text
from launch.job import QueueError, queued_job
from launch.run_lock import acquire_lock

SUBMITTING = "slurm/submitting"
"""Locked during a submission. Not the run's own lock: the job may start before its end."""


def submit(run: RunConfig, text: str) -> str:
    """Submit a batch script, given as text; returns the job id.

    Writes RUN/config.yaml before the submission and RUN/slurm/job.json after it. Raises
    ConfigError, also if a job, a local run or another submission uses the run folder.
    """
    require_slurm()
    run_dir = run.run_dir.resolve()
    # An absolute path: the job may start in another folder.
    absolute = run.runtime.model_copy(update={"run_dir": str(run_dir)})
    job_id = None
    try:
        (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
        with acquire_lock(run_dir, SUBMITTING, "is being submitted by"):
            require_unused(run_dir)
            write_text(run_dir / "config.yaml", dump(run.model_copy(update={"runtime": absolute})))
            job_id = _send(run_dir, text)
            job = {
                "job_id": job_id,
                "run_dir": str(run_dir),
                "name": run.name,
                "nodes": run.slurm.nodes,
                "world_size": run.slurm.world_size,
                "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
            }
            write_json(run_dir / "slurm" / "job.json", job)
    except OSError as error:
        outcome = "nothing was submitted"
        if job_id is not None:
            outcome = (
                f"job {job_id} was submitted, but status and cancel cannot find it; stop it with "
                f"scancel {job_id}"
            )
        raise ConfigError(
            f"runtime.run_dir: cannot write '{error.filename or run_dir}' ({error.strerror}); "
            f"{outcome}; choose another folder with runtime.run_dir=PATH"
        ) from None
    return job_id


def check(run_dir: Path, text: str, setup: Sequence[str]) -> None:
    """Everything that can be checked before a submission, for a dry run too. Raises ConfigError."""
    check_folder(run_dir.resolve())
    check_shell(text, setup)


def check_folder(run_dir: Path) -> None:
    """Raise ConfigError if Slurm would misread the folder's name, or if it is not writable.

    Nothing is left behind.
    """
    if match := re.search(r"[\x00-\x1f\x7f\\%]", str(run_dir)):
        raise ConfigError(
            f"runtime.run_dir: {str(run_dir)!r} contains {match[0]!r}, which Slurm would replace; "
            "choose another with runtime.run_dir=PATH"
        )
    existing = run_dir
    try:
        existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
        Path(tempfile.mkdtemp(prefix=".tmp-", dir=existing)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"runtime.run_dir: cannot write in '{existing}' ({error.strerror}); choose another "
            "with runtime.run_dir=PATH"
        ) from None


def check_shell(text: str, setup: Sequence[str]) -> None:
    """Raise ConfigError if bash cannot parse the script's text; names the faulty setup line.

    A warning of bash counts too: it accepts a here-document without an end.
    """
    if message := _syntax_error("\n".join(setup)):
        # Bash reports where a construct began, where its end was missed, or both; name the first.
        reported = [int(number) for number in re.findall(r"line (\d+)", message)]
        line = min([len(setup), *reported])
        raise ConfigError(
            f"slurm.setup: bash cannot parse line {line}, '{setup[line - 1]}': {message}; each "
            "construct must end within the setup lines"
        )
    if message := _syntax_error(text):
        raise ConfigError(f"bash cannot parse the batch script: {message}")


def _syntax_error(text: str) -> str:
    """What `bash -n` reports about a script, in one line; '' if nothing, or without a bash."""
    if shutil.which("bash") is None:
        return ""
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    message = " ".join(result.stderr.split())
    if not message and result.returncode:
        message = f"exit code {result.returncode}"
    return message


def require_slurm() -> None:
    """Raise ConfigError if there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch was not found: this machine is not a Slurm login node. Run here with: python "
            "launch/local.py CONFIG, or start a test cluster: python tests/slurm/cluster.py up"
        )


def require_unused(run_dir: Path) -> None:
    """Raise ConfigError that names the job or the process that uses the run folder."""
    try:
        job = queued_job(run_dir)
    except QueueError as error:
        raise ConfigError(f"{error}; a job may use '{run_dir}', so nothing was submitted") from None
    if job is not None:
        raise ConfigError(
            f"the run folder '{run_dir}' belongs to job {job.job_id}, which is "
            f"{job.state.lower()}; wait for it, cancel it (scancel {job.job_id}), or give this run "
            "another name with name=OTHER"
        )
    if (run_dir / "lock").exists():
        acquire_lock(run_dir).close()


def _send(run_dir: Path, text: str) -> str:
    """Submit through submitit; returns the job id. Raises ConfigError with sbatch's message."""
    import submitit

    class ScriptExecutor(submitit.SlurmExecutor):
        """submitit's submission with our own batch script.

        Its signal handler, its pickled call and its requeueing are not used.
        """

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

    try:
        job = ScriptExecutor(folder=run_dir / "slurm").submit(_never_called, str(run_dir))
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"Slurm refused the job: {error}") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"Slurm refused the job: {error.stderr or error}") from None
    return str(job.job_id)


def _never_called(run_dir: str) -> None:
    """What submitit pickles; it holds nothing but the run folder's path.

    The batch script starts the run.
    """
    raise RuntimeError(
        f"started through submitit's pickle; start the run with launch/slurm.py ({run_dir})"
    )
